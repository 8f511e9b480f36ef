"""A whole chain of linear layers with widths up to 256, and the loss, at many points: only sums over the samples leave.

    x_0 = x[t, n] or act(Σ_j c[t, j] v_j);  x_l = act_l(x_{l-1} W_l(t)ᵀ + b_l(t));  sums of loss and errors (head.py)

Floor: 2 T N Σ in·out operations; from memory only x (once per point, or once in all) and each point's weights. With P = width / 64
rounded up, a program reads the (64 P)² weights of a layer from L2 for 64 rows: 32 operations per byte of float32 weights,
64 of bfloat16 ones. Predicted for H100/H200-class GPUs (no measurement yet): at some 5.5 TB/s from L2 that is 176 Tflop/s
for "float32", about the rate of its three tf32 products, so both bind; "tf32" and "bf16" are bound by L2.

Layout: a program carries 64 rows of one point through all layers. Their values stay in registers, as P parts of 64 columns:
a part of the output is the sum over parts of the input of [64, 64] products, so nothing is ever cut or joined, and the next
weights are on their way while a product runs. The layers between the first and the last are a loop over one array
[t, layers, 64 P, 64 P] that a small kernel forms for a chunk of points (form.py), padded with zeros; units beyond a layer's
width are set to 0, so that infinite values do not turn the padding into NaN. Programs of one point follow each other.

A chain whose layers before the last have different activations runs as path_linear and path_cross_entropy instead.
The gradient runs some points again, by path_linear (chain_gradients.py).
"""

from __future__ import annotations

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
from modeconn.kernels.launch import PRECISIONS, AotCase, chunks, dot_precision, launch, multiply, tl, triton
from modeconn.kernels.path_cross_entropy import path_cross_entropy, path_cross_entropy_reference
from modeconn.kernels.path_linear import FORMED_BYTES, Options, path_linear, path_linear_reference
from modeconn.kernels.tiles import aligned, aot_arguments, load_samples, samples_arguments

__all__ = ["MOST_UNITS", "PathLayer", "path_mlp", "path_mlp_reference"]

MOST_UNITS = 256
PART = 64
ROWS = 64
WARPS = 8


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
        x = path_linear_reference(x, layer.weight, layer.bias, activation=layer.activation, slope=layer.slope, **first)
        first = {}
    z = path_linear_reference(
        x, layers[-1].weight, layers[-1].bias, activation=layers[-1].activation, slope=layers[-1].slope, **first
    )
    return path_cross_entropy_reference(z, None, None, targets, top5=top5)


