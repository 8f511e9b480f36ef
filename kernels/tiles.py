"""Tiles of a linear layer at one point, for several kernels: input, weights and their product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from modeconn.kernels.activations import activate
from modeconn.kernels.arguments import Samples
from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import multiply, padded, tl, triton

# Bytes of a shared input that stay in L2 while the points pass: a third of an A100's 40 MB, so that
# weights and outputs have room beside them.
GROUP_BYTES = 16 << 20


@triton.jit
def where_active(mask, c):
    """Returns where a term is read: nowhere if its coefficient c is 0.

    The coefficient is broadcast, as the interpreter does not broadcast truth values.
    """
    return mask & (tl.broadcast_to(c, mask.shape) != 0)


@triton.jit
def blend(pointers, coefficients, term_stride, mask, TERMS: tl.constexpr):
    """Computes Σ_j c_j v_j of a block in float32; a term whose coefficient is 0 is not read."""
    c = tl.load(coefficients)
    total = c * tl.load(pointers, mask=where_active(mask, c), other=0.0).to(tl.float32)
    for j in tl.static_range(1, TERMS):
        pointers += term_stride
        c = tl.load(coefficients + j)
        total += c * tl.load(pointers, mask=where_active(mask, c), other=0.0).to(tl.float32)
    return total


@triton.jit
def tile_of_program(points, rows, unit_tiles, group_rows, BLOCK_M: tl.constexpr):
    """Returns the point, row tile and unit tile of a program.

    Programs are ordered by (group of rows, point, row tile, unit tile), the last fastest.
    """
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
    x, samples, row, k, t, ACTIVATION: tl.constexpr, TERMS: tl.constexpr, PADDED: tl.constexpr
):
    """Loads a tile [rows, k] of the input; what is read beyond its depth becomes 0.

    Args:
        x: pointers to the rows at point t (`sample_rows`).
        samples: (x, x_coefficients, x_stride, x_row, x_depth, rows, depth, read_depth, slope) as
            the kernels take them (`samples_arguments`).
    """
    _, coefficients, term_stride, _, x_depth, rows, depth, read_depth, slope = samples
    mask = (row < rows)[:, None] & (k < read_depth)[None, :]
    pointers = x + k[None, :] * x_depth
    if TERMS > 0:
        value = blend(pointers, coefficients + t * TERMS, term_stride, mask, TERMS)
        value = activate(value, ACTIVATION, slope)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    if PADDED:
        value = tl.where((k < depth)[None, :], value, 0.0)
    return value


@triton.jit
def sample_rows(samples, row, t, TERMS: tl.constexpr):
    """Pointers [rows, 1] to the first value of each row of the input at point t."""
    x, _, stride, row_stride, _, _, _, _, _ = samples
    rows = x + row.to(tl.int64)[:, None] * row_stride
    if TERMS == 0:
        rows += tl.cast(t, tl.int64) * stride
    return rows


@triton.jit
def load_weight(
    w, coefficients, term_stride, w_depth, unit, k, t, units, depth, TERMS: tl.constexpr
):
    """Loads a tile [k, units] of W(t)ᵀ; `w` points at its rows."""
    mask = (k < depth)[:, None] & (unit < units)[None, :]
    pointers = w + k[:, None] * w_depth
    if TERMS > 0:
        value = blend(pointers, coefficients + t * TERMS, term_stride, mask, TERMS)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    return value


@triton.jit
def linear_tile(
    samples,
    weight,
    bias,
    row,
    unit,
    t,
    INPUT_ACTIVATION: tl.constexpr,
    X_TERMS: tl.constexpr,
    X_PADDED: tl.constexpr,
    W_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes a tile [rows, units] of x W(t)ᵀ + b(t) in float32.

    Values travel in tuples, as Triton inlines the call: the generated code is that of single ones.

    Args:
        samples: see `load_samples`; x_stride is that of the points, or of the terms if there are
            any.
        weight: (w, w_coefficients, w_stride, w_unit, w_depth, units), w_stride likewise.
        bias: (bias, bias_coefficients, b_term, b_unit).
    """
    w, w_coefficients, w_stride, w_unit, w_depth, units = weight
    x_rows = sample_rows(samples, row, t, X_TERMS)
    w_rows = w + unit.to(tl.int64)[None, :] * w_unit
    if W_TERMS == 0:
        w_rows += t.to(tl.int64) * w_stride
    total = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for start in range(0, samples[6], BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = load_samples(x_rows, samples, row, k, t, INPUT_ACTIVATION, X_TERMS, X_PADDED)
        b = load_weight(
            w_rows, w_coefficients, w_stride, w_depth, unit, k, t, units, samples[7], W_TERMS
        )
        total = multiply(a, b, total, PRECISION)
    if B_TERMS > 0:
        b, b_coefficients, b_term, b_unit = bias
        values = blend(
            b + unit * b_unit, b_coefficients + t * B_TERMS, b_term, unit < units, B_TERMS
        )
        total += values[None, :]
    return total


def aligned(x: Samples) -> Samples:
    """Returns an input whose rows start on multiples of 16 values, by a copy if need be.

    Only an input that all points share is copied: that costs little next to T passes over it.
    """
    if x.per_point or (x.values.stride(-1) == 1 and _readable(x.values, padded(x.shape[-1]))):
        return x
    depth = x.shape[-1]
    return replace(x, values=F.pad(x.values, (0, padded(depth) - depth)).contiguous()[..., :depth])


def samples_arguments(x: Samples, begin: int = 0) -> dict[str, Any]:
    """Returns the arguments of `linear_tile` for an input [N, depth], from a point on.

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
    """Returns how many rows of a shared input stay in L2 while all points pass.

    Where every point has its own input, nothing is to stay, and all rows are one group.
    """
    if x.per_point:
        return max(1, x.shape[0])
    bytes_per_row = max(1, x.shape[-1]) * max(1, x.terms) * x.values.element_size()
    return max(128, GROUP_BYTES // bytes_per_row)


def bias_arguments(bias: Blended | None, weight: Blended, begin: int = 0) -> dict[str, Any]:
    """Returns the arguments of `linear_tile` for a bias [units], or for none."""
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
    """Returns the arguments of `linear_tile` for weights that are blended in the prologue.

    Rows are padded to multiples of 16 values with zeros.
    """
    tensors = weight.tensors
    if tensors.stride(2) != 1 or not (tensors.shape[2] % 16 == 0 and tensors.stride(1) % 16 == 0):
        tensors = F.pad(tensors, (0, padded(tensors.shape[2]) - tensors.shape[2])).contiguous()
    return {
        **_strides(tensors),
        "w_coefficients": weight.coefficients[begin:],
        "W_TERMS": len(tensors),
    }


def materialized_arguments(weights: Tensor) -> dict[str, Any]:
    """Returns the arguments of `linear_tile` for weights [t, units, depth padded to 16]."""
    return {**_strides(weights), "w_coefficients": weights, "W_TERMS": 0}


def _strides(w: Tensor) -> dict[str, Any]:
    return {"w": w, "w_stride": w.stride(0), "w_unit": w.stride(1), "w_depth": w.stride(2)}


def _readable(values: Tensor, width: int) -> bool:
    """Whether rows start on multiples of 16 values, and memory goes on to this width in each.

    The width may be beyond the view: values of the storage are then read and masked out.
    """
    if any(stride % 16 for stride in values.stride()[:-1]) or values.data_ptr() % 16:
        return False
    last = sum((size - 1) * stride for size, stride in zip(values.shape[:-1], values.stride()[:-1]))
    return (
        values.storage_offset() + last + width
        <= values.untyped_storage().nbytes() // values.element_size()
    )
