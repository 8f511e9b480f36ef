"""Gradients of a linear layer at many points, from g[t, n] = ∂L/∂(x W(t)ᵀ + b(t)); the one of x[t] is the product g[t] W(t).

    through the activation   g = ∂L/∂y · act'(u)
    shared values            ∂L/∂v_j = Σ_t c[t, j] act'(Σ_i c[t, i] v_i) ∂L/∂x[t]
    control points           ∂L/∂W_k = Σ_t c[t, k] g[t]ᵀ x[t];   ∂L/∂b_k = Σ_t c[t, k] Σ_n g[t, n]

A program owns a tile of ∂L/∂W_k for all k and some of the points: it adds each point's product
g[t]ᵀ x[t], in registers over the rows, to K tiles in L2. So there are no T gradients in memory,
only as many partial sums as it takes programs to fill the device, and those are added in order: the
same bits every time. Floor of the control points' gradient: 2 T N depth units operations; g and x
read once per 64 columns of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeconn.kernels.activations import derivative
from modeconn.kernels.arguments import Samples
from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import (
    INTERPRETED,
    PRECISIONS,
    AotCase,
    dot_precision,
    launch,
    multiply,
    padded,
    tl,
    triton,
)
from modeconn.kernels.tiles import blend, load_samples, samples_arguments, where_active

# Programs that fill a device of 132 multiprocessors twice. A constant, so that sums do not depend
# on the device.
_PROGRAMS = 4 if INTERPRETED else 264
_ROWS, _COLUMNS = 32, 64


@triton.jit
def _activation_kernel(
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
def _shared_kernel(
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
def _weight_kernel(
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
            x_rows = x + far[:, None] * x_row
            if X_TERMS == 0:
                x_rows += here * x_stride
            value = load_samples(
                x_rows,
                x_coefficients,
                x_stride,
                x_depth,
                row,
                d,
                t,
                end,
                depth,
                read_depth,
                INPUT_ACTIVATION,
                input_slope,
                X_TERMS,
                X_PADDED,
            )
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
    """Write g of [T, N, units] into out, of padded rows; y is what `derivative` takes."""
    points, rows, units = grad.shape
    row_tiles, out_units = triton.cdiv(rows, _ROWS), min(padded(units), out.stride(1))
    strides = dict(zip(("grad_point", "grad_row", "grad_unit"), grad.stride()))
    strides |= {
        "y_point": y.stride(0),
        "y_row": y.stride(1),
        "out_point": out.stride(0),
        "out_row": out.stride(1),
    }
    launch(
        _activation_kernel,
        points * row_tiles * triton.cdiv(out_units, 2 * _COLUMNS),
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
        ROWS=_ROWS,
        COLUMNS=2 * _COLUMNS,
        num_warps=4,
    )
    return out


def add_shared(
    grad: Tensor, x: Samples, begin: int, total: Tensor, activation: str, slope: float
) -> None:
    """Add what some points' ∂L/∂x [t, N, depth], the first being `begin`, give to the shared values' gradient."""
    points, rows, depth = grad.shape
    terms = max(x.terms, 1)
    stride, row, column = x.strides()
    coefficients = x.values if x.coefficients is None else x.coefficients[begin:]
    launch(
        _shared_kernel,
        terms * triton.cdiv(rows, _ROWS) * triton.cdiv(depth, 2 * _COLUMNS),
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
        slope=slope,
        ACTIVATION=activation,
        TERMS=x.terms,
        ROWS=_ROWS,
        COLUMNS=2 * _COLUMNS,
        num_warps=4,
    )


def weight_gradient(
    grad: Tensor, x: Samples, weight: Blended, precision: str, activation: str, slope: float
) -> Tensor:
    """∂L/∂W_k [K, units, depth] in float32, from g [T, N, units] of unit stride and the layer's input."""
    points, rows, units = grad.shape
    depth, terms = x.shape[-1], len(weight.tensors)
    tiles = triton.cdiv(units, _COLUMNS) * triton.cdiv(depth, _COLUMNS)
    wanted = triton.cdiv(_PROGRAMS, tiles)
    split_points = triton.cdiv(points, min(points, wanted))
    point_splits = triton.cdiv(points, split_points)
    split_rows = padded(triton.cdiv(rows, triton.cdiv(wanted, point_splits)), 16 * _ROWS)
    row_splits = triton.cdiv(rows, split_rows)
    parts = torch.zeros(
        (point_splits * row_splits, terms, units, depth), dtype=torch.float32, device=grad.device
    )
    splits: dict[str, Any] = {
        "split_points": split_points,
        "split_rows": split_rows,
        "row_splits": row_splits,
    }
    launch(
        _weight_kernel,
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
        **splits,
        out_split=parts.stride(0),
        out_term=parts.stride(1),
        input_slope=slope,
        INPUT_ACTIVATION=activation,
        W_TERMS=terms,
        PRECISION=dot_precision(precision),
        ROWS=_rows(dot_precision(precision)),
        COLUMNS=_COLUMNS,
        num_warps=8,
        num_stages=3,
    )
    return parts.sum(0)


