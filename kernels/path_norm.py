"""Norms at every point of a path: over the last axis, and over all but the channels.

    layer norm   y = (x − mean) / √(var + eps) · w(t) + b(t)            mean and biased variance of
    the last axis RMS norm     y = x / √(mean of x² + eps) · w(t) batch norm   y = act((x − mean(t))
    / √(var(t) + eps) · w(t) + b(t))   mean and biased variance of all but the channels

Floor: some ten operations and 8 bytes a value, 4 of them written; a batch norm reads its values
twice, 12 bytes; statistics alone read 4. Prediction: bound by memory on any GPU; 6·10¹¹ values a
second at an H200's 4.8 TB/s. Weights are vectors, [T, width], formed beforehand: the values are N
times as many.

Rows: a program normalises a block of whole rows of one point; a row longer than a block goes by in
pieces and is read a second time, from the caches. The mean is two floats, so that one far from zero
costs no digits. The programs of all points of a block of rows follow each other, so that rows that
the points share come from memory once.

Statistics: a program takes ROWS rows of a block of channels of one point and adds up, in float64,
the values less the channel's first one, and their squares. A mean far from zero so costs no digits,
and equal values have a variance of exactly
0. The order of the sums is always the same, hence so are the bits. Datacenter GPUs have the float64
rate for it: three operations per 4 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.kernels.activations import act, activate
from modeconn.kernels.arguments import (
    check_activation,
    check_blended,
    check_same_device,
    samples_of,
)
from modeconn.kernels.blended import Blended
from modeconn.kernels.forward_only import refuse_gradients
from modeconn.kernels.launch import AotCase, launch, tl, triton

# Elements of a block of rows; the longest piece of a row.
ELEMENTS = 4096
# The statistics' rows of a program, its lanes, and its channels.
ROWS = 1024
LANES = 32
CHANNELS = 64


@triton.jit
def _row_norm_kernel(
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


@triton.jit
def _sums_kernel(
    x,
    sums,
    squares,
    rows,
    inner,
    channels,
    parts,
    x_point,
    x_sample,
    x_inner,
    x_channel,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // blocks  # of all parts of all points
    source = x + (part // parts).to(tl.int64) * x_point + channel.to(tl.int64)[None, :] * x_channel
    first = tl.load(source, mask=(channel < channels)[None, :], other=0.0).to(tl.float64)
    total = tl.zeros((LANES, BLOCK_C), tl.float64)
    square = tl.zeros((LANES, BLOCK_C), tl.float64)
    begin = part % parts * ROWS
    for step in range(tl.cdiv(tl.minimum(rows - begin, ROWS), LANES)):
        row = begin + step * LANES + tl.arange(0, LANES)
        place = (row // inner).to(tl.int64) * x_sample + (row % inner).to(tl.int64) * x_inner
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        value = tl.load(source + place[:, None], mask=inside, other=0.0).to(tl.float64)
        value = tl.where(inside, value - first, 0.0)
        total += value
        square += value * value
    target = part.to(tl.int64) * channels + channel
    tl.store(sums + target, tl.sum(total, 0), mask=channel < channels)
    tl.store(squares + target, tl.sum(square, 0), mask=channel < channels)


@triton.jit
def _affine_kernel(
    x,
    mean,
    scale,
    shift,
    out,
    rows,
    channels,
    slope,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_M)
    t = tl.program_id(0) // blocks // tiles
    row = tl.program_id(0) // blocks % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = channel < channels
    place = (t.to(tl.int64) * rows + row)[:, None] * channels + channel[None, :]
    inside = (row < rows)[:, None] & kept[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(mean + t * channels + channel, mask=kept, other=0.0)[None, :]
    by = tl.load(scale + t * channels + channel, mask=kept, other=0.0)[None, :]
    value = (value - middle) * by + tl.load(shift + t * channels + channel, mask=kept, other=0.0)[
        None, :
    ]
    tl.store(out + place, activate(value, ACTIVATION, slope).to(out.dtype.element_ty), mask=inside)


def path_layer_norm(
    x: Tensor,
    weight: Blended | None,
    bias: Blended | None = None,
    eps: float = 1e-5,
    *,
    shared: bool = False,
) -> Tensor:
    """A layer norm over the last axis at T points.

    Args:
        x: [T, …, width], or [N, …, width] if `shared`: the same at all points.
        weight, bias: [K, width] with their coefficients [T, K], or None.

    Returns:
        [T, …, width], contiguous, of x's dtype.

    Raises:
        ModeconnError: shapes, dtypes or devices that do not fit, or a tensor that needs a gradient.
    """
    return _row_norm("path_layer_norm", x, weight, bias, eps, shared)


def path_rms_norm(
    x: Tensor, weight: Blended | None, eps: float = 1e-6, *, shared: bool = False
) -> Tensor:
    """A root-mean-square norm over the last axis at T points; arguments as of `path_layer_norm`."""
    return _row_norm("path_rms_norm", x, weight, None, eps, shared)


def _row_norm(
    op: str, x: Tensor, weight: Blended | None, bias: Blended | None, eps: float, shared: bool
) -> Tensor:
    samples_of("x", x, x.dim())
    given = {"weight": weight, "bias": bias}
    moving = [blended for blended in given.values() if blended is not None]
    if x.dim() < (1 if shared else 2) or (shared and not moving):
        raise ModeconnError(
            f"{op}: x has shape {list(x.shape)} and shared is {shared}: expected [T, …, width], or if shared [N, …, width] "
            "and a weight or bias that says T"
        )
    points = moving[0].points if shared else len(x)
    width = x.shape[-1]
    vectors = _vectors(op, given, (width,), points, x)
    out = torch.empty(
        (points, *(x.shape if shared else x.shape[1:])), dtype=x.dtype, device=x.device
    )
    if out.numel():
        x = x.contiguous()
        rows = out.numel() // points // width
        piece = min(ELEMENTS, triton.next_power_of_2(width))
        block = ELEMENTS // piece
        launch(
            _row_norm_kernel,
            points * triton.cdiv(rows, block),
            out,
            x=x,
            weight=out if vectors[0] is None else vectors[0],
            bias=out if vectors[1] is None else vectors[1],
            out=out,
            points=points,
            rows=rows,
            width=width,
            x_stride=0 if shared else x.stride(0),
            eps=eps,
            CENTRED=op == "path_layer_norm",
            HAS_WEIGHT=vectors[0] is not None,
            HAS_BIAS=vectors[1] is not None,
            BLOCK_M=block,
            BLOCK_N=piece,
        )
    return out


def path_batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance of every channel over samples and places, for all points at once.

    Args:
        x: [T, N, C, …], of any strides.

    Returns:
        float64 [T, C] each; without values NaN, and with one value a variance of NaN.

    Raises:
        ModeconnError: a dtype or device that the kernels do not take, or an x that needs a
            gradient.
    """
    _check_channels("path_batch_statistics", x)
    mean, squares, count = _moments(x)
    return mean, squares / (count - 1) if count > 1 else torch.full_like(mean, float("nan"))


