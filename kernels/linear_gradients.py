"""Gradients of a linear layer at many points, from g[t, n] = ∂L/∂(x W(t)ᵀ + b(t)).

    through the activation   g = ∂L/∂y · act'(u)
    shared values            ∂L/∂v_j = Σ_t c[t, j] act'(Σ_i c[t, i] v_i) ∂L/∂x[t]
    control points           ∂L/∂W_k = Σ_t c[t, k] g[t]ᵀ x[t];   ∂L/∂b_k = Σ_t c[t, k] Σ_n g[t, n]
    one x per point          ∂L/∂x[t] = g[t] W(t), which is path_linear's product

A program owns a tile of ∂L/∂W_k for all k and some of the points: it adds each point's product
g[t]ᵀ x[t], in registers over the rows, to K tiles in L2. So there are no T gradients in memory,
only as many partial sums as it takes programs to fill the device, and those are added in order: the
same bits every time. Floor of the control points' gradient: 2 T N depth units operations; g and x
read once per 64 columns of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.kernels.activations import derivative
from modeconn.kernels.arguments import Options, Samples
from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import (
    INTERPRETED,
    dot_precision,
    launch,
    multiply,
    padded,
    tl,
    triton,
)
from modeconn.kernels.tiles import blend, load_samples, sample_rows, samples_arguments, where_active

# Programs of a weight gradient that fill a device of 132 multiprocessors twice. A constant, so that
# sums do not depend on the device.
_PROGRAMS = 4 if INTERPRETED else 264
# Rows of a tile, and columns; a tile of ∂L/∂W_k has as many columns in both directions.
ROWS, COLUMNS = 32, 64


@triton.jit
def activation_gradient_kernel(
    grad,
    y,
    out,
    rows,
    units,
    out_units,
    row_tiles,
    grad_point,
    grad_row,
    grad_unit,
    y_point,
    y_row,
    out_point,
    out_row,
    slope,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    unit_tiles = tl.cdiv(out_units, COLUMNS)
    t = (pid // unit_tiles // row_tiles).to(tl.int64)
    row = (pid // unit_tiles % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    unit = (pid % unit_tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows) & (unit < units)
    value = tl.load(
        grad + t * grad_point + row * grad_row + unit * grad_unit, mask=mask, other=0.0
    ).to(tl.float32)
    if ACTIVATION != "identity":
        u = tl.load(y + t * y_point + row * y_row + unit, mask=mask, other=0.0).to(tl.float32)
        value *= derivative(u, ACTIVATION, slope)
    tl.store(
        out + t * out_point + row * out_row + unit, value, mask=(row < rows) & (unit < out_units)
    )


@triton.jit
def shared_gradient_kernel(
    grad,
    x,
    x_coefficients,
    out,
    points,
    rows,
    depth,
    grad_point,
    grad_row,
    x_term,
    x_row,
    x_depth,
    out_term,
    out_row,
    slope,
    ACTIVATION: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    terms: tl.constexpr = TERMS if TERMS > 0 else 1
    j = (pid % terms).to(tl.int64)
    depth_tiles = tl.cdiv(depth, COLUMNS)
    row = (pid // terms // depth_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = (pid // terms % depth_tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows) & (d < depth)
    grads = grad + row * grad_row + d
    target = out + j * out_term + row * out_row + d
    total = tl.load(target, mask=mask, other=0.0)
    for t in range(points):
        if TERMS > 0:
            c = tl.load(x_coefficients + t * TERMS + j)
            value = tl.load(grads, mask=where_active(mask, c), other=0.0)
            if ACTIVATION != "identity":
                u = blend(
                    x + row * x_row + d * x_depth,
                    x_coefficients + t * TERMS,
                    x_term,
                    where_active(mask, c),
                    TERMS,
                )
                value *= derivative(u, ACTIVATION, slope)
            total += c * value
        else:
            total += tl.load(grads, mask=mask, other=0.0)
        grads += grad_point
    tl.store(target, total, mask=mask)


@triton.jit
def weight_gradient_kernel(
    grad,
    w_coefficients,
    out,
    x,
    x_coefficients,
    x_stride,
    x_row,
    x_depth,
    points,
    rows,
    units,
    depth,
    read_depth,
    grad_point,
    grad_row,
    split_points,
    split_rows,
    row_splits,
    out_split,
    out_term,
    input_slope,
    INPUT_ACTIVATION: tl.constexpr,
    X_TERMS: tl.constexpr,
    X_PADDED: tl.constexpr,
    W_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    depth_tiles = tl.cdiv(depth, COLUMNS)
    tiles = depth_tiles * tl.cdiv(units, COLUMNS)
    split = pid // tiles
    unit = pid % tiles // depth_tiles * COLUMNS + tl.arange(0, COLUMNS)
    d = pid % depth_tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = split // row_splits * split_points
    begin = split % row_splits * split_rows
    end = tl.minimum(begin + split_rows, rows)
    target = out + split.to(tl.int64) * out_split + unit.to(tl.int64)[:, None] * depth + d[None, :]
    mask = (unit < units)[:, None] & (d < depth)[None, :]
    here = first.to(tl.int64)
    samples = x, x_coefficients, x_stride, x_row, x_depth, end, depth, read_depth, input_slope
    for t in range(first, tl.minimum(first + split_points, points)):
        total = tl.zeros((COLUMNS, COLUMNS), tl.float32)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            far = row.to(tl.int64)
            g = tl.load(
                grad + here * grad_point + far[None, :] * grad_row + unit[:, None],
                mask=(row < end)[None, :] & (unit < units)[:, None],
                other=0.0,
            )
            x_rows = sample_rows(samples, row, here, X_TERMS)
            value = load_samples(x_rows, samples, row, d, t, INPUT_ACTIVATION, X_TERMS, X_PADDED)
            total = multiply(g, value, total, PRECISION)
        for k in tl.static_range(W_TERMS):
            c = tl.load(w_coefficients + t * W_TERMS + k)
            sums = target + k * out_term
            before = tl.load(sums, mask=where_active(mask, c), other=0.0)
            tl.store(sums, before + c * total, mask=where_active(mask, c))
        here += 1


def through_activation(
    grad: Tensor, y: Tensor, out: Tensor, activation: str, slope: float
) -> Tensor:
    """Writes g = ∂L/∂y · act' of [T, N, units] into out, and returns it.

    Args:
        y: the activation's input or output, as `derivative` takes it.
        out: of rows that may be padded, as `new_rows` gives them.
    """
    points, rows, units = grad.shape
    row_tiles, out_units = triton.cdiv(rows, ROWS), min(padded(units), out.stride(1))
    strides = dict(zip(("grad_point", "grad_row", "grad_unit"), grad.stride()))
    strides |= dict(zip(("y_point", "y_row"), y.stride()))
    strides |= dict(zip(("out_point", "out_row"), out.stride()))
    launch(
        activation_gradient_kernel,
        points * row_tiles * triton.cdiv(out_units, 2 * COLUMNS),
        out,
        grad=grad,
        y=y,
        out=out,
        rows=rows,
        units=units,
        out_units=out_units,
        row_tiles=row_tiles,
        **strides,
        slope=slope,
        ACTIVATION=activation,
        ROWS=ROWS,
        COLUMNS=2 * COLUMNS,
        num_warps=4,
    )
    return out


def add_shared(grad: Tensor, x: Samples, begin: int, total: Tensor, options: Options) -> None:
    """Adds some points' share of the gradient of an input that all points share.

    Args:
        grad: ∂L/∂x [t, N, depth] of the points from `begin` on.
        total: the gradient of the shared values, or of the one input.
    """
    points, rows, depth = grad.shape
    terms = max(x.terms, 1)
    stride, row, column = x.strides()
    coefficients = x.values if x.coefficients is None else x.coefficients[begin:]
    launch(
        shared_gradient_kernel,
        terms * triton.cdiv(rows, ROWS) * triton.cdiv(depth, 2 * COLUMNS),
        total,
        grad=grad,
        x=x.values,
        x_coefficients=coefficients,
        out=total,
        points=points,
        rows=rows,
        depth=depth,
        grad_point=grad.stride(0),
        grad_row=grad.stride(1),
        x_term=stride,
        x_row=row,
        x_depth=column,
        out_term=rows * depth,
        out_row=depth,
        slope=options.input_slope,
        ACTIVATION=options.input_activation,
        TERMS=x.terms,
        ROWS=ROWS,
        COLUMNS=2 * COLUMNS,
        num_warps=4,
    )


def weight_gradient(grad: Tensor, x: Samples, weight: Blended, options: Options) -> Tensor:
    """Computes ∂L/∂W_k [K, units, depth] in float32.

    Args:
        grad: g [T, N, units], of unit stride.
        x: the layer's input.
    """
    points, rows, units = grad.shape
    depth, terms = x.shape[-1], len(weight.tensors)
    tiles = triton.cdiv(units, COLUMNS) * triton.cdiv(depth, COLUMNS)
    # Split by points first, as each split of the rows adds K tiles to memory again for every point.
    splits = triton.cdiv(_PROGRAMS, tiles)
    split_points = triton.cdiv(points, min(points, splits))
    point_splits = triton.cdiv(points, split_points)
    split_rows = padded(triton.cdiv(rows, triton.cdiv(splits, point_splits)), 16 * ROWS)
    row_splits = triton.cdiv(rows, split_rows)
    shape = point_splits * row_splits, terms, units, depth
    parts = torch.zeros(shape, dtype=torch.float32, device=grad.device)
    dot = dot_precision(options.precision)
    launch(
        weight_gradient_kernel,
        tiles * len(parts),
        grad,
        grad=grad,
        w_coefficients=weight.coefficients,
        out=parts,
        **samples_arguments(x),
        points=points,
        units=units,
        grad_point=grad.stride(0),
        grad_row=grad.stride(1),
        split_points=split_points,
        split_rows=split_rows,
        row_splits=row_splits,
        out_split=parts.stride(0),
        out_term=parts.stride(1),
        input_slope=options.input_slope,
        INPUT_ACTIVATION=options.input_activation,
        W_TERMS=terms,
        PRECISION=dot,
        ROWS=product_rows(dot),
        COLUMNS=COLUMNS,
        num_warps=8,
        num_stages=3,
    )
    return parts.sum(0)


def product_rows(precision: str) -> int:
    """Returns the rows of one product of the control points' gradient.

    Half as many for three tf32 products at a time, which need the registers.
    """
    return ROWS // 2 if precision == "tf32x3" else ROWS


def bias_gradient(grad: Tensor, bias: Blended) -> Tensor:
    """Computes ∂L/∂b_k [K, units] in float32."""
    return (bias.coefficients[:, :, None] * grad.sum(1)[:, None]).sum(0)
