"""A whole chain of linear layers of widths up to 256, and the loss, summed over the samples.

    x_0 = x[t, n] or act(Σ_j c[t, j] v_j);  x_l = act_l(x_{l-1} W_l(t)ᵀ + b_l(t));  sums of loss and
    errors (head.py)

Floor: 2 T N Σ in·out operations; from memory only x (once per point, or once in all) and each
point's weights. With values padded to S = 64, 128 or 256 columns, a program reads a layer's S²
weights from L2 for 64 rows, and writes and reads its values there: at S = 256 15 operations per
byte in "float32" (64 units at a time), 19 in "tf32", 37 in "bf16". Predicted for H100/H200-class
GPUs (no measurement yet): at some 5.5 TB/s from L2 that is 80, 100 and 200 Tflop/s: L2 binds,
memory does not.

Layout: a program carries 64 rows of one point through all layers, and then takes the next tile. A
layer's values do not fit the registers as operands and as results (that spills on sm_80 and sm_90),
so they change between two tiles of scratch of the program's own, which stay in L2. The weights
[t, layers, S, S] are materialized for a chunk of points (materialize.py), padded with zeros; units
beyond a layer's width are set to 0, so that infinite values do not turn the padding into NaN.
Programs of one point run at the same time and share its weights in L2.

Only the sums leave the kernel. A chain whose layers before the last have different activations runs
as path_linear and path_cross_entropy instead. The gradient runs some points again, by path_linear
(chain_gradients.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.kernels.arguments import (
    Options,
    PathLayer,
    Samples,
    check_layer,
    check_points,
    check_same_device,
    check_targets,
    samples_of,
)
from modeconn.kernels.blended import Blended
from modeconn.kernels.chain_gradients import chain_gradients
from modeconn.kernels.chain_tiles import chain_units, store_input
from modeconn.kernels.head import head_rank, head_start, head_store, head_update
from modeconn.kernels.launch import (
    blackwell,
    chunks,
    dot_precision,
    launch,
    tl,
    triton,
)
from modeconn.kernels.materialize import materialize
from modeconn.kernels.path_cross_entropy import path_cross_entropy, path_cross_entropy_reference
from modeconn.kernels.path_linear import (
    MATERIALIZED_BYTES,
    path_linear,
    path_linear_reference,
)
from modeconn.kernels.tiles import aligned, samples_arguments

__all__ = ["MOST_UNITS", "PathLayer", "path_mlp", "path_mlp_reference"]

# Wider layers are predicted to gain nothing from one kernel: the larger tiles of path_linear read
# less from L2.
MOST_UNITS = 256
# Rows of a program, for which it reads each weight from L2 once.
ROWS = 64
# Programs that fill a device of 132 multiprocessors twice; each takes tile after tile.
PROGRAMS = 264


@triton.jit
def mlp_kernel(
    x,
    x_coefficients,
    x_stride,
    x_row,
    x_depth,
    weights,
    biases,
    widths,
    targets,
    scratch,
    sums,
    rows,
    depth,
    read_depth,
    classes,
    hidden,
    row_tiles,
    tiles,
    programs,
    slope,
    last_slope,
    input_slope,
    ACTIVATION: tl.constexpr,
    LAST_ACTIVATION: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    X_TERMS: tl.constexpr,
    X_PADDED: tl.constexpr,
    TOP5: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    local = tl.arange(0, ROWS)[:, None] * SIZE
    home = scratch + pid.to(tl.int64) * (2 * ROWS * SIZE)
    samples = x, x_coefficients, x_stride, x_row, x_depth, rows, depth, read_depth, input_slope
    for tile in range(pid, tiles, programs):
        t = tile // row_tiles
        row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
        label = tl.load(targets + row, mask=row < rows, other=0).to(tl.int32)
        store_input(
            samples, home + local, row, t, INPUT_ACTIVATION, X_TERMS, X_PADDED, SIZE, BLOCK_K
        )
        tl.debug_barrier()
        w = weights + tl.cast(t, tl.int64) * (hidden + 1) * (SIZE * SIZE)
        b = biases + tl.cast(t, tl.int64) * (hidden + 1) * SIZE
        source = home
        target = home + ROWS * SIZE
        for index in range(hidden):
            layer = w, b, tl.load(widths + index), slope
            for start in range(0, SIZE, UNITS):
                unit = start + tl.arange(0, UNITS)
                y = chain_units(source, layer, unit, ACTIVATION, PRECISION, SIZE, ROWS, BLOCK_K)
                tl.store(target + local + unit[None, :], y.to(scratch.dtype.element_ty))
            tl.debug_barrier()
            before = source
            source = target
            target = before
            w += SIZE * SIZE
            b += SIZE
        last = w, b, classes, last_slope
        state = head_start(ROWS)
        for start in range(0, classes, CLASSES):
            c = start + tl.arange(0, CLASSES)
            z = chain_units(source, last, c, LAST_ACTIVATION, PRECISION, SIZE, ROWS, BLOCK_K)
            state = head_update(z, c, classes, label, state)
        rank = tl.zeros((ROWS,), tl.int32)
        if TOP5:
            for start in range(0, classes, CLASSES):
                c = start + tl.arange(0, CLASSES)
                z = chain_units(source, last, c, LAST_ACTIVATION, PRECISION, SIZE, ROWS, BLOCK_K)
                rank += head_rank(z, c, classes, label, state)
        place = sums + tl.cast(tile, tl.int64) * 3
        head_store(place, row, rows, label, state, rank, TOP5)
        tl.debug_barrier()


def blocks(size: int, classes: int, precision: str, on_blackwell: bool) -> dict[str, int]:
    """Returns the configuration for values padded to `size` columns: the largest without spills."""
    small = precision == "tf32x3" or (on_blackwell and precision == "bf16")
    units = 64 if small else min(128, size)
    columns = min(64, triton.next_power_of_2(max(16, classes)))
    stages = 2 if on_blackwell and precision == "tf32x3" else 3
    return {
        "ROWS": ROWS,
        "UNITS": units,
        "CLASSES": columns,
        "BLOCK_K": 32,
        "num_warps": 8,
        "num_stages": stages,
    }


def _sums(
    x: Samples, layers: Sequence[PathLayer], targets: Tensor, top5: bool, options: Options
) -> Tensor:
    points, rows, device = layers[0].weight.points, x.shape[0], x.values.device
    if points == 0 or rows == 0:
        return torch.zeros((points, 3), dtype=torch.float64, device=device)
    widths = [x.shape[1], *(layer.weight.shape[0] for layer in layers)]
    size = max(64, triton.next_power_of_2(max(widths)))
    row_tiles = triton.cdiv(rows, ROWS)
    sums = torch.empty((points, row_tiles, 3), dtype=torch.float64, device=device)
    x = aligned(x)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    dot = dot_precision(options.precision)
    first, last = layers[0], layers[-1]
    common: dict[str, Any] = {"targets": targets, "widths": _on_device(tuple(widths[1:]), device)}
    common |= {"classes": widths[-1], "hidden": len(layers) - 1, "row_tiles": row_tiles}
    common |= {"slope": first.slope, "ACTIVATION": first.activation}
    common |= {"last_slope": last.slope, "LAST_ACTIVATION": last.activation}
    common |= {"input_slope": options.input_slope, "INPUT_ACTIVATION": options.input_activation}
    common |= {"TOP5": top5, "PRECISION": dot, "SIZE": size}
    common |= blocks(size, widths[-1], dot, blackwell(device))
    for part in chunks(points, len(layers) * size * size * dtype.itemsize, MATERIALIZED_BYTES):
        count = part.stop - part.start
        weights, biases = _materialized(layers, part, size, dtype)
        tiles = count * row_tiles
        programs = min(tiles, PROGRAMS)
        scratch = torch.empty((programs, 2, ROWS, size), dtype=dtype, device=device)
        launch(
            mlp_kernel,
            programs,
            sums,
            **samples_arguments(x, part.start),
            weights=weights,
            biases=biases,
            scratch=scratch,
            sums=sums[part],
            tiles=tiles,
            programs=programs,
            **common,
        )
    return sums.sum(1)


@functools.lru_cache(maxsize=64)
def _on_device(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the widths on the device, taken there once: each call would wait for the copy."""
    return torch.tensor(widths, dtype=torch.int32, device=device)