def path_batch_norm(
    x: Tensor,
    weight: Blended | None,
    bias: Blended | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
    slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm in training mode at T points: each normalises by its own batch's statistics, and hands them out.

    Args:
        x: [T, N, C, …]; channels last in memory saves a copy.
        weight, bias: [K, C] with their coefficients [T, K], or None.
        activation, slope: taken of the result; the slope is that of leaky_relu.

    Returns:
        [T, N, C, …] of x's dtype, channels last in memory; mean and unbiased variance, float64 [T,
            C].

    Raises:
        ModeconnError: shapes, dtypes or devices that do not fit, fewer than two values per channel,
            or a tensor that needs a gradient.
    """
    check_activation("activation", activation)
    _check_channels("path_batch_norm", x)
    points, channels = len(x), x.shape[2]
    vectors = _vectors("path_batch_norm", {"weight": weight, "bias": bias}, (channels,), points, x)
    mean, squares, count = _moments(x)
    if count < 2:
        raise ModeconnError(
            f"path_batch_norm: x has shape {list(x.shape)}: expected at least two values per channel"
        )
    scale = (squares / count + eps).rsqrt() * (1.0 if vectors[0] is None else vectors[0])
    rounded = mean.float()
    shift = (rounded - mean) * scale + (0.0 if vectors[1] is None else vectors[1])
    source = x.movedim(2, -1).contiguous()
    out = torch.empty_like(source)
    if out.numel():
        block_c = min(CHANNELS, triton.next_power_of_2(channels))
        block_m = ELEMENTS // block_c
        launch(
            _affine_kernel,
            points * triton.cdiv(count, block_m) * triton.cdiv(channels, block_c),
            out,
            x=source,
            mean=rounded,
            scale=scale.float(),
            shift=shift.float(),
            out=out,
            rows=count,
            channels=channels,
            slope=slope,
            ACTIVATION=activation,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
        )
    return out.movedim(-1, 2), mean, squares / (count - 1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and sum of squared deviations, float64 [T, C], and the number of values per channel."""
    flat = x.flatten(3) if x.dim() > 3 else x[..., None]
    points, samples, channels, inner = flat.shape
    rows = samples * inner
    parts = triton.cdiv(rows, ROWS)
    sums, squares = torch.empty((2, points, parts, channels), dtype=torch.float64, device=x.device)
    if sums.numel():
        block_c = min(CHANNELS, triton.next_power_of_2(channels))
        launch(
            _sums_kernel,
            points * parts * triton.cdiv(channels, block_c),
            flat,
            flat,
            sums,
            squares,
            rows,
            inner,
            channels,
            parts,
            flat.stride(0),
            flat.stride(1),
            flat.stride(3),
            flat.stride(2),
            ROWS=ROWS,
            LANES=LANES,
            BLOCK_C=block_c,
        )
    off = sums.sum(1) / rows  # of the mean from the first value; NaN without values
    mean = flat[:, 0, :, 0] + off if rows else off
    return mean, (squares.sum(1) - rows * off * off).clamp(min=0), rows