def _rows(precision: str) -> int:
    """Rows of one product of the control points' gradient: three products at a time need the registers."""
    return _ROWS // 2 if precision == "tf32x3" else _ROWS


def bias_gradient(grad: Tensor, bias: Blended) -> Tensor:
    """∂L/∂b_k [K, units] in float32."""
    return (bias.coefficients[:, :, None] * grad.sum(1)[:, None]).sum(0)


def aot_cases() -> list[AotCase]:
    """The control points' gradient of a layer 245 → 245 of a line, and the two steps around it."""
    pointers, numbers = (
        ("grad", "out", "w_coefficients", "x", "x_coefficients"),
        ("points", "rows", "units", "depth"),
    )
    common = dict.fromkeys(pointers, "*fp32:16") | dict.fromkeys(numbers, "i32")
    common |= dict.fromkeys(
        ("x_stride", "x_row", "read_depth", "grad_point", "grad_row", "split_rows"), "i32:16"
    )
    common |= dict.fromkeys(("split_points", "row_splits", "out_split", "out_term"), "i32") | {
        "input_slope": "fp32"
    }
    constants = {
        "x_depth": 1,
        "W_TERMS": 2,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "INPUT_ACTIVATION": "relu",
        "X_PADDED": True,
    }
    cases = []
    for precision in PRECISIONS.values():
        for terms in (0, 2):
            name = f"weight gradient {precision}{' of a combined x' if terms else ''}"
            how = {**constants, "PRECISION": precision, "X_TERMS": terms, "ROWS": _rows(precision)}
            cases.append(AotCase(name, _weight_kernel, common, how, 8, 3, precision != "ieee"))
    rows = dict.fromkeys(("grad", "y", "out"), "*fp32:16") | dict.fromkeys(
        ("rows", "units", "row_tiles"), "i32"
    )
    rows |= dict.fromkeys(
        ("grad_point", "grad_row", "y_point", "y_row", "out_point", "out_row", "out_units"),
        "i32:16",
    )
    block = {"ROWS": _ROWS, "COLUMNS": 2 * _COLUMNS}
    how = {"ACTIVATION": "gelu", "grad_unit": 1, **block}
    cases.append(
        AotCase(
            "activation gradient", _activation_kernel, rows | {"slope": "fp32"}, how, 4, 3, False
        )
    )
    rows = dict.fromkeys(("grad", "x", "x_coefficients", "out"), "*fp32:16") | dict.fromkeys(
        ("points", "rows", "depth"), "i32"
    )
    rows |= dict.fromkeys(("grad_point", "grad_row", "x_term", "x_row"), "i32:16") | {
        "out_term": "i32",
        "out_row": "i32",
    }
    how = {"ACTIVATION": "gelu", "TERMS": 2, "x_depth": 1, **block}
    return [
        *cases,
        AotCase(
            "shared values' gradient", _shared_kernel, rows | {"slope": "fp32"}, how, 4, 3, False
        ),
    ]
