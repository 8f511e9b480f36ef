"""Weights of some points, formed once: out[t, u, d] = Σ_k c[t, k] W[k, u, d], with zeros in the padding.

Floor: 4 units·depth bytes written per point; the K control points are read from L2. Programs of one
tile at successive points follow each other, so that the control points' tile stays there. A tile
that is written transposed is turned on the way. The reference is `Blended.formed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import AotCase, launch, padded, tl, triton
from modeconn.kernels.tiles import blend

_BLOCK = 64


@triton.jit
def _form_kernel(
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


def form(blended: Blended, points: slice, out: Tensor) -> None:
    """Write the matrices of some points into out [t, ≥ units, ≥ depth], of any strides, and zeros beyond them."""
    tensors, coefficients = blended.tensors, blended.coefficients[points]
    count, out_units, out_depth = out.shape
    if out.numel() == 0:
        return
    strides = dict(zip(("term_stride", "unit_stride", "depth_stride"), tensors.stride()))
    strides |= dict(zip(("out_point_stride", "out_unit_stride", "out_depth_stride"), out.stride()))
    sizes = {
        "points": count,
        **dict(zip(("units", "depth"), blended.shape)),
        "out_units": out_units,
        "out_depth": out_depth,
    }
    programs = count * triton.cdiv(out_units, _BLOCK) * triton.cdiv(out_depth, _BLOCK)
    launch(
        _form_kernel,
        programs,
        out,
        tensors=tensors,
        coefficients=coefficients,
        out=out,
        **sizes,
        **strides,
        TERMS=coefficients.shape[1],
        BLOCK=_BLOCK,
        num_warps=4,
    )


def formed(blended: Blended, points: slice, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The matrices of some points, [t, units, depth padded to 16], or transposed [t, depth, units padded to 16]."""
    units, depth = blended.shape
    if transposed:
        units, depth = depth, units
    out = torch.empty(
        (points.stop - points.start, units, padded(depth)),
        dtype=dtype,
        device=blended.tensors.device,
    )
    form(blended, points, out.transpose(1, 2) if transposed else out)
    return out


def aot_cases() -> list[AotCase]:
    """A line between two networks, written straight and transposed."""
    signature = dict.fromkeys(("tensors", "coefficients", "out"), "*fp32:16")
    signature |= dict.fromkeys(("points", "units", "depth", "term_stride", "unit_stride"), "i32")
    straight = {
        "out_units": "i32",
        "out_depth": "i32:16",
        "out_point_stride": "i32:16",
        "out_unit_stride": "i32:16",
    }
    turned = {
        "out_units": "i32:16",
        "out_depth": "i32",
        "out_point_stride": "i32:16",
        "out_depth_stride": "i32:16",
    }
    constants = {"depth_stride": 1, "TERMS": 2, "BLOCK": _BLOCK}
    return [
        AotCase(
            "form",
            _form_kernel,
            signature | straight,
            constants | {"out_depth_stride": 1},
            4,
            3,
            False,
        ),
        AotCase(
            "form transposed",
            _form_kernel,
            signature | turned,
            constants | {"out_unit_stride": 1},
            4,
            3,
            False,
        ),
    ]
