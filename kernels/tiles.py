"""Tiles of a linear layer at one point: its input, its weights and their product, as several kernels need them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from modeconn.kernels.activations import activate
from modeconn.kernels.arguments import Samples
from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import multiply, padded, tl, triton

# Bytes of a shared input that stay in L2 while the points pass.
GROUP_BYTES = 16 << 20


@triton.jit
def where_active(mask, c):
    """Where a term is read: nowhere if its coefficient c is 0. (The interpreter spreads numbers, but no truth values.)"""
    return mask & (tl.broadcast_to(c, mask.shape) != 0)


@triton.jit
def blend(pointers, coefficients, term_stride, mask, TERMS: tl.constexpr):
    """Σ_j c_j v_j in float32 of a block; a term whose coefficient is 0 is not read."""
    c = tl.load(coefficients)
    total = c * tl.load(pointers, mask=where_active(mask, c), other=0.0).to(tl.float32)
    for j in tl.static_range(1, TERMS):
        pointers += term_stride
        c = tl.load(coefficients + j)
        total += c * tl.load(pointers, mask=where_active(mask, c), other=0.0).to(tl.float32)
    return total


@triton.jit
def tile_of_program(points, rows, unit_tiles, group_rows, BLOCK_M: tl.constexpr):
    """Which point, row tile and unit tile a program makes: by groups of rows, points, row tiles, unit tiles, these fastest."""
    pid = tl.program_id(0)
    group = tl.cdiv(group_rows, BLOCK_M)
    first = pid // (group * points * unit_tiles) * group
    left = pid % (group * points * unit_tiles)
    per_point = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, group) * unit_tiles
    t = left // per_point
    left = left % per_point
    return t, first + left // unit_tiles, left % unit_tiles


@triton.jit
def load_samples(
    x,
    x_coefficients,
    x_term,
    x_depth,
    row,
    k,
    t,
    rows,
    depth,
    read_depth,
    ACTIVATION: tl.constexpr,
    slope,
    TERMS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A tile [rows, k] of x; `x` points at its rows. What is read beyond the depth becomes 0."""
    mask = (row < rows)[:, None] & (k < read_depth)[None, :]
    pointers = x + k[None, :] * x_depth
    if TERMS > 0:
        value = activate(
            blend(pointers, x_coefficients + t * TERMS, x_term, mask, TERMS), ACTIVATION, slope
        )
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    if PADDED:
        value = tl.where((k < depth)[None, :], value, 0.0)
    return value


@triton.jit
def load_weight(
    w, w_coefficients, w_term, w_depth, unit, k, t, units, read_depth, TERMS: tl.constexpr
):
    """A tile [k, units] of W(t)ᵀ; `w` points at its rows."""
    mask = (k < read_depth)[:, None] & (unit < units)[None, :]
    pointers = w + k[:, None] * w_depth
    if TERMS > 0:
        value = blend(pointers, w_coefficients + t * TERMS, w_term, mask, TERMS)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    return value


