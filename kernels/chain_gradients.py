"""Gradients of the summed loss of a chain of layers, by recomputation: some points at a time are run again and differentiated.

With z the logits of a sample and l its label, ∂loss/∂z_c = softmax(z)_c − [c = l]. For the greatest
logit this is formed as −S / (1 + S) where it is the label's, S being the sum of the others' exp(z_c
− z_max): the digits of a small loss are kept. A tile of rows passes over the classes twice, and the
logits are replaced by their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.kernels import linear_gradients
from modeconn.kernels.activations import act
from modeconn.kernels.arguments import PathLayer, Samples
from modeconn.kernels.blended import Blended
from modeconn.kernels.form import form
from modeconn.kernels.head import head_start, head_update
from modeconn.kernels.launch import AotCase, chunks, launch, padded, tl, triton
from modeconn.kernels.path_linear import Options, path_linear

# Bytes of all layers' values of the points that are run again at a time.
RECOMPUTED_BYTES = 1 << 30


@triton.jit
def _logits_gradient_kernel(
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
    greatest, first, others, own = head_start(ROWS)
    for start in range(0, classes, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        value = tl.load(
            places + c[None, :], mask=(row < rows)[:, None] & (c < classes)[None, :], other=0.0
        )
        greatest, first, others, own = head_update(
            value, c, classes, label, greatest, first, others, own
        )
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
    """Replace logits [T, N, C] by the gradients of Σ_t grad[t] · the summed loss at t."""
    points, rows, classes = z.shape
    if z.numel() == 0:
        return
    columns = min(1024, triton.next_power_of_2(max(16, classes)))
    block = max(1, 4096 // columns)
    row_tiles = triton.cdiv(rows, block)
    launch(
        _logits_gradient_kernel,
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
    """The gradients of Σ_t grad[t] · (summed loss at t).

    Args:
        grad: [T].

    Returns:
        That of x's values, if needed, and those of the layers' weights' and biases' tensors, None
            where none is needed.
    """
    grad = grad.float()
    tensors = [blended.tensors for blended in _blended(layers)]
    of_x = (
        torch.zeros(x.values.shape, dtype=torch.float32, device=x.values.device)
        if needs_x
        else None
    )
    sums = [
        torch.zeros(v.shape, dtype=torch.float32, device=v.device) if v.requires_grad else None
        for v in tensors
    ]
    widths = [x.shape[-1], *(layer.weight.shape[0] for layer in layers)]
    per_point = 3 * 4 * x.shape[0] * sum(padded(width) for width in widths)
    for part in chunks(len(grad), per_point, RECOMPUTED_BYTES):
        if not layers:
            dz = _given(x, part, options)
            logits_to_gradient(dz, targets, grad[part])
            if of_x is not None:
                _add_given(dz, x, part, of_x, options)
            continue
        leaf = (
            (x.values[part] if x.per_point else x.values).detach().float().requires_grad_(needs_x)
        )
        leaves = [v.detach().requires_grad_(v.requires_grad) for v in tensors]
        with torch.enable_grad():
            z = _run(
                leaf if x.coefficients is None else Blended(leaf, x.coefficients[part]),
                layers,
                leaves,
                part,
                options,
            )
        dz = z.detach().contiguous().clone()
        logits_to_gradient(dz, targets, grad[part])
        wanted = [v for v in (leaf, *leaves) if v.requires_grad]
        found = iter(torch.autograd.grad(z, wanted, dz))
        if of_x is not None:
            (of_x[part] if x.per_point else of_x).add_(next(found))
        for total in sums:
            if total is not None:
                total += next(found)
    return None if of_x is None else of_x.to(x.values), [
        None if s is None else s.to(v) for s, v in zip(sums, tensors)
    ]


def _blended(layers: Sequence[PathLayer]) -> list[Blended]:
    return [
        blended for layer in layers for blended in (layer.weight, layer.bias) if blended is not None
    ]


def _run(
    x: Any, layers: Sequence[PathLayer], leaves: list[Tensor], part: slice, options: Options
) -> Tensor:
    """The logits of some points, by a layer at a time."""
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
    """Logits that are given, as a copy [t, N, C] in float32."""
    if x.coefficients is None:
        return (
            (x.values[part] if x.per_point else x.values[None])
            .float()
            .clone(memory_format=torch.contiguous_format)
        )
    z = torch.empty((part.stop - part.start, *x.shape), dtype=torch.float32, device=x.values.device)
    form(Blended(x.values, x.coefficients), part, z)
    return act(z, options.input_activation, options.input_slope)


def _add_given(dz: Tensor, x: Samples, part: slice, total: Tensor, options: Options) -> None:
    """Add the gradients of logits that are given to that of the values they are made of."""
    if x.coefficients is None:
        (total[part] if x.per_point else total[None]).add_(dz)
    else:
        linear_gradients.add_shared(
            dz, x, part.start, total, options.input_activation, options.input_slope
        )


def aot_cases() -> list[AotCase]:
    """The gradient of 1000 classes' logits."""
    signature = {
        "z": "*fp32:16",
        "targets": "*i64:16",
        "grad": "*fp32",
        "z_point": "i32",
        "z_row": "i32",
    }
    signature |= dict.fromkeys(("rows", "classes", "row_tiles"), "i32")
    return [
        AotCase(
            "logits' gradient",
            _logits_gradient_kernel,
            signature,
            {"ROWS": 4, "COLUMNS": 1024},
            4,
            3,
            False,
        )
    ]