def _check_channels(op: str, x: Tensor) -> None:
    if x.dim() < 3:
        raise ModeconnError(f"{op}: x has shape {list(x.shape)}: expected [T, N, C, …]")
    samples_of("x", x, x.dim() - 1)
    check_same_device(x=x)
    refuse_gradients(op, x=x)


def _vectors(
    op: str, given: dict[str, Blended | None], shape: tuple[int, ...], points: int, x: Tensor
) -> list[Tensor | None]:
    """The weight and the bias at all points, float32 [T, width], once everything is checked."""
    checked = {
        name: None if b is None else check_blended(name, b, shape, points)
        for name, b in given.items()
    }
    tensors = {name: None if b is None else b.tensors for name, b in checked.items()}
    check_same_device(x=x, **tensors)
    refuse_gradients(op, x=x, **tensors)
    return [
        None if b is None else Blended(b.tensors.float(), b.coefficients).formed()
        for b in checked.values()
    ]


def path_layer_norm_reference(
    x: Tensor,
    weight: Blended | None,
    bias: Blended | None = None,
    eps: float = 1e-5,
    *,
    shared: bool = False,
) -> Tensor:
    """`path_layer_norm` in plain PyTorch, in any dtype and differentiable: what the kernel is judged by."""
    parts = _at_points(x, weight, bias, shared)
    return torch.stack([F.layer_norm(v, v.shape[-1:], w, b, eps) for v, w, b in parts])


def path_rms_norm_reference(
    x: Tensor, weight: Blended | None, eps: float = 1e-6, *, shared: bool = False
) -> Tensor:
    """`path_rms_norm` in plain PyTorch."""
    return torch.stack(
        [F.rms_norm(v, v.shape[-1:], w, eps) for v, w, _ in _at_points(x, weight, None, shared)]
    )


def path_batch_statistics_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`path_batch_statistics` in plain PyTorch."""
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d not in (0, 2)], correction=1)
    return mean, var


def path_batch_norm_reference(
    x: Tensor,
    weight: Blended | None,
    bias: Blended | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
    slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """`path_batch_norm` in plain PyTorch."""
    y = [
        F.batch_norm(v, None, None, w, b, training=True, eps=eps)
        for v, w, b in _at_points(x, weight, bias, False)
    ]
    return act(torch.stack(y), activation, slope), *path_batch_statistics_reference(x)


def _at_points(
    x: Tensor, weight: Blended | None, bias: Blended | None, shared: bool
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """x, weight and bias of each point."""
    points = next(b.points for b in (weight, bias) if b is not None) if shared else len(x)
    formed = [[None] * points if b is None else b.formed() for b in (weight, bias)]
    return list(zip(x.expand(points, *x.shape) if shared else x, *formed))


def aot_cases() -> list[AotCase]:
    """Rows of 768, in one piece, and of 8192, in two; statistics and batch norms of 64 channels."""
    vectors = ("weight", "bias", "mean", "scale", "shift", "x", "out")
    sizes = (
        "points",
        "rows",
        "width",
        "x_stride",
        "inner",
        "channels",
        "parts",
        "x_point",
        "x_sample",
        "x_inner",
    )
    types = dict.fromkeys(vectors, "*fp32:16") | dict.fromkeys(sizes, "i32:16")
    types |= dict.fromkeys(("sums", "squares"), "*fp64:16")
    types |= {"eps": "fp32", "slope": "fp32", "points": "i32"}

    def case(name: str, kernel: Any, **constants: Any) -> AotCase:
        wanted = [argument for argument in kernel.arg_names if argument not in constants]
        return AotCase(
            name, kernel, {argument: types[argument] for argument in wanted}, constants, 4, 3, False
        )

    rows = {"HAS_WEIGHT": True, "BLOCK_M": 4, "BLOCK_N": 1024}
    long = {"HAS_WEIGHT": True, "BLOCK_M": 1, "BLOCK_N": ELEMENTS}
    return [
        case("layer norm", _row_norm_kernel, CENTRED=True, HAS_BIAS=True, **rows),
        case("layer norm of long rows", _row_norm_kernel, CENTRED=True, HAS_BIAS=True, **long),
        case("RMS norm", _row_norm_kernel, CENTRED=False, HAS_BIAS=False, **rows),
        case(
            "batch statistics", _sums_kernel, x_channel=1, ROWS=ROWS, LANES=LANES, BLOCK_C=CHANNELS
        ),
        case(
            "batch norm",
            _affine_kernel,
            ACTIVATION="relu",
            BLOCK_M=ELEMENTS // CHANNELS,
            BLOCK_C=CHANNELS,
        ),
    ]