def _materialized(
    layers: Sequence[PathLayer], part: slice, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns weights [t, layers, size, size] and biases [t, layers, size] of some points."""
    shape = part.stop - part.start, len(layers), size
    device = layers[0].weight.tensors.device
    weights = torch.empty((*shape, size), dtype=dtype, device=device)
    biases = torch.zeros(shape, dtype=torch.float32, device=device)
    for index, layer in enumerate(layers):
        materialize(layer.weight, part, weights[:, index])
        if layer.bias is not None:
            rows = Blended(layer.bias.tensors[:, None], layer.bias.coefficients)
            materialize(rows, part, biases[:, index, None])
    return weights, biases


class _PathMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Samples,
        layers: list[PathLayer],
        targets: Tensor,
        top5: bool,
        options: Options,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.inputs = (x, layers, targets, options)
        ctx.save_for_backward(*tensors)
        return _sums(x, layers, targets, top5, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors  # raises if something was changed in place
        x, layers, targets, options = ctx.inputs
        of_x, of_tensors = chain_gradients(
            x, layers, targets, grad[:, 0], options, ctx.needs_input_grad[5]
        )
        return (None, None, None, None, None, of_x, *of_tensors)


def path_mlp(
    x: Tensor | Blended,
    layers: Sequence[PathLayer],
    targets: Tensor,
    *,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    top5: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Sums a chain's cross-entropy, errors and top-5 errors over the samples at T points.

    The loss is differentiable in x and in the weights' and biases' tensors.

    Args:
        x: the chain's input [N, in], [T, N, in], or a `Blended` of [J, N, in] of which
            `input_activation` is taken.
        layers: at least one; the last one's outputs are the logits. All widths, `in` too, are 256
            at most.
        targets: integers [N], each a class; another label gives a loss of NaN.
        input_slope: of leaky_relu as `input_activation`.
        top5: whether to count top-5 errors; else their column is 0.
        precision: "float32", "tf32" or "bf16" (operands of the products; sums are float32).

    Returns:
        Float64 [T, 3]; gradients of its first column go to x and to the weights' and biases'
            tensors.

    Raises:
        ModeconnError: shapes, dtypes, devices or names that do not fit.
    """
    samples = samples_of("x", x, 2, input_activation)
    checked = _checked(samples, layers)
    targets = check_targets(targets, samples.shape[0])
    dot_precision(precision)
    tensors: list[Tensor] = []
    for layer in checked:
        tensors += [v.tensors for v in (layer.weight, layer.bias) if v is not None]
    numbered = {f"tensor {index}": tensor for index, tensor in enumerate(tensors)}
    check_same_device(x=samples.values, targets=targets, **numbered)
    options = Options(
        input_activation=input_activation, input_slope=input_slope, precision=precision
    )
    if len({(layer.activation, layer.slope) for layer in checked[:-1]}) > 1:
        return _layer_by_layer(x, checked, targets, top5, options)
    return _PathMlp.apply(samples, checked, targets, top5, options, samples.values, *tensors)


def _checked(x: Samples, layers: Sequence[PathLayer]) -> list[PathLayer]:
    """Checks the layers, of which each takes the units of the one before."""
    if not layers:
        raise ModeconnError("layers is empty: expected at least one")
    checked: list[PathLayer] = []
    widths = [x.shape[1]]
    for index, layer in enumerate(layers):
        first = checked[0].weight if checked else None
        checked.append(check_layer(f"layer {index}'s ", layer, widths[-1], first))
        widths.append(checked[-1].weight.shape[0])
    check_points(x, checked[0].weight)
    if max(widths) > MOST_UNITS or min(widths) < 1:
        raise ModeconnError(
            f"widths are {widths}: expected 1 to {MOST_UNITS} each (path_linear takes others)"
        )
    return checked


def _layer_by_layer(
    x: Tensor | Blended, layers: list[PathLayer], targets: Tensor, top5: bool, options: Options
) -> Tensor:
    """Runs a kernel per layer, which stores the values of all points."""
    first: dict[str, Any] = {
        "input_activation": options.input_activation,
        "input_slope": options.input_slope,
    }
    for layer in layers:
        how = {"activation": layer.activation, "slope": layer.slope, "precision": options.precision}
        x, first = path_linear(x, layer.weight, layer.bias, **how, **first), {}
    return path_cross_entropy(x, None, None, targets, top5=top5)


def path_mlp_reference(
    x: Tensor | Blended,
    layers: Sequence[PathLayer],
    targets: Tensor,
    *,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    top5: bool = False,
) -> Tensor:
    """Computes `path_mlp` in plain PyTorch, in any dtype and differentiable."""
    first: dict[str, Any] = {"input_activation": input_activation, "input_slope": input_slope}
    for layer in layers:
        x = path_linear_reference(
            x, layer.weight, layer.bias, activation=layer.activation, slope=layer.slope, **first
        )
        first = {}
    return path_cross_entropy_reference(x, None, None, targets, top5=top5)
