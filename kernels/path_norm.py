"""Layer norm and RMS norm over the last axis at every point of a path.

    layer norm   y = (x − mean) / √(var + eps) · w(t) + b(t)     mean and biased variance of a row
    RMS norm     y = x / √(mean of x² + eps) · w(t)

Floor: some ten operations and 8 bytes a value, 4 of them written. Prediction: bound by memory on
any GPU; 6·10¹¹ values a second at an H200's 4.8 TB/s. Weights are vectors, [T, width], materialized
beforehand: the values are N times as many.

A program normalises a block of whole rows of one point; a row longer than a block goes by in pieces
and is read a second time, from the caches. The mean is two floats, so that one far from zero costs
no digits. The programs of all points of a block of rows follow each other, so that rows that the
points share come from memory once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.kernels.arguments import check_blended, check_same_device, samples_of
from modeconn.kernels.blended import Blended
from modeconn.kernels.forward_only import refuse_gradients
from modeconn.kernels.launch import launch, tl, triton

# Elements of a block of rows, and the longest piece of a row: 32 a thread at four warps, which the
# registers hold along with weight and bias.
ELEMENTS = 4096


@triton.jit
def row_norm_kernel(
    x,
    weight,
    bias,
    out,
    points,
    rows,
    width,
    x_stride,
    eps,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = (tl.program_id(0) % points).to(tl.int64)
    row = (tl.program_id(0) // points).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = x + t * x_stride + row * width
    mean = tl.zeros((BLOCK_M,), tl.float64)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        value = tl.load(source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            count = tl.minimum(width - start, BLOCK_N).to(tl.float32)
            middle = tl.sum(value, 1) / count
            off = tl.where(inside, value - middle[:, None], 0.0)
            rest = tl.sum(off, 1) / count  # what rounding has left out of `middle`
            off = tl.where(inside, off - rest[:, None], 0.0)
            delta = middle.to(tl.float64) + rest.to(tl.float64) - mean
            mean += delta * (count / (start + count))
            delta_32 = delta.to(tl.float32)
            squares += tl.sum(off * off, 1) + delta_32 * delta_32 * (
                count * start / (start + count)
            )
        else:
            squares += tl.sum(value * value, 1)
    spread = 1.0 / tl.sqrt(squares / width + eps)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        value = tl.load(source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = ((value - high[:, None]) - low[:, None]) * spread[:, None]
        if HAS_WEIGHT:
            value *= tl.load(weight + t * width + column, mask=column < width, other=0.0)[None, :]
        if HAS_BIAS:
            value += tl.load(bias + t * width + column, mask=column < width, other=0.0)[None, :]
        target = out + (t * rows + row)[:, None] * width + column[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def _row_norm(
    op: str, x: Tensor, given: dict[str, Blended | None], eps: float, shared: bool
) -> Tensor:
    samples_of("x", x, x.dim())
    moving = [blended for blended in given.values() if blended is not None]
    if x.dim() < (1 if shared else 2) or (shared and not moving):
        raise ModeconnError(
            f"{op}: x has shape {list(x.shape)} and shared is {shared}: expected [T, …, width], "
            "or if shared [N, …, width] and a weight or bias that says T"
        )
    points = moving[0].points if shared else len(x)
    width = x.shape[-1]
    weight, bias = _vectors(op, given, points, x)
    shape = x.shape if shared else x.shape[1:]
    out = torch.empty((points, *shape), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    rows = out.numel() // points // width
    piece = min(ELEMENTS, triton.next_power_of_2(width))
    block = ELEMENTS // piece
    launch(
        row_norm_kernel,
        points * triton.cdiv(rows, block),
        out,
        x=x,
        weight=out if weight is None else weight,  # any pointer will do for what is not read
        bias=out if bias is None else bias,
        out=out,
        points=points,
        rows=rows,
        width=width,
        x_stride=0 if shared else x.stride(0),
        eps=eps,
        CENTRED=op == "path_layer_norm",
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_M=block,
        BLOCK_N=piece,
    )
    return out


def _vectors(
    op: str, given: dict[str, Blended | None], points: int, x: Tensor
) -> list[Tensor | None]:
    """Checks weight and bias and returns them at all points, float32 [T, width]."""
    width = (x.shape[-1],)
    checked = {
        name: None if b is None else check_blended(name, b, width, points)
        for name, b in given.items()
    }
    tensors = {name: None if b is None else b.tensors for name, b in checked.items()}
    check_same_device(x=x, **tensors)
    refuse_gradients(op, x=x, **tensors)
    return [
        None if b is None else Blended(b.tensors.float(), b.coefficients).materialized()
        for b in checked.values()
    ]


def path_layer_norm(
    x: Tensor,
    weight: Blended | None,
    bias: Blended | None = None,
    eps: float = 1e-5,
    *,
    shared: bool = False,
) -> Tensor:
    """Normalises the last axis to mean 0 and variance 1 at T points.

    Args:
        x: [T, …, width], or [N, …, width] if `shared`: the same at all points.
        weight, bias: [K, width] with their coefficients [T, K], or None.

    Returns:
        [T, …, width], contiguous, of x's dtype.

    Raises:
        ModeconnError: shapes, dtypes or devices that do not fit, or a tensor that needs a gradient.
    """
    return _row_norm("path_layer_norm", x, {"weight": weight, "bias": bias}, eps, shared)


def path_rms_norm(
    x: Tensor, weight: Blended | None, eps: float = 1e-6, *, shared: bool = False
) -> Tensor:
    """Divides the last axis by its root mean square at T points.

    Args:
        x: [T, …, width], or [N, …, width] if `shared`: the same at all points.
        weight: [K, width] with its coefficients [T, K], or None.

    Returns:
        [T, …, width], contiguous, of x's dtype.

    Raises:
        ModeconnError: shapes, dtypes or devices that do not fit, or a tensor that needs a gradient.
    """
    return _row_norm("path_rms_norm", x, {"weight": weight, "bias": None}, eps, shared)


def path_layer_norm_reference(
    x: Tensor,
    weight: Blended | None,
    bias: Blended | None = None,
    eps: float = 1e-5,
    *,
    shared: bool = False,
) -> Tensor:
    """Computes `path_layer_norm` in plain PyTorch, in any dtype and differentiable."""
    parts = _at_points(x, weight, bias, shared)
    return torch.stack([F.layer_norm(v, v.shape[-1:], w, b, eps) for v, w, b in parts])


def path_rms_norm_reference(
    x: Tensor, weight: Blended | None, eps: float = 1e-6, *, shared: bool = False
) -> Tensor:
    """Computes `path_rms_norm` in plain PyTorch, in any dtype and differentiable."""
    parts = _at_points(x, weight, None, shared)
    return torch.stack([F.rms_norm(v, v.shape[-1:], w, eps) for v, w, _ in parts])


def _at_points(
    x: Tensor, weight: Blended | None, bias: Blended | None, shared: bool
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Returns x, weight and bias of each point."""
    points = next(b.points for b in (weight, bias) if b is not None) if shared else len(x)
    weights, biases = ([None] * points if b is None else b.materialized() for b in (weight, bias))
    return list(zip(x.expand(points, *x.shape) if shared else x, weights, biases))
