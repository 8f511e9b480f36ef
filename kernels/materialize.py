"""Materializes the weights of some points: out[t, u, d] = Σ_k c[t, k] W[k, u, d].

The padding is zeros. Floor: 4 units·depth bytes written per point; the K control points are read
from L2. Programs of one tile at successive points follow each other, so that the control points'
tile stays there. A tile that is written transposed is turned on the way. The reference is
`Blended.materialized`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import launch, padded, tl, triton
from modeconn.kernels.tiles import blend

# Values of a tile in each direction: 32 a thread at four warps.
BLOCK = 64


@triton.jit
def materialize_kernel(
    tensors,
    coefficients,
    out,
    points,
    units,
    depth,
    out_units,
    out_depth,
    term_stride,
    unit_stride,
    depth_stride,
    out_point_stride,
    out_unit_stride,
    out_depth_stride,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    t = pid % points
    depth_tiles = tl.cdiv(out_depth, BLOCK)
    u = (pid // points // depth_tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    d = (pid // points % depth_tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    source = tensors + u * unit_stride + d * depth_stride
    value = blend(source, coefficients + t * TERMS, term_stride, (u < units) & (d < depth), TERMS)
    target = out + t.to(tl.int64) * out_point_stride + u * out_unit_stride + d * out_depth_stride
    tl.store(target, value.to(out.dtype.element_ty), mask=(u < out_units) & (d < out_depth))


def materialize(blended: Blended, points: slice, out: Tensor) -> None:
    """Writes the matrices of some points into out [t, ≥ units, ≥ depth], and zeros beyond them.

    Args:
        out: of any strides.
    """
    tensors, coefficients = blended.tensors, blended.coefficients[points]
    count, out_units, out_depth = out.shape
    if out.numel() == 0:
        return
    units, depth = blended.shape
    strides = dict(zip(("term_stride", "unit_stride", "depth_stride"), tensors.stride()))
    strides |= dict(zip(("out_point_stride", "out_unit_stride", "out_depth_stride"), out.stride()))
    programs = count * triton.cdiv(out_units, BLOCK) * triton.cdiv(out_depth, BLOCK)
    launch(
        materialize_kernel,
        programs,
        out,
        tensors=tensors,
        coefficients=coefficients,
        out=out,
        points=count,
        units=units,
        depth=depth,
        out_units=out_units,
        out_depth=out_depth,
        **strides,
        TERMS=coefficients.shape[1],
        BLOCK=BLOCK,
        num_warps=4,
    )


def materialized(
    blended: Blended, points: slice, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    """Returns the matrices of some points, [t, units, depth padded to 16].

    Args:
        transposed: whether to return [t, depth, units padded to 16].
    """
    units, depth = blended.shape[::-1] if transposed else blended.shape
    shape = points.stop - points.start, units, padded(depth)
    out = torch.empty(shape, dtype=dtype, device=blended.tensors.device)
    materialize(blended, points, out.transpose(1, 2) if transposed else out)
    return out
