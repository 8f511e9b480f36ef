"""Pooling of images at every point of a path.

    out[t, n, c, i, j] = max or mean over (di, dj) of x[t, n, c, i·sh − ph + di, j·sw − pw + dj]

Floor: every value is read once and every output written once, 4·(H·W + H'·W') bytes per channel of
an image; one comparison or addition per tap. Windows that overlap meet in the caches. Prediction:
bound by memory on any GPU; at an H200's 4.8 TB/s a 2×2 pooling takes in 10¹² values a second.

A program takes a block of output pixels, of any images and points, by a block of channels, which
lie side by side. Padding never is the maximum and counts in the mean; NaN always is the maximum
(PyTorch's defaults).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.kernels.arguments import check_same_device, samples_of
from modeconn.kernels.forward_only import refuse_gradients
from modeconn.kernels.images import Pair, channels_first, channels_last, checked_pair, outputs_of
from modeconn.kernels.launch import launch, tl, triton

KINDS = ("max", "avg")
# Elements of a block, 16 a thread at four warps, and the most channels in it, 256 bytes side by
# side.
ELEMENTS = 2048
CHANNELS = 64


@triton.jit
def pool2d_kernel(
    x,
    out,
    pixels,
    height,
    width,
    out_height,
    out_width,
    channels,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image = pixel // (out_height * out_width)
    place = (pixel - image * (out_height * out_width)).to(tl.int32)
    top = place // out_width * SH - PH
    left = place % out_width * SW - PW
    exists = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    source = x + image * height * width * channels
    total = tl.full((BLOCK_P, BLOCK_C), float("-inf") if MAX else 0.0, tl.float32)
    for di in range(KH):
        for dj in tl.static_range(KW):
            inside = (top + di >= 0) & (top + di < height) & (left + dj >= 0) & (left + dj < width)
            address = source + ((top + di) * width + left + dj) * channels
            value = tl.load(
                address[:, None] + channel[None, :],
                mask=exists & inside[:, None],
                other=float("-inf") if MAX else 0.0,
            )
            value = value.to(tl.float32)
            if MAX:
                total = tl.where((value > total) | (value != value), value, total)
            else:
                total += value
    if not MAX:
        total = total / (KH * KW)
    tl.store(
        out + pixel[:, None] * channels + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=exists,
    )


def path_pool2d(x: Tensor, kind: str, kernel: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """Pools the images of all points.

    Args:
        x: [T, N, C, H, W]; channels last in memory saves a copy.
        kind: "max" or "avg".
        kernel, stride: height and width, at least 1.
        padding: above and on the left as well as below and on the right; at most half the kernel.

    Returns:
        [T, N, C, H', W'] of x's dtype, channels last in memory.

    Raises:
        ModeconnError: bad input, or an x that needs a gradient.
    """
    kernel, stride, padding = _checked(x, kind, kernel, stride, padding)
    height, width = outputs_of("path_pool2d", x.shape[3:], kernel, stride, padding)
    source = channels_last(x)
    channels = x.shape[2]
    out = source.new_empty((*x.shape[:2], height, width, channels))
    if out.numel():
        pixels = out.numel() // channels
        block_c = min(CHANNELS, triton.next_power_of_2(channels))
        block_p = ELEMENTS // block_c
        launch(
            pool2d_kernel,
            triton.cdiv(pixels, block_p) * triton.cdiv(channels, block_c),
            out,
            source,
            out,
            pixels,
            *x.shape[3:],
            height,
            width,
            channels,
            *kernel,
            *stride,
            *padding,
            MAX=kind == "max",
            BLOCK_P=block_p,
            BLOCK_C=block_c,
        )
    pooled: Tensor = channels_first(out)
    return pooled


def _checked(
    x: Tensor, kind: str, kernel: Pair, stride: Pair, padding: Pair
) -> tuple[Pair, Pair, Pair]:
    samples_of("x", x, 4)
    if x.dim() != 5:
        raise ModeconnError(f"path_pool2d: x has shape {list(x.shape)}: expected [T, N, C, H, W]")
    check_same_device(x=x)
    refuse_gradients("path_pool2d", x=x)
    if kind not in KINDS:
        raise ModeconnError(f"path_pool2d: kind is {kind!r}: expected one of {', '.join(KINDS)}")
    kernel = checked_pair("path_pool2d", "kernel", kernel, 1)
    stride = checked_pair("path_pool2d", "stride", stride, 1)
    padding = checked_pair("path_pool2d", "padding", padding, 0)
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise ModeconnError(
            f"path_pool2d: padding is {list(padding)}: "
            f"expected at most half the kernel {list(kernel)}"
        )
    return kernel, stride, padding


def path_pool2d_reference(
    x: Tensor, kind: str, kernel: Pair, stride: Pair, padding: Pair = (0, 0)
) -> Tensor:
    """Computes `path_pool2d` in plain PyTorch, in any dtype."""
    pool = F.max_pool2d if kind == "max" else F.avg_pool2d
    pooled: Tensor = pool(x.flatten(0, 1), kernel, stride, padding).unflatten(0, x.shape[:2])
    return pooled
