"""Gradients of the summed loss of a chain of layers, by recomputation of some points at a time.

With z the logits of a sample and l its label, ∂loss/∂z_c = softmax(z)_c − [c = l]. For the greatest
logit, where it is the label's, this is computed as −S / (1 + S), S being the sum of the others'
exp(z_c − z_max): the digits of a small loss are kept. A tile of rows passes over the classes twice,
and the logits are replaced by their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.kernels import linear_gradients
from modeconn.kernels.activations import act
from modeconn.kernels.arguments import Options, PathLayer, Samples
from modeconn.kernels.blended import Blended
from modeconn.kernels.head import head_start, head_update
from modeconn.kernels.launch import chunks, launch, padded, tl, triton
from modeconn.kernels.materialize import materialize
from modeconn.kernels.path_linear import path_linear

# Bytes of all layers' values of the points that are run again at a time: room for several points of
# 60,000 samples, and little next to a device's memory.
RECOMPUTED_BYTES = 1 << 30


@triton.jit
def logits_gradient_kernel(
    z,
    targets,
    grad,
    rows,
    classes,
    row_tiles,
    z_point,
    z_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    t = (pid // row_tiles).to(tl.int64)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    label = tl.load(targets + row, mask=row < rows, other=0).to(tl.int32)
    places = z + t * z_point + row.to(tl.int64)[:, None] * z_row
    state = head_start(ROWS)
    for start in range(0, classes, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        value = tl.load(
            places + c[None, :], mask=(row < rows)[:, None] & (c < classes)[None, :], other=0.0
        )
        state = head_update(value, c, classes, label, state)
    greatest, first, others, _ = state
    scale = tl.load(grad + t)
    usual = tl.abs(greatest) < float("inf")
    for start in range(0, classes, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (c < classes)[None, :]
        value = tl.load(places + c[None, :], mask=mask, other=0.0)
        share = tl.exp(value - greatest[:, None]) / (1.0 + others)[:, None]
        share = tl.where(c[None, :] == label[:, None], share - 1.0, share)
        confident = (c[None, :] == first[:, None]) & (first == label)[:, None]
        share = tl.where(confident, -(others / (1.0 + others))[:, None], share)
        tl.store(
            places + c[None, :], scale * tl.where(usual[:, None], share, float("nan")), mask=mask
        )


def logits_to_gradient(z: Tensor, targets: Tensor, grad: Tensor) -> None:
    """Replaces logits [T, N, C] by the gradients of Σ_t grad[t] · the summed loss at t."""
    points, rows, classes = z.shape
    if z.numel() == 0:
        return
    # About 4096 logits a program, 32 a thread, and all classes at a time where there are few.
    columns = min(1024, triton.next_power_of_2(max(16, classes)))
    block = max(1, 4096 // columns)
    row_tiles = triton.cdiv(rows, block)
    launch(
        logits_gradient_kernel,
        points * row_tiles,
        z,
        z=z,
        targets=targets,
        grad=grad,
        rows=rows,
        classes=classes,
        row_tiles=row_tiles,
        z_point=z.stride(0),
        z_row=z.stride(1),
        ROWS=block,
        COLUMNS=columns,
        num_warps=4,
    )


def chain_gradients(
    x: Samples,
    layers: Sequence[PathLayer],
    targets: Tensor,
    grad: Tensor,
    options: Options,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Computes the gradients of Σ_t grad[t] · (summed loss at t).

    Args:
        layers: the chain; none where x holds the logits.
        grad: [T].

    Returns:
        That of x's values, if needed, and those of the layers' weights' and biases' tensors, None
            where none is needed.
    """
    grad = grad.float()
    tensors = [blended.tensors for blended in _blended(layers)]
    of_x = _zeros(x.values) if needs_x else None
    sums = [_zeros(v) if v.requires_grad else None for v in tensors]
    widths = [x.shape[-1], *(layer.weight.shape[0] for layer in layers)]
    # Three values per unit: the output, the activation's input made again, and their gradient.
    per_point = 3 * 4 * x.shape[0] * sum(map(padded, widths))
    for part in chunks(len(grad), per_point, RECOMPUTED_BYTES):
        if layers:
            _add_layers(x, layers, targets, grad[part], part, options, of_x, sums)
        else:
            dz = _given(x, part, options)
            logits_to_gradient(dz, targets, grad[part])
            if of_x is not None:
                _add_given(dz, x, part, of_x, options)
    of_tensors = [None if s is None else s.to(v) for s, v in zip(sums, tensors)]
    return None if of_x is None else of_x.to(x.values), of_tensors


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _add_layers(
    x: Samples,
    layers: Sequence[PathLayer],
    targets: Tensor,
    grad: Tensor,
    part: slice,
    options: Options,
    of_x: Tensor | None,
    sums: list[Tensor | None],
) -> None:
    """Runs some points again and adds their gradients to those of x and of the tensors."""
    values = x.values[part] if x.per_point else x.values
    leaf = values.detach().float().requires_grad_(of_x is not None)
    leaves = [
        blended.tensors.detach().requires_grad_(blended.tensors.requires_grad)
        for blended in _blended(layers)
    ]
    given = leaf if x.coefficients is None else Blended(leaf, x.coefficients[part])
    with torch.enable_grad():
        z = _run(given, layers, leaves, part, options)
    dz = z.detach().contiguous().clone()
    logits_to_gradient(dz, targets, grad)
    differentiated = [v for v in (leaf, *leaves) if v.requires_grad]
    found = iter(torch.autograd.grad(z, differentiated, dz))
    if of_x is not None:
        (of_x[part] if x.per_point else of_x).add_(next(found))
    for total in sums:
        if total is not None:
            total += next(found)


def _blended(layers: Sequence[PathLayer]) -> list[Blended]:
    """Lists the layers' weights and biases, in order."""
    found: list[Blended] = []
    for layer in layers:
        found.append(layer.weight)
        if layer.bias is not None:
            found.append(layer.bias)
    return found


def _run(
    x: Any, layers: Sequence[PathLayer], leaves: list[Tensor], part: slice, options: Options
) -> Tensor:
    """Computes the logits of some points, a layer at a time."""
    left = iter(leaves)

    def at(blended: Blended | None) -> Blended | None:
        return None if blended is None else Blended(next(left), blended.coefficients[part])

    first = {"input_activation": options.input_activation, "input_slope": options.input_slope}
    for layer in layers:
        weight, bias = at(layer.weight), at(layer.bias)
        how = {"activation": layer.activation, "slope": layer.slope, "precision": options.precision}
        x, first = path_linear(x, weight, bias, **how, **first), {}
    return x


def _given(x: Samples, part: slice, options: Options) -> Tensor:
    """Copies logits that are given, as [t, N, C] in float32."""
    if x.coefficients is None:
        values = x.values[part] if x.per_point else x.values[None]
        return values.float().clone(memory_format=torch.contiguous_format)
    z = torch.empty((part.stop - part.start, *x.shape), dtype=torch.float32, device=x.values.device)
    materialize(Blended(x.values, x.coefficients), part, z)
    return act(z, options.input_activation, options.input_slope)


def _add_given(dz: Tensor, x: Samples, part: slice, total: Tensor, options: Options) -> None:
    """Adds the gradients of logits that are given to that of the values they are made of."""
    if x.coefficients is None:
        (total[part] if x.per_point else total[None]).add_(dz)
    else:
        linear_gradients.add_shared(dz, x, part.start, total, options)
