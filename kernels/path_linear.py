"""A linear layer at many points: y[t, n] = act(x[t, n] W(t)ᵀ + b(t)), with W(t) = Σ_k c[t, k] W_k.

Floor of a layer of `depth` inputs and `units` outputs: 2 T N depth units operations; bytes: x once
(per point, or once in all if it is shared), 4 T N units written, the K control points once.
Predicted for H100/H200-class GPUs (no measurement yet): "float32" is bound by its three tf32
products (about 1/3 of 495 TFLOP/s), "tf32" by filling the tiles from L2 (128×128 tiles of float32
use each byte for 32 operations), "bf16" with values of float32 by the memory that [T, N, units]
takes.

W(t) is never stored for all t. There are two ways, and `blends_in_prologue` chooses:
  in the prologue   each tile of the K control points is read and combined right before its product,
                    once per tile of rows;
  materialized      a small kernel writes W(t) for a chunk of points, padded to 16, and the product
                    reads that.

Layout: a program makes a tile [BLOCK_M rows, BLOCK_N units] of one point. Programs are ordered
(group of rows, point, row tile, unit tile), unit tiles fastest. With one x per point all rows are
one group: the tiles of one point follow each other and share its weights in L2. With a shared x a
group's rows stay in L2 while all points pass. Every tile is as long as every other, so a persistent
grid has nothing to balance. A `Blended` x, act(Σ_j c[t, j] v_j), is combined as it is read.

Rows of the output start on multiples of 16 values (a view of padded storage if units > 32): then
the next layer reads 16 bytes at a time, copied in the background.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeconn.kernels import linear_gradients
from modeconn.kernels.activations import act, activate, derivative_from_output
from modeconn.kernels.arguments import (
    Options,
    PathLayer,
    Samples,
    check_layer,
    check_points,
    check_same_device,
    samples_of,
)
from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import (
    chunks,
    dot_precision,
    launch,
    padded,
    tl,
    triton,
    tuned,
)
from modeconn.kernels.materialize import materialized
from modeconn.kernels.tiles import (
    aligned,
    bias_arguments,
    blended_arguments,
    linear_tile,
    materialized_arguments,
    rows_of_a_group,
    samples_arguments,
    tile_of_program,
)

# The depth of a tile is the same everywhere: it decides the order of the sums.
BLOCK_K = 32
SMALL = triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3)
MIDDLE = triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3)
LARGE = triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3)
CONFIGS = [LARGE, MIDDLE, SMALL]

# Bytes of materialized weights at a time: they should still lie in L2, 40 MB on an A100, when the
# product reads them.
MATERIALIZED_BYTES = 32 << 20
# Bytes of ∂L/∂x of several points at a time, where x is shared: enough to fill a device, and little
# next to its memory.
GRADIENT_BYTES = 256 << 20


@tuned(CONFIGS, key=["units", "depth", "X_TERMS", "W_TERMS", "PRECISION"])
@triton.jit
def linear_kernel(
    x,
    x_coefficients,
    x_stride,
    x_row,
    x_depth,
    w,
    w_coefficients,
    w_stride,
    w_unit,
    w_depth,
    bias,
    bias_coefficients,
    b_term,
    b_unit,
    out,
    out_point,
    out_row,
    points,
    rows,
    units,
    depth,
    read_depth,
    out_units,
    group_rows,
    slope,
    input_slope,
    ACTIVATION: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    X_TERMS: tl.constexpr,
    X_PADDED: tl.constexpr,
    W_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t, row_tile, unit_tile = tile_of_program(
        points, rows, tl.cdiv(units, BLOCK_N), group_rows, BLOCK_M
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = unit_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = linear_tile(
        (x, x_coefficients, x_stride, x_row, x_depth, rows, depth, read_depth, input_slope),
        (w, w_coefficients, w_stride, w_unit, w_depth, units),
        (bias, bias_coefficients, b_term, b_unit),
        row,
        unit,
        t,
        INPUT_ACTIVATION,
        X_TERMS,
        X_PADDED,
        W_TERMS,
        B_TERMS,
        PRECISION,
        BLOCK_K,
    )
    y = activate(total, ACTIVATION, slope)
    target = out + t.to(tl.int64) * out_point + row.to(tl.int64)[:, None] * out_row + unit[None, :]
    tl.store(
        target, y.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (unit < out_units)[None, :]
    )


def default_blocks(rows: int, units: int, dot: str) -> triton.Config:
    """Returns the configuration where none is measured.

    Small layers take small tiles, so that there are programs enough; three products at 128 × 128
    spill on sm_80.
    """
    if min(rows, units) <= 64:
        return SMALL
    return MIDDLE if dot == "tf32x3" else LARGE


def blends_in_prologue(row_tiles: int, terms: int) -> bool:
    """Whether blending weights in the prologue costs less than materializing them.

    Counted in reads of W from L2 per point, that and writing it to memory being about equal:
    blending reads K matrices per row tile; forming reads K and writes one, of which each row tile
    then reads one.
    """
    return row_tiles * terms <= terms + 1 + row_tiles


def product(
    x: Samples,
    weight: Blended,
    bias: Blended | None,
    out: Tensor,
    options: Options,
    transposed: bool = False,
) -> None:
    """Writes act(x W(t)ᵀ + b(t)) of all points into out.

    Args:
        out: [T, N, units], of `new_rows`.
        transposed: whether to write act(x W(t) + b(t)) instead.
    """
    points, rows, units = out.shape
    if out.numel() == 0:
        return
    x = aligned(x)
    dot = dot_precision(options.precision)
    blocks = default_blocks(rows, units, dot)
    common: dict[str, Any] = {"units": units, "group_rows": rows_of_a_group(x)}
    common |= {"out_point": out.stride(0), "out_row": out.stride(1)}
    common |= {"out_units": min(padded(units), out.stride(1))}
    common |= {"slope": options.slope, "input_slope": options.input_slope}
    common |= {"ACTIVATION": options.activation, "INPUT_ACTIVATION": options.input_activation}
    common |= {"PRECISION": dot, "BLOCK_K": BLOCK_K}
    if not isinstance(linear_kernel, triton.runtime.Autotuner):
        common |= blocks.all_kwargs()

    def run(part: slice, weights: dict[str, Any]) -> None:
        count = part.stop - part.start

        def programs(meta: dict[str, Any]) -> int:
            tiles = -(-rows // int(meta["BLOCK_M"])) * -(-units // int(meta["BLOCK_N"]))
            return count * tiles

        launch(
            linear_kernel,
            programs,
            out,
            **samples_arguments(x, part.start),
            **weights,
            **bias_arguments(bias, weight, part.start),
            out=out[part],
            points=count,
            **common,
        )

    row_tiles = triton.cdiv(rows, blocks.kwargs["BLOCK_M"])
    if not transposed and blends_in_prologue(row_tiles, len(weight.tensors)):
        run(slice(0, points), blended_arguments(weight))
        return
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    for part in chunks(points, padded(weight.shape.numel()) * dtype.itemsize, MATERIALIZED_BYTES):
        run(part, materialized_arguments(materialized(weight, part, dtype, transposed)))


def new_rows(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocates [points, rows, width]; rows of more than 32 values start on multiples of 16.

    Narrower rows would grow by half or more, and gain little by wide reads.
    """
    points, rows, width = shape
    stored = padded(width) if width > 32 else width
    return torch.empty((points, rows, stored), dtype=dtype, device=like.device)[..., :width]


