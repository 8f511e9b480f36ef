"""Convolution of images at every point of a path, with a norm, a sum and an activation behind it.

    u[t, n, o, i, j] = Σ_{c, di, dj} W(t)[o, c, di, dj] · x[t, n, c, i·sh − ph + di, j·sw − pw + dj]
    out = act(scale[t, o] · (u + b(t)[o]) + shift[t, o] + residual[t, n, o, i, j])

Floor, per point and image: 2·H'·W'·out·in·kh·kw operations; bytes: 4·in·H·W read (once in all where
the points share x), 4·out·H'·W' written, as much read for a residual. Predictions for an H200 (4.8
TB/s; 495 TFLOP/s tf32, 990 bf16, dense; nothing is measured yet): a 3×3 convolution of C to C
channels has 2.25·C operations a byte, so it is bound by the tensor cores, not by memory, from 46
channels in tf32, from 16 in float32 (three tf32 products), from 92 in bf16 with float32 values; 1×1
convolutions, at C/4 operations a byte, from 413, 138 and 825.

An implicit matrix product: rows are the output pixels of all images of a point, columns are output
channels, and the depth runs over taps and the input channels, which lie side by side in memory.
Nothing is unfolded; a tap outside of the image is a masked read. With fewer input channels than
BLOCK_K, the depth runs over taps × channels in one piece, so that no lane idles on channels that
are not there. Weights are materialized for a chunk of points at a time (materialize.py), as
[t, out, taps · in].

Layout: a program makes a tile [BLOCK_M pixels, BLOCK_N channels] of one point, in the order of
tiles.py: the tiles of a point follow each other and share its weights in L2; pixels that all points
share stay there while the points pass. Channels that are no multiple of 16 are right but slower:
they are not copied 16 bytes at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.kernels.activations import act, activate
from modeconn.kernels.arguments import (
    Samples,
    check_activation,
    check_blended,
    check_points,
    check_same_device,
    samples_of,
)
from modeconn.kernels.blended import Blended
from modeconn.kernels.forward_only import refuse_gradients
from modeconn.kernels.images import Pair, channels_first, channels_last, checked_pair, outputs_of
from modeconn.kernels.launch import (
    chunks,
    dot_precision,
    launch,
    multiply,
    padded,
    tl,
    triton,
    tuned,
)
from modeconn.kernels.materialize import materialized
from modeconn.kernels.tiles import GROUP_BYTES, blend, tile_of_program

# Formed weights of a chunk of points: they should still lie in L2 when the product reads them.
MATERIALIZED_BYTES = 32 << 20
# The depth of a tile is the same everywhere: it decides the order of the sums.
BLOCK_K = 32
WIDE = triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3)
MIDDLE = triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3)
NARROW = triton.Config({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=4, num_stages=3)
THIN = triton.Config({"BLOCK_M": 128, "BLOCK_N": 16}, num_warps=4, num_stages=3)
CONFIGS = [WIDE, MIDDLE, NARROW, THIN]


@tuned(CONFIGS, key=["channels", "units", "KH", "KW", "X_TERMS", "PRECISION"])
@triton.jit
def conv2d_kernel(
    x,
    x_coefficients,
    x_stride,
    w,
    scale,
    shift,
    residual,
    residual_stride,
    out,
    points,
    pixels,
    height,
    width,
    channels,
    out_height,
    out_width,
    units,
    depth,
    group_rows,
    slope,
    input_slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    FLAT: tl.constexpr,
    X_TERMS: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t, pixel_tile, unit_tile = tile_of_program(
        points, pixels, tl.cdiv(units, BLOCK_N), group_rows, BLOCK_M
    )
    point = t.to(tl.int64)
    pixel = pixel_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = unit_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place = pixel % (out_height * out_width)
    top = place // out_width * SH - PH
    left = place % out_width * SW - PW
    image = x + (pixel // (out_height * out_width)).to(tl.int64) * height * width * channels
    if X_TERMS == 0:
        image += point * x_stride
    w_rows = w + (point * units + unit) * depth

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(channels, BLOCK_K)  # of a tap
    for step in range(tl.cdiv(KH * KW * FLAT, BLOCK_K) if FLAT else KH * KW * steps):
        if FLAT:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            channel = k % FLAT
            row = top[:, None] + (k // FLAT // KW)[None, :]
            column = left[:, None] + (k // FLAT % KW)[None, :]
            real = k < KH * KW * FLAT
        else:
            channel = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
            k = step // steps * channels + channel
            row = (top + step // steps // KW)[:, None]
            column = (left + step // steps % KW)[:, None]
            real = channel < channels
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside = inside & (pixel < pixels)[:, None] & real[None, :]
        pointers = image[:, None] + ((row * width + column) * channels + channel[None, :])
        if X_TERMS > 0:
            value = blend(pointers, x_coefficients + t * X_TERMS, x_stride, inside, X_TERMS)
            value = activate(value, INPUT_ACTIVATION, input_slope)
            value = tl.where(inside, value, 0.0)  # the padding is zero behind the activation
        else:
            value = tl.load(pointers, mask=inside, other=0.0)
        weight = tl.load(
            w_rows[None, :] + k[:, None], mask=real[:, None] & (unit < units)[None, :], other=0.0
        )
        total = multiply(value, weight, total, PRECISION)

    if HAS_SCALE:
        total *= tl.load(scale + t * units + unit, mask=unit < units, other=0.0)[None, :]
    if HAS_SHIFT:
        total += tl.load(shift + t * units + unit, mask=unit < units, other=0.0)[None, :]
    exists = (pixel < pixels)[:, None] & (unit < units)[None, :]
    target = pixel.to(tl.int64)[:, None] * units + unit[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + point * residual_stride + target, mask=exists, other=0.0)
        total += added.to(tl.float32)
    total = activate(total, ACTIVATION, slope)
    tl.store(out + point * pixels * units + target, total.to(out.dtype.element_ty), mask=exists)


def default_config(units: int, dot: str) -> Any:
    """Returns the configuration with the fewest idle columns; of equals, the widest.

    Three tf32 products at 128 columns need more registers than sm_80 has; they read so little per
    product that 64 cost nothing.
    """
    fitting = CONFIGS[1:] if dot == "tf32x3" else CONFIGS
    return min(fitting, key=lambda config: padded(units, config.kwargs["BLOCK_N"]))


def _pixels_of_a_group(x: Samples, pixels: int) -> int:
    """Returns how many output pixels have inputs that stay in L2 while all points pass.

    Where every point has its own input, nothing is to stay, and all pixels are one group.
    """
    if x.per_point:
        return pixels
    size = x.values.numel() * x.values.element_size()
    return min(pixels, max(128, pixels * GROUP_BYTES // max(1, size)))


def _convolve(
    x: Samples,
    weight: Blended,
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    out: Tensor,
    options: dict[str, Any],
) -> None:
    """Writes all points into out [T, N, H', W', out].

    Args:
        x, residual: channels last.
        affine: scale and shift, [T, out].
        options: the kernel's arguments that stand for those of `path_conv2d`.
    """
    points, samples, out_height, out_width, units = out.shape
    _, channels, kh, kw = weight.shape
    pixels = samples * out_height * out_width
    scale, shift = affine
    residual_stride = residual.stride(0) if residual is not None and residual.dim() == 5 else 0
    constants: dict[str, Any] = {"x_stride": x.strides()[0], "X_TERMS": x.terms}
    constants |= {"residual_stride": residual_stride}
    constants |= {"pixels": pixels, "height": x.shape[1], "width": x.shape[2]}
    constants |= {"out_height": out_height, "out_width": out_width}
    constants |= {"channels": channels, "units": units, "depth": padded(kh * kw * channels)}
    constants |= {"KH": kh, "KW": kw, "FLAT": channels if channels < BLOCK_K else 0}
    constants |= {"HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None}
    constants |= {"HAS_RESIDUAL": residual is not None, "BLOCK_K": BLOCK_K}
    constants["group_rows"] = _pixels_of_a_group(x, pixels)
    if not isinstance(conv2d_kernel, triton.runtime.Autotuner):
        constants |= default_config(units, options["PRECISION"]).all_kwargs()
    matrices = Blended(weight.tensors.permute(0, 1, 3, 4, 2).flatten(2), weight.coefficients)
    dtype = torch.bfloat16 if options["PRECISION"] == "bf16" else torch.float32

    def at(values: Tensor | None, moves: bool, part: slice) -> Tensor:
        if values is None:
            return out  # any pointer will do for what is not read
        return values[part] if moves else values

    for part in chunks(points, units * constants["depth"] * dtype.itemsize, MATERIALIZED_BYTES):
        count = part.stop - part.start

        def programs(meta: dict[str, Any], count: int = count) -> int:
            return count * -(-pixels // int(meta["BLOCK_M"])) * -(-units // int(meta["BLOCK_N"]))

        launch(
            conv2d_kernel,
            programs,
            out,
            x=at(x.values, x.per_point, part),
            x_coefficients=at(x.coefficients, True, part),
            w=materialized(matrices, part, dtype),
            scale=at(scale, True, part),
            shift=at(shift, True, part),
            residual=at(residual, residual_stride > 0, part),
            out=out[part],
            points=count,
            **constants,
            **options,
        )


def path_conv2d(
    x: Tensor | Blended,
    weight: Blended,
    bias: Blended | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "identity",
    slope: float = 0.01,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    precision: str = "float32",
) -> Tensor:
    """Convolves images at the T points of a weight; a norm, a sum and an activation may follow.

    Args:
        x: [N, in, H, W], [T, N, in, H, W], or a `Blended` of J values [J, N, in, H, W], of which
            `input_activation` is taken; channels last in memory saves a copy.
        weight, bias: [K, out, in, kh, kw] and [K, out] with their coefficients [T, K].
        scale, shift: [T, out], applied after the bias: a norm with given statistics.
        residual: [N, out, H', W'] or [T, N, out, H', W'], added before the activation; channels
            last saves a copy.
        stride, padding: height and width; the padding is of zeros, on both sides.
        dilation, groups: 1; others are refused.
        activation, slope: taken of the result; the slope is that of leaky_relu.
        input_slope: that of leaky_relu as `input_activation`.
        precision: "float32", "tf32" or "bf16" (operands of the products; sums are float32).

    Returns:
        [T, N, out, H', W'] of x's dtype, channels last in memory.

    Raises:
        ModeconnError: shapes, dtypes, devices or names that do not fit, groups, dilation, or a
            tensor that needs a gradient.
    """
    if groups != 1 or tuple(dilation) != (1, 1):
        raise ModeconnError(
            f"path_conv2d: groups is {groups} and dilation {dilation}: expected 1 and (1, 1)"
        )
    check_activation("activation", activation)
    samples = samples_of("x", x, 4, input_activation)
    weight = _checked_weight(samples, weight)
    units, _, *kernel = weight.shape
    stride = checked_pair("path_conv2d", "stride", stride, 1)
    padding = checked_pair("path_conv2d", "padding", padding, 0)
    size = outputs_of("path_conv2d", samples.shape[2:], (kernel[0], kernel[1]), stride, padding)
    if bias is not None:
        bias = check_blended("bias", bias, (units,), weight.points)
    shape = weight.points, samples.shape[0], units, *size
    _check_epilogue(scale, shift, residual, shape)
    tensors = {"x": samples.values, "weight": weight.tensors, "bias": bias and bias.tensors}
    tensors |= {"scale": scale, "shift": shift, "residual": residual}
    check_same_device(**tensors)
    refuse_gradients("path_conv2d", **tensors)
    options = {"slope": slope, "input_slope": input_slope, "ACTIVATION": activation}
    options |= {"INPUT_ACTIVATION": input_activation, "PRECISION": dot_precision(precision)}
    options |= dict(zip(("SH", "SW", "PH", "PW"), (*stride, *padding)))
    out = samples.values.new_empty((*shape[:2], *size, units))
    if out.numel():
        samples = replace(samples, values=channels_last(samples.values))
        residual = None if residual is None else channels_last(residual)
        _convolve(samples, weight, _affine(bias, scale, shift), residual, out, options)
    images: Tensor = channels_first(out)
    return images


def _checked_weight(x: Samples, weight: Blended) -> Blended:
    weight = check_blended("weight", weight)
    if len(weight.shape) != 4 or weight.shape[1] != x.shape[1]:
        raise ModeconnError(
            f"weight has shape {list(weight.shape)} at one point and x {list(x.shape)}: "
            "expected [out, in, kh, kw] and [N, in, H, W] (groups are not computed)"
        )
    check_points(x, weight)
    return weight


def _check_epilogue(
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, shape: tuple[int, ...]
) -> None:
    """Checks the shapes of scale and shift, and of a residual.

    Args:
        shape: [T, N, out, H', W'].
    """
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.shape != (shape[0], shape[2]):
            raise ModeconnError(
                f"{name} has shape {list(tensor.shape)}: "
                f"expected [points, out] = {[shape[0], shape[2]]}"
            )
    if residual is not None and residual.shape not in (shape, shape[1:]):
        raise ModeconnError(
            f"residual has shape {list(residual.shape)}: "
            f"expected {list(shape)} or {list(shape[1:])}"
        )


def _affine(
    bias: Blended | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns scale · (u + bias) + shift as scale · u + shift', each [T, out].

    In float64, as the two parts of shift' may cancel.
    """
    if bias is not None:
        moved = Blended(bias.tensors.double(), bias.coefficients).materialized()
        moved = moved if scale is None else moved * scale.double()
        shift = moved if shift is None else moved + shift.double()
    scale, shift = (None if v is None else v.float().contiguous() for v in (scale, shift))
    return scale, shift


def path_conv2d_reference(
    x: Tensor | Blended,
    weight: Blended,
    bias: Blended | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    activation: str = "identity",
    slope: float = 0.01,
    input_activation: str = "identity",
    input_slope: float = 0.01,
) -> Tensor:
    """Computes `path_conv2d` in plain PyTorch, in any dtype and differentiable."""
    if isinstance(x, Blended):
        x = act(x.materialized(), input_activation, input_slope)
    values = x.expand(weight.points, *x.shape) if x.dim() == 4 else x
    biases = [None] * weight.points if bias is None else bias.materialized()
    y = torch.stack(
        [
            F.conv2d(v, w, b, stride, padding)
            for v, w, b in zip(values, weight.materialized(), biases)
        ]
    )
    y = y if scale is None else y * scale[:, None, :, None, None]
    y = y if shift is None else y + shift[:, None, :, None, None]
    images: Tensor = act(y if residual is None else y + residual, activation, slope)
    return images