@triton.jit
def linear_tile(
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
    row,
    unit,
    t,
    rows,
    units,
    depth,
    read_depth,
    input_slope,
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
    """A tile [rows, units] of x W(t)ᵀ + b(t) in float32. Strides: x_stride of the points, or of the terms if there are any."""
    x_rows = x + row.to(tl.int64)[:, None] * x_row
    if X_TERMS == 0:
        x_rows += t.to(tl.int64) * x_stride
    w_rows = w + unit.to(tl.int64)[None, :] * w_unit
    if W_TERMS == 0:
        w_rows += t.to(tl.int64) * w_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = load_samples(
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
        b = load_weight(
            w_rows, w_coefficients, w_stride, w_depth, unit, k, t, units, read_depth, W_TERMS
        )
        total = multiply(a, b, total, PRECISION)
    if B_TERMS > 0:
        pointers = bias + unit * b_unit
        total += blend(pointers, bias_coefficients + t * B_TERMS, b_term, unit < units, B_TERMS)[
            None, :
        ]
    return total


def aligned(x: Samples) -> Samples:
    """The same with rows that start on multiples of 16 values, where all points share it: the copy costs little then."""
    if x.per_point or (x.values.stride(-1) == 1 and _readable(x.values, padded(x.shape[-1]))):
        return x
    depth = x.shape[-1]
    return replace(x, values=F.pad(x.values, (0, padded(depth) - depth)).contiguous()[..., :depth])


def samples_arguments(x: Samples, begin: int = 0) -> dict[str, Any]:
    """An input [N, depth] as `linear_tile` takes it, from a point on.

    Rows are read up to a multiple of 16 values, which copies 16 bytes at a time, where memory does
    not end before.
    """
    depth = x.shape[-1]
    read = padded(depth)
    if x.values.stride(-1) != 1 or not _readable(x.values, read):
        read = depth
    stride, row, column = x.strides()
    return {
        "x": x.values[begin:] if x.per_point else x.values,
        "x_coefficients": x.values if x.coefficients is None else x.coefficients[begin:],
        "x_stride": stride,
        "x_row": row,
        "x_depth": column,
        "X_TERMS": x.terms,
        "rows": x.shape[0],
        "depth": depth,
        "read_depth": read,
        "X_PADDED": read > depth,
    }


def rows_of_a_group(x: Samples) -> int:
    """Rows of a shared input that stay in L2 while all points pass; all rows where every point has its own."""
    if x.per_point:
        return max(1, x.shape[0])
    bytes_per_row = max(1, x.shape[-1]) * max(1, x.terms) * x.values.element_size()
    return max(128, GROUP_BYTES // bytes_per_row)


def bias_arguments(bias: Blended | None, weight: Blended, begin: int = 0) -> dict[str, Any]:
    """A bias [units], or none, as `linear_tile` takes it."""
    if bias is None:
        return {
            "bias": weight.tensors,
            "bias_coefficients": weight.coefficients,
            "b_term": 0,
            "b_unit": 0,
            "B_TERMS": 0,
        }
    return {
        "bias": bias.tensors,
        "bias_coefficients": bias.coefficients[begin:],
        "b_term": bias.tensors.stride(0),
        "b_unit": bias.tensors.stride(1),
        "B_TERMS": len(bias.tensors),
    }


def blended_arguments(weight: Blended, begin: int = 0) -> dict[str, Any]:
    """Weights that are blended in the prologue, as `linear_tile` takes them; rows padded to 16 with zeros."""
    tensors = weight.tensors
    if tensors.stride(2) != 1 or not (tensors.shape[2] % 16 == 0 and tensors.stride(1) % 16 == 0):
        tensors = F.pad(tensors, (0, padded(tensors.shape[2]) - tensors.shape[2])).contiguous()
    return {
        **_strides(tensors),
        "w_coefficients": weight.coefficients[begin:],
        "W_TERMS": len(tensors),
    }


def formed_arguments(weights: Tensor) -> dict[str, Any]:
    """Weights [t, units, depth padded to 16] that were formed, as `linear_tile` takes them."""
    return {**_strides(weights), "w_coefficients": weights, "W_TERMS": 0}


def _strides(w: Tensor) -> dict[str, Any]:
    return {"w": w, "w_stride": w.stride(0), "w_unit": w.stride(1), "w_depth": w.stride(2)}


def _readable(values: Tensor, width: int) -> bool:
    """Whether rows start on multiples of 16 values and may be read to this width, which may be beyond the view."""
    if any(stride % 16 for stride in values.stride()[:-1]) or values.data_ptr() % 16:
        return False
    last = sum((size - 1) * stride for size, stride in zip(values.shape[:-1], values.stride()[:-1]))
    return (
        values.storage_offset() + last + width
        <= values.untyped_storage().nbytes() // values.element_size()
    )


def aot_arguments(precision: str, blends: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """The signature and constants that `linear_tile` stands for: padded rows, two terms each where something is blended."""
    weights = "*bf16:16" if precision == "bf16" and not blends else "*fp32:16"
    signature = {
        "x": "*fp32:16",
        "x_coefficients": "*fp32:16",
        "w": weights,
        "w_coefficients": "*fp32:16",
    }
    signature |= {
        "bias": "*fp32:16",
        "bias_coefficients": "*fp32:16",
        "b_term": "i32",
        "depth": "i32",
        "input_slope": "fp32",
    }
    signature |= dict.fromkeys(("x_stride", "x_row", "w_stride", "w_unit", "read_depth"), "i32:16")
    constants: dict[str, Any] = {
        "x_depth": 1,
        "w_depth": 1,
        "b_unit": 1,
        "B_TERMS": 2,
        "X_PADDED": True,
        "BLOCK_K": 32,
    }
    constants |= {"X_TERMS": 2 * blends, "W_TERMS": 2 * blends, "PRECISION": precision}
    return signature, constants | {"INPUT_ACTIVATION": "relu" if blends else "identity"}