@triton.jit
def _layer(x, weights, biases, width, activation_slope, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
           INS: tl.constexpr, OUTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """A layer on parts of its input; weights [64 P, 64 P] with rows of 64 INS values, padded like biases with zeros."""
    column = tl.arange(0, PART)
    tile = weights + column[None, :] * (INS * PART) + column[:, None]
    w = tl.load(tile)
    y = ()
    for j in tl.static_range(OUTS):
        total = tl.zeros((ROWS, PART), tl.float32)
        for i in tl.static_range(INS):
            ahead = w
            if j * INS + i + 1 < OUTS * INS:  # read while the product runs
                ahead = tl.load(tile + ((j * INS + i + 1) // INS * INS * PART * PART + (j * INS + i + 1) % INS * PART))
            total = multiply(x[i], w, total, PRECISION)
            w = ahead
        unit = j * PART + column
        total = activate(total + tl.load(biases + unit)[None, :], ACTIVATION, activation_slope)
        y = y + (tl.where((unit < width)[None, :], total, 0.0),)
    return y


@triton.jit
def _mlp_kernel(
    x, x_coefficients, x_stride, x_row, x_depth, weights, biases, widths, targets, sums, rows, depth, read_depth, classes,
    hidden, row_tiles, slope, last_slope, input_slope, ACTIVATION: tl.constexpr, LAST_ACTIVATION: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr, X_TERMS: tl.constexpr, X_PADDED: tl.constexpr, TOP5: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, CLASS_PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t = pid // row_tiles
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    label = tl.load(targets + row, mask=row < rows, other=0).to(tl.int32)
    x_rows = x + row.to(tl.int64)[:, None] * x_row
    if X_TERMS == 0:
        x_rows += t.to(tl.int64) * x_stride
    column = tl.arange(0, PART)
    value = ()
    for i in tl.static_range(PARTS):
        part = load_samples(
            x_rows, x_coefficients, x_stride, x_depth, row, i * PART + column, t, rows, depth, read_depth, INPUT_ACTIVATION,
            input_slope, X_TERMS, X_PADDED,
        )  # fmt: skip
        value = value + (part.to(tl.float32),)
    size = PARTS * PART
    weights += t.to(tl.int64) * (hidden + 1) * size * size
    biases += t.to(tl.int64) * (hidden + 1) * size
    for layer in range(hidden):
        width = tl.load(widths + layer)
        value = _layer(value, weights, biases, width, slope, ACTIVATION, PRECISION, PARTS, PARTS, PART, ROWS)
        weights += size * size
        biases += size
    value = _layer(value, weights, biases, classes, last_slope, LAST_ACTIVATION, PRECISION, PARTS, CLASS_PARTS, PART, ROWS)
    greatest, first, others, own = head_start(ROWS)
    for j in tl.static_range(CLASS_PARTS):
        greatest, first, others, own = head_update(value[j], j * PART + column, classes, label, greatest, first, others, own)
    rank = tl.zeros((ROWS,), tl.int32)
    if TOP5:
        for j in tl.static_range(CLASS_PARTS):
            rank += head_rank(value[j], j * PART + column, classes, label, own)
    head_store(sums + pid.to(tl.int64) * 3, row, rows, label, greatest, first, others, own, rank, TOP5)


def _sums(x: Samples, layers: Sequence[PathLayer], targets: Tensor, top5: bool, options: Options) -> Tensor:
    points, rows, device = layers[0].weight.points, x.shape[0], x.values.device
    if points == 0 or rows == 0:
        return torch.zeros((points, 3), dtype=torch.float64, device=device)
    widths = [x.shape[1], *(layer.weight.shape[0] for layer in layers)]
    parts = triton.cdiv(max(widths[:-1]), PART)
    class_parts = triton.cdiv(widths[-1], PART)
    size = PART * max(parts, class_parts)
    parts = size // PART
    row_tiles = triton.cdiv(rows, ROWS)
    sums = torch.empty((points, row_tiles, 3), dtype=torch.float64, device=device)
    x = aligned(x)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    common = {
        "targets": targets, "classes": widths[-1], "hidden": len(layers) - 1, "row_tiles": row_tiles, "slope": layers[0].slope,
        "widths": torch.tensor(widths[1:], dtype=torch.int32, device=device), "last_slope": layers[-1].slope,
        "input_slope": options.input_slope, "ACTIVATION": layers[0].activation, "LAST_ACTIVATION": layers[-1].activation,
        "INPUT_ACTIVATION": options.input_activation, "TOP5": top5, "PRECISION": dot_precision(options.precision),
        "PARTS": parts, "CLASS_PARTS": class_parts, "PART": PART, "ROWS": ROWS, "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip
    for part in chunks(points, len(layers) * size * size * dtype.itemsize, FORMED_BYTES):
        count = part.stop - part.start
        weights = torch.empty((count, len(layers), size, size), dtype=dtype, device=device)
        biases = torch.zeros((count, len(layers), size), dtype=torch.float32, device=device)
        for index, layer in enumerate(layers):
            form(layer.weight, part, weights[:, index])
            if layer.bias is not None:
                form(Blended(layer.bias.tensors[:, None], layer.bias.coefficients), part, biases[:, index, None])
        launch(
            _mlp_kernel, count * row_tiles, sums, **samples_arguments(x, part.start), weights=weights, biases=biases,
            sums=sums[part], **common,
        )  # fmt: skip
    return sums.sum(1)


class _PathMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Samples, layers: list[PathLayer], targets: Tensor, top5: bool, options: Options, *tensors: Tensor
    ) -> Tensor:
        ctx.inputs = (x, layers, targets, options)
        ctx.save_for_backward(*tensors)
        return _sums(x, layers, targets, top5, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors  # raises if something was changed in place
        x, layers, targets, options = ctx.inputs
        of_x, of_tensors = chain_gradients(x, layers, targets, grad[:, 0], options, ctx.needs_input_grad[5])
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
        x: the chain's input [N, in], [T, N, in], or a `Blended` of [J, N, in] of which `input_activation` is taken.
        layers: at least one; the last one's outputs are the logits. All widths, `in` too, are 256 at most.
        targets: integers [N], each a class; another label gives a loss of NaN.
        input_slope: of leaky_relu as `input_activation`.
        top5: whether to count top-5 errors; else their column is 0.
        precision: "float32", "tf32" or "bf16" (operands of the products; sums are float32).

    Returns:
        Float64 [T, 3]; gradients of its first column go to x and to the weights' and biases' tensors.

    Raises:
        ModeconnError: shapes, dtypes, devices or names that do not fit.
    """
    samples = samples_of("x", x, 2, input_activation)
    if not layers:
        raise ModeconnError("layers is empty: expected one at least")
    checked: list[PathLayer] = []
    width = samples.shape[1]
    for index, layer in enumerate(layers):
        checked.append(check_layer(f"layer {index}'s ", layer, width, checked[0].weight if checked else None))
        width = checked[-1].weight.shape[0]
    points = check_points(samples, checked[0].weight)
    widths = [samples.shape[1], *(layer.weight.shape[0] for layer in checked)]
    if max(widths) > MOST_UNITS or min(widths) < 1:
        raise ModeconnError(f"widths are {widths}: expected 1 to {MOST_UNITS} each (path_linear takes others)")
    targets = check_targets(targets, samples.shape[0])
    dot_precision(precision)
    tensors = [v.tensors for layer in checked for v in (layer.weight, layer.bias) if v is not None]
    check_same_device(x=samples.values, targets=targets, **{f"tensor {i}": v for i, v in enumerate(tensors)})
    options = Options(input_activation=input_activation, input_slope=input_slope, precision=precision)
    if len({(layer.activation, layer.slope) for layer in checked[:-1]}) > 1:
        return _layer_by_layer(x, checked, targets, top5, options)
    assert points == checked[0].weight.points
    return _PathMlp.apply(samples, checked, targets, top5, options, samples.values, *tensors)


def _layer_by_layer(x: Tensor | Blended, layers: list[PathLayer], targets: Tensor, top5: bool, options: Options) -> Tensor:
    """The same by a kernel per layer, which stores the values of all points."""
    first: dict[str, Any] = {"input_activation": options.input_activation, "input_slope": options.input_slope}
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
        signature |= {"weights": "*bf16:16" if precision == "bf16" else "*fp32:16", "biases": "*fp32:16", "widths": "*i32:16"}
        signature |= {"targets": "*i64:16", "sums": "*fp64:16", "slope": "fp32", "last_slope": "fp32"}
        signature |= dict.fromkeys(("rows", "classes", "hidden", "row_tiles"), "i32")
        how = {"x_depth": 1, "X_TERMS": 2, "X_PADDED": True, "ACTIVATION": "relu", "INPUT_ACTIVATION": "relu", "TOP5": True}
        how |= {"LAST_ACTIVATION": "identity", "PRECISION": precision, "PARTS": 4, "CLASS_PARTS": 1, "PART": PART, "ROWS": ROWS}
        cases.append(AotCase(f"path_mlp {precision}", _mlp_kernel, signature, how, WARPS, 1, precision != "ieee"))
    return cases