class _PathLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weights: Tensor,
        biases: Tensor | None,
        x: Samples,
        weight: Blended,
        bias: Blended | None,
        options: Options,
    ) -> Tensor:
        out = new_rows((weight.points, x.shape[0], weight.shape[0]), values, values.dtype)
        product(x, weight, bias, out, options)
        ctx.inputs, ctx.options = (x, weight, bias), options
        ctx.save_for_backward(values, weights, biases, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, y = ctx.saved_tensors  # raises if something was changed in place
        (x, weight, bias), options = ctx.inputs, ctx.options
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad.numel() == 0:
            zeros = [
                torch.zeros_like(v) if need else None
                for v, need in zip(ctx.saved_tensors[:3], ctx.needs_input_grad)
            ]
            return (*zeros, None, None, None, None)
        if not derivative_from_output(options.activation, options.slope):
            y = new_rows(grad.shape, grad)
            product(x, weight, bias, y, replace(options, activation="identity"))
        g = linear_gradients.through_activation(
            grad, y, new_rows(grad.shape, grad), options.activation, options.slope
        )
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = _input_gradient(g, x, weight, options).to(x.values)
        if needs_weight:
            of_weight = linear_gradients.weight_gradient(g, x, weight, options)
            of_weight = of_weight.to(weight.tensors)
        if needs_bias:
            of_bias = linear_gradients.bias_gradient(g, bias).to(bias.tensors)
        return of_x, of_weight, of_bias, None, None, None, None


def _input_gradient(g: Tensor, x: Samples, weight: Blended, options: Options) -> Tensor:
    """Computes ∂L/∂x [T, N, depth], or that of the shared values, from g = ∂L/∂u."""
    plain = Options(precision=options.precision)
    if x.per_point:
        out = new_rows((*g.shape[:2], x.shape[-1]), g)
        product(samples_of("g", g, 2), weight, None, out, plain, transposed=True)
        return out
    total = torch.zeros(x.values.shape, dtype=torch.float32, device=g.device)
    for part in chunks(len(g), 4 * padded(x.shape[-1]) * x.shape[0], GRADIENT_BYTES):
        out = new_rows((part.stop - part.start, *x.shape), g)
        at = Blended(weight.tensors, weight.coefficients[part])
        product(samples_of("g", g[part], 2), at, None, out, plain, transposed=True)
        linear_gradients.add_shared(out, x, part.start, total, options)
    return total


def path_linear(
    x: Tensor | Blended,
    weight: Blended,
    bias: Blended | None = None,
    *,
    activation: str = "identity",
    slope: float = 0.01,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    precision: str = "float32",
) -> Tensor:
    """Applies a linear layer at the T points of its weight.

    It is differentiable in x and in the weight's and the bias's tensors.

    Args:
        x: [N, in], [T, N, in], or a `Blended` of J values [J, N, in], of which `input_activation`
            is taken.
        weight, bias: [K, out, in] and [K, out] with their coefficients [T, K].
        activation, slope: taken of the result; the slope is that of leaky_relu.
        input_slope: that of leaky_relu as `input_activation`.
        precision: "float32", "tf32" or "bf16" (operands of the products; sums are float32).

    Returns:
        [T, N, out] of x's dtype; where out > 32, rows start on multiples of 16 values.

    Raises:
        ModeconnError: shapes, dtypes, devices or names that do not fit.
    """
    samples = samples_of("x", x, 2, input_activation)
    layer = check_layer("", PathLayer(weight, bias, activation, slope), samples.shape[1])
    check_points(samples, layer.weight)
    weight, bias = layer.weight, layer.bias
    check_same_device(
        x=samples.values, weight=weight.tensors, bias=None if bias is None else bias.tensors
    )
    dot_precision(precision)
    options = Options(activation, slope, input_activation, input_slope, precision)
    biases = None if bias is None else bias.tensors
    return _PathLinear.apply(samples.values, weight.tensors, biases, samples, weight, bias, options)


def path_linear_reference(
    x: Tensor | Blended,
    weight: Blended,
    bias: Blended | None = None,
    *,
    activation: str = "identity",
    slope: float = 0.01,
    input_activation: str = "identity",
    input_slope: float = 0.01,
) -> Tensor:
    """Computes `path_linear` in plain PyTorch, in any dtype and differentiable."""
    values = act(x.materialized(), input_activation, input_slope) if isinstance(x, Blended) else x
    y = torch.matmul(values, weight.materialized().transpose(1, 2))
    return act(y if bias is None else y + bias.materialized()[:, None], activation, slope)
