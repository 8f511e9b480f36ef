"""Convolution of images at every point of a path, with what follows it.

    out[t, n, o, i, j] = act(scale[t, o] · (Σ_{c, di, dj} W(t)[o, c, di, dj] · x[t, n, c, i·sh − ph
    + di, j·sw − pw + dj]
                             + b(t)[o]) + shift[t, o] + residual[t, n, o, i, j])

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
are not there. Weights are formed for a chunk of points at a time (form.py), [t, out, taps · in].

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
    check_same_device,
    samples_of,
)
from modeconn.kernels.blended import Blended
from modeconn.kernels.form import formed
from modeconn.kernels.forward_only import refuse_gradients
from modeconn.kernels.images import Pair, channels_first, channels_last, checked_pair, outputs_of
from modeconn.kernels.launch import (
    PRECISIONS,
    AotCase,
    chunks,
    dot_precision,
    launch,
    multiply,
    padded,
    tl,
    triton,
    tuned,
)
from modeconn.kernels.tiles import GROUP_BYTES, blend, tile_of_program

# Formed weights of a chunk of points: they should still lie in L2 when the product reads them.
FORMED_BYTES = 32 << 20
# The depth of a tile is the same everywhere: it decides the order of the sums.
BLOCK_K = 32
WIDE = triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3)
MIDDLE = triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3)
NARROW = triton.Config({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=4, num_stages=3)
THIN = triton.Config({"BLOCK_M": 128, "BLOCK_N": 16}, num_warps=4, num_stages=3)
CONFIGS = [WIDE, MIDDLE, NARROW, THIN]


@tuned(CONFIGS, key=["channels", "units", "KH", "KW", "X_TERMS", "PRECISION"])
@triton.jit
def _conv2d_kernel(
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
    wanted = (pixel < pixels)[:, None] & (unit < units)[None, :]
    target = pixel.to(tl.int64)[:, None] * units + unit[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + point * residual_stride + target, mask=wanted, other=0.0).to(
            tl.float32
        )
    total = activate(total, ACTIVATION, slope)
    tl.store(out + point * pixels * units + target, total.to(out.dtype.element_ty), mask=wanted)


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
    """A convolution at the T points of its weight, with a folded norm, a skip connection and an activation behind it.

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
        input_slope: the same for `input_activation`.
        precision: "float32", "tf32" or "bf16" (operands of the products; sums are float32).

    Returns:
        [T, N, out, H', W'] of x's dtype, channels last in memory.

    Raises:
        ModeconnError: shapes, dtypes, devices or names that do not fit, groups, dilation, or a
            tensor that needs a gradient.
    """
    if groups != 1 or tuple(dilation) != (1, 1):
        raise ModeconnError(
            f"path_conv2d: groups is {groups} and dilation {dilation}: only 1 and (1, 1) are computed"
        )
    check_activation("activation", activation)
    samples = samples_of("x", x, 4, input_activation)
    weight = check_blended("weight", weight)
    if len(weight.shape) != 4 or weight.shape[1] != samples.shape[1]:
        raise ModeconnError(
            f"weight has shape {list(weight.shape)} at one point and x {list(samples.shape)}: expected [out, in, kh, kw] and "
            "[N, in, H, W] (groups are not computed)"
        )
    if samples.points not in (None, weight.points):
        raise ModeconnError(
            f"x has {samples.points} points and the weight {weight.points}: expected as many"
        )
    units, _, *kernel = weight.shape
    stride, padding = (
        checked_pair("path_conv2d", "stride", stride, 1),
        checked_pair("path_conv2d", "padding", padding, 0),
    )
    size = outputs_of("path_conv2d", samples.shape[2:], (kernel[0], kernel[1]), stride, padding)
    if bias is not None:
        bias = check_blended("bias", bias, (units,), weight.points)
    _check_epilogue(scale, shift, residual, (weight.points, samples.shape[0], units, *size))
    tensors = {
        "x": samples.values,
        "weight": weight.tensors,
        "bias": None if bias is None else bias.tensors,
    }
    tensors |= {"scale": scale, "shift": shift, "residual": residual}
    check_same_device(**tensors)
    refuse_gradients("path_conv2d", **tensors)
    options = {
        "slope": slope,
        "input_slope": input_slope,
        "INPUT_ACTIVATION": input_activation,
        "ACTIVATION": activation,
    }
    options["PRECISION"] = dot_precision(precision)
    out = torch.empty(
        (weight.points, samples.shape[0], *size, units),
        dtype=samples.values.dtype,
        device=samples.values.device,
    )
    if out.numel():
        samples = replace(samples, values=channels_last(samples.values))
        residual = None if residual is None else channels_last(residual)
        _convolve(
            samples, weight, _affine(bias, scale, shift), residual, out, stride, padding, options
        )
    images: Tensor = channels_first(out)
    return images


def _convolve(
    x: Samples,
    weight: Blended,
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    out: Tensor,
    stride: Pair,
    padding: Pair,
    options: dict[str, Any],
) -> None:
    """Write all points into out [T, N, H', W', out]; x and the residual are channels last."""
    points, samples, out_height, out_width, units = out.shape
    _, channels, kh, kw = weight.shape
    pixels = samples * out_height * out_width
    scale, shift = affine
    constants = {
        "x_stride": x.values.stride(0) if x.terms or x.per_point else 0,
        "X_TERMS": x.terms,
        "residual_stride": residual.stride(0)
        if residual is not None and residual.dim() == 5
        else 0,
        "pixels": pixels,
        "height": x.shape[1],
        "width": x.shape[2],
        "channels": channels,
        "out_height": out_height,
        "out_width": out_width,
        "units": units,
        "group_rows": _pixels_of_a_group(x, pixels),
        "depth": padded(kh * kw * channels),
        "KH": kh,
        "KW": kw,
        "SH": stride[0],
        "SW": stride[1],
        "PH": padding[0],
        "PW": padding[1],
        "FLAT": channels if channels < BLOCK_K else 0,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "HAS_RESIDUAL": residual is not None,
        "BLOCK_K": BLOCK_K,
    }
    if not isinstance(_conv2d_kernel, triton.runtime.Autotuner):
        constants |= default_config(units, options["PRECISION"]).all_kwargs()
    matrices = Blended(weight.tensors.permute(0, 1, 3, 4, 2).flatten(2), weight.coefficients)
    dtype = torch.bfloat16 if options["PRECISION"] == "bf16" else torch.float32

    def at(values: Tensor | None, moves: bool, part: slice) -> Tensor:
        # any pointer will do for what is not read
        return out if values is None else values[part] if moves else values

    for part in chunks(points, units * constants["depth"] * dtype.itemsize, FORMED_BYTES):
        count = part.stop - part.start

        def programs(meta: dict[str, Any], count: int = count) -> int:
            return count * -(-pixels // int(meta["BLOCK_M"])) * -(-units // int(meta["BLOCK_N"]))

        launch(
            _conv2d_kernel,
            programs,
            out,
            x=at(x.values, x.per_point, part),
            x_coefficients=at(x.coefficients, True, part),
            w=formed(matrices, part, dtype),
            scale=at(scale, True, part),
            shift=at(shift, True, part),
            residual=at(residual, constants["residual_stride"] > 0, part),
            out=out[part],
            points=count,
            **constants,
            **options,
        )


def default_config(units: int, dot: str) -> Any:
    """The configuration with the fewest idle columns; of equals, the widest.

    Three tf32 products at 128 columns want more registers than sm_80 has; they read so little per
    product that 64 cost nothing.
    """
    fitting = CONFIGS[1:] if dot == "tf32x3" else CONFIGS
    return min(fitting, key=lambda config: padded(units, config.kwargs["BLOCK_N"]))


def _pixels_of_a_group(x: Samples, pixels: int) -> int:
    """Output pixels whose inputs stay in L2 while all points pass, where the points share them; else all."""
    size = x.values.numel() * x.values.element_size()
    return pixels if x.per_point else min(pixels, max(128, pixels * GROUP_BYTES // max(1, size)))


def _affine(
    bias: Blended | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """scale · (u + bias) + shift as scale · u + shift', [T, out]: in float64, as the two may cancel."""
    if bias is not None:
        moved = Blended(bias.tensors.double(), bias.coefficients).formed()
        moved = moved if scale is None else moved * scale.double()
        shift = moved if shift is None else moved + shift.double()
    scale, shift = (None if v is None else v.float().contiguous() for v in (scale, shift))
    return scale, shift


