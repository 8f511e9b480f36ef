"""A whole chain of linear layers with widths up to 256, and the loss, at many points: only sums over the samples leave.

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
so they change between two tiles of scratch of the program's own, which stay in L2. The weights [t,
layers, S, S] are formed for a chunk of points (form.py), padded with zeros; units beyond a layer's
width are set to 0, so that infinite values do not turn the padding into NaN. Programs of one point
run at the same time and share its weights in L2.

A chain whose layers before the last have different activations runs as path_linear and
path_cross_entropy instead. The gradient runs some points again, by path_linear
(chain_gradients.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.kernels.activations import activate
from modeconn.kernels.arguments import (
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
from modeconn.kernels.form import form
from modeconn.kernels.head import head_rank, head_start, head_store, head_update
from modeconn.kernels.launch import (
    PRECISIONS,
    AotCase,
    blackwell,
    chunks,
    dot_precision,
    launch,
    multiply,
    tl,
    triton,
)
from modeconn.kernels.path_cross_entropy import path_cross_entropy, path_cross_entropy_reference
from modeconn.kernels.path_linear import FORMED_BYTES, Options, path_linear, path_linear_reference
from modeconn.kernels.tiles import aligned, aot_arguments, load_samples, samples_arguments

__all__ = ["MOST_UNITS", "PathLayer", "path_mlp", "path_mlp_reference"]

MOST_UNITS = 256
ROWS = 64
# Programs that fill a device of 132 multiprocessors twice; each takes tile after tile.
PROGRAMS = 264


def path_mlp_reference(
    x: Tensor | Blended,
    layers: Sequence[PathLayer],
    targets: Tensor,
    *,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    top5: bool = False,
) -> Tensor:
    """`path_mlp` in plain PyTorch, in any dtype and differentiable: what the kernel is judged by."""
    first: dict[str, Any] = {"input_activation": input_activation, "input_slope": input_slope}
    for layer in layers[:-1]:
        x = path_linear_reference(
            x, layer.weight, layer.bias, activation=layer.activation, slope=layer.slope, **first
        )
        first = {}
    z = path_linear_reference(
        x,
        layers[-1].weight,
        layers[-1].bias,
        activation=layers[-1].activation,
        slope=layers[-1].slope,
        **first,
    )
    return path_cross_entropy_reference(z, None, None, targets, top5=top5)


@triton.jit
def _tile(
    source,
    weights,
    biases,
    unit,
    width,
    slope,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """act(x Wᵀ + b) of some units; x at `source`, [ROWS, SIZE], weights [SIZE, SIZE] and biases padded with zeros."""
    k = tl.arange(0, BLOCK_K)
    x = source + tl.arange(0, ROWS)[:, None] * SIZE + k[None, :]
    w = weights + unit[None, :] * SIZE + k[:, None]
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        total = multiply(tl.load(x + start), tl.load(w + start), total, PRECISION)
    total = activate(total + tl.load(biases + unit)[None, :], ACTIVATION, slope)
    return tl.where((unit < width)[None, :], total, 0.0)


@triton.jit
def _mlp_kernel(
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
    for tile in range(pid, tiles, programs):
        t = tile // row_tiles
        row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
        label = tl.load(targets + row, mask=row < rows, other=0).to(tl.int32)
        x_rows = x + tl.cast(row, tl.int64)[:, None] * x_row
        if X_TERMS == 0:
            x_rows += tl.cast(t, tl.int64) * x_stride
        for start in range(0, SIZE, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            value = load_samples(
                x_rows,
                x_coefficients,
                x_stride,
                x_depth,
                row,
                k,
                t,
                rows,
                depth,
                read_depth,
                INPUT_ACTIVATION,
                input_slope,
                X_TERMS,
                X_PADDED,
            )
            value = tl.where((k < depth)[None, :], value.to(tl.float32), 0.0)
            tl.store(home + local + k[None, :], value.to(scratch.dtype.element_ty))
        tl.debug_barrier()
        w = weights + tl.cast(t, tl.int64) * (hidden + 1) * (SIZE * SIZE)
        b = biases + tl.cast(t, tl.int64) * (hidden + 1) * SIZE
        source = home
        target = home + ROWS * SIZE
        for layer in range(hidden):
            width = tl.load(widths + layer)
            for start in range(0, SIZE, UNITS):
                unit = start + tl.arange(0, UNITS)
                y = _tile(
                    source,
                    w,
                    b,
                    unit,
                    width,
                    slope,
                    ACTIVATION,
                    PRECISION,
                    SIZE,
                    ROWS,
                    UNITS,
                    BLOCK_K,
                )
                tl.store(target + local + unit[None, :], y.to(scratch.dtype.element_ty))
            tl.debug_barrier()
            before = source
            source = target
            target = before
            w += SIZE * SIZE
            b += SIZE
        greatest, first, others, own = head_start(ROWS)
        for start in range(0, classes, CLASSES):
            c = start + tl.arange(0, CLASSES)
            z = _tile(
                source,
                w,
                b,
                c,
                classes,
                last_slope,
                LAST_ACTIVATION,
                PRECISION,
                SIZE,
                ROWS,
                CLASSES,
                BLOCK_K,
            )
            greatest, first, others, own = head_update(
                z, c, classes, label, greatest, first, others, own
            )
        rank = tl.zeros((ROWS,), tl.int32)
        if TOP5:
            for start in range(0, classes, CLASSES):
                c = start + tl.arange(0, CLASSES)
                z = _tile(
                    source,
                    w,
                    b,
                    c,
                    classes,
                    last_slope,
                    LAST_ACTIVATION,
                    PRECISION,
                    SIZE,
                    ROWS,
                    CLASSES,
                    BLOCK_K,
                )
                rank += head_rank(z, c, classes, label, own)
        head_store(
            sums + tl.cast(tile, tl.int64) * 3,
            row,
            rows,
            label,
            greatest,
            first,
            others,
            own,
            rank,
            TOP5,
        )
        tl.debug_barrier()


def _blocks(size: int, classes: int, precision: str, on_blackwell: bool) -> dict[str, int]:
    """The configuration for values padded to `size` columns, of the largest tiles that do not spill."""
    units = (
        64 if precision == "tf32x3" or (on_blackwell and precision == "bf16") else min(128, size)
    )
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


@functools.lru_cache(maxsize=64)
def _on_device(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Taken there once: a copy from the host would be waited for at each call."""
    return torch.tensor(widths, dtype=torch.int32, device=device)


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
    common = {
        "targets": targets,
        "classes": widths[-1],
        "hidden": len(layers) - 1,
        "row_tiles": row_tiles,
        "slope": layers[0].slope,
        "widths": _on_device(tuple(widths[1:]), device),
        "last_slope": layers[-1].slope,
        "input_slope": options.input_slope,
        "ACTIVATION": layers[0].activation,
        "LAST_ACTIVATION": layers[-1].activation,
        "INPUT_ACTIVATION": options.input_activation,
        "TOP5": top5,
        "PRECISION": dot_precision(options.precision),
        "SIZE": size,
        **_blocks(size, widths[-1], dot_precision(options.precision), blackwell(device)),
    }
    for part in chunks(points, len(layers) * size * size * dtype.itemsize, FORMED_BYTES):
        count = part.stop - part.start
        weights = torch.empty((count, len(layers), size, size), dtype=dtype, device=device)
        biases = torch.zeros((count, len(layers), size), dtype=torch.float32, device=device)
        for index, layer in enumerate(layers):
            form(layer.weight, part, weights[:, index])
            if layer.bias is not None:
                form(
                    Blended(layer.bias.tensors[:, None], layer.bias.coefficients),
                    part,
                    biases[:, index, None],
                )
        tiles = count * row_tiles
        programs = min(tiles, PROGRAMS)
        scratch = torch.empty((programs, 2, ROWS, size), dtype=dtype, device=device)
        launch(
            _mlp_kernel,
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
    """Sums over the samples of cross-entropy, errors and top-5 errors of a chain at T points; the loss is differentiable.

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
    if not layers:
        raise ModeconnError("layers is empty: expected one at least")
    checked: list[PathLayer] = []
    width = samples.shape[1]
    for index, layer in enumerate(layers):
        checked.append(
            check_layer(f"layer {index}'s ", layer, width, checked[0].weight if checked else None)
        )
        width = checked[-1].weight.shape[0]
    points = check_points(samples, checked[0].weight)
    widths = [samples.shape[1], *(layer.weight.shape[0] for layer in checked)]
    if max(widths) > MOST_UNITS or min(widths) < 1:
        raise ModeconnError(
            f"widths are {widths}: expected 1 to {MOST_UNITS} each (path_linear takes others)"
        )
    targets = check_targets(targets, samples.shape[0])
    dot_precision(precision)
    tensors = [v.tensors for layer in checked for v in (layer.weight, layer.bias) if v is not None]
    check_same_device(
        x=samples.values, targets=targets, **{f"tensor {i}": v for i, v in enumerate(tensors)}
    )
    options = Options(
        input_activation=input_activation, input_slope=input_slope, precision=precision
    )
    if len({(layer.activation, layer.slope) for layer in checked[:-1]}) > 1:
        return _layer_by_layer(x, checked, targets, top5, options)
    assert points == checked[0].weight.points
    return _PathMlp.apply(samples, checked, targets, top5, options, samples.values, *tensors)


def _layer_by_layer(
    x: Tensor | Blended, layers: list[PathLayer], targets: Tensor, top5: bool, options: Options
) -> Tensor:
    """The same by a kernel per layer, which stores the values of all points."""
    first: dict[str, Any] = {
        "input_activation": options.input_activation,
        "input_slope": options.input_slope,
    }
    for layer in layers:
        how = {"activation": layer.activation, "slope": layer.slope, "precision": options.precision}
        x, first = path_linear(x, layer.weight, layer.bias, **how, **first), {}
    return path_cross_entropy(x, None, None, targets, top5=top5)


def aot_cases() -> list[AotCase]:
    """Layers of 245 units, the first a combination of two shared values, 10 classes, top-5 errors too."""
    cases = []
    for precision in PRECISIONS.values():
        signature, _ = aot_arguments(precision, False)
        drop = ("w", "w_coefficients", "w_stride", "w_unit", "bias", "bias_coefficients", "b_term")
        signature = {name: kind for name, kind in signature.items() if name not in drop}
        signature |= {
            "weights": "*bf16:16" if precision == "bf16" else "*fp32:16",
            "biases": "*fp32:16",
            "widths": "*i32:16",
        }
        signature |= {
            "targets": "*i64:16",
            "sums": "*fp64:16",
            "slope": "fp32",
            "last_slope": "fp32",
        }
        signature |= dict.fromkeys(("rows", "classes", "hidden", "row_tiles"), "i32")
        signature |= {"tiles": "i32", "programs": "i32", "scratch": signature["weights"]}
        how = {
            "x_depth": 1,
            "X_TERMS": 2,
            "X_PADDED": True,
            "ACTIVATION": "relu",
            "INPUT_ACTIVATION": "relu",
            "TOP5": True,
        }
        how |= {"LAST_ACTIVATION": "identity", "PRECISION": precision, "SIZE": 256}
        for archs in ((80, 90), (100,)):
            blocks = _blocks(256, 10, precision, archs == (100,))
            launch_with = blocks.pop("num_warps"), blocks.pop("num_stages")
            cases.append(
                AotCase(
                    f"path_mlp {precision}",
                    _mlp_kernel,
                    signature,
                    how | blocks,
                    *launch_with,
                    precision != "ieee",
                    archs,
                )
            )
    return cases