def _check_epilogue(
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, shape: tuple[int, ...]
) -> None:
    """Shapes [T, out] and [N, out, H', W'] or [T, N, out, H', W'], this being `shape`."""
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.shape != (shape[0], shape[2]):
            raise ModeconnError(
                f"{name} has shape {list(tensor.shape)}: expected [points, out] = {[shape[0], shape[2]]}"
            )
    if residual is not None and residual.shape not in (shape, shape[1:]):
        raise ModeconnError(
            f"residual has shape {list(residual.shape)}: expected {list(shape)} or {list(shape[1:])}"
        )


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
    """`path_conv2d` in plain PyTorch, in any dtype and differentiable: what the kernel is judged by."""
    if isinstance(x, Blended):
        x = act(x.formed(), input_activation, input_slope)
    values = x.expand(weight.points, *x.shape) if x.dim() == 4 else x
    biases = [None] * weight.points if bias is None else bias.formed()
    y = torch.stack(
        [F.conv2d(v, w, b, stride, padding) for v, w, b in zip(values, weight.formed(), biases)]
    )
    y = y if scale is None else y * scale[:, None, :, None, None]
    y = y if shift is None else y + shift[:, None, :, None, None]
    images: Tensor = act(y if residual is None else y + residual, activation, slope)
    return images


def aot_cases() -> list[AotCase]:
    """3×3 convolutions of 128, 32 and 16 channels, of a first layer's 3, and of two shared values."""
    names = ("x", "x_coefficients", "w", "scale", "shift", "residual", "out")
    signature = dict.fromkeys(names, "*fp32:16") | dict.fromkeys(("slope", "input_slope"), "fp32")
    signature |= dict.fromkeys(("group_rows", "points"), "i32")
    sizes = (
        "x_stride",
        "residual_stride",
        "pixels",
        "height",
        "width",
        "out_height",
        "out_width",
        "units",
        "depth",
    )
    signature |= dict.fromkeys(sizes, "i32:16")
    constants: dict[str, Any] = dict.fromkeys(
        ("SH", "SW", "PH", "PW", "HAS_SCALE", "HAS_SHIFT", "HAS_RESIDUAL"), 1
    )
    constants |= {
        "KH": 3,
        "KW": 3,
        "INPUT_ACTIVATION": "relu",
        "ACTIVATION": "relu",
        "BLOCK_K": BLOCK_K,
    }

    def case(channels: int, units: int, precision: str, terms: int = 0) -> AotCase:
        dot = PRECISIONS[precision]
        config = default_config(units, dot)
        of = {
            "channels": "i32" if channels % 16 else "i32:16",
            "w": "*bf16:16" if precision == "bf16" else "*fp32:16",
        }
        given = {"FLAT": channels if channels < BLOCK_K else 0, "X_TERMS": terms, "PRECISION": dot}
        name = f"conv2d {channels}→{units}{f' of {terms} terms' if terms else ''} {precision}"
        constexprs = constants | config.kwargs | given
        return AotCase(
            name,
            _conv2d_kernel,
            signature | of,
            constexprs,
            config.num_warps,
            config.num_stages,
            True,
        )

    wide = [case(128, 128, precision) for precision in PRECISIONS]
    return [
        *wide,
        case(32, 32, "float32"),
        case(16, 16, "float32"),
        case(3, 64, "float32"),
        case(64, 64, "float32", terms=2),
    ]
