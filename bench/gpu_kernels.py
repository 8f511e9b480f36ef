"""Each kernel by itself: its time against its floor, and its error against float64.

The error is that of a tiny case. Bytes are those of inputs read once and outputs written once;
operations those of the products. The floor takes both at the rates measured on the same machine in
the same run; for "float32" the better of true products and of three TF32 ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpu_cases import Case, Context
from gpu_timing import milliseconds
from modeconn.kernels.blended import Blended

# Relative to the largest value: what rounding the operands of a product to 23, 10 or 7 bits may do,
# ten times over.
ALLOWED = {"float32": 2e-5, "tf32": 1e-2, "bf16": 8e-2}


@dataclass
class Work:
    """A call of a kernel: its arguments on the device, and the bytes and operations it needs."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    bytes: float
    flops: float

    def call(self, function: Callable[..., Any], **more: Any) -> Any:
        return function(*self.arguments, **self.options, **more)


def cases(context: Context) -> dict[str, Case]:
    """Cases of all kernels at the sizes of the goals; products in each precision."""
    made: dict[str, Case] = {}
    for name, make in WORKS.items():
        product = (
            name.split()[0] in ("linear", "mlp", "cross_entropy", "conv2d") and "logits" not in name
        )
        precisions = ("float32", "bf16") if context.dry else ("float32", "tf32", "bf16")
        for precision in precisions if product else ("float32",):
            options = {"precision": precision} if product else {}
            made[f"{name} {precision}"] = _case(context, make, precision, options)
    return made


def _case(
    context: Context, make: Callable[[_Sizes], Work], precision: str, options: dict[str, Any]
) -> Case:
    def run() -> dict[str, Any]:
        work = make(_Sizes(context))
        module = importlib.import_module(f"modeconn.kernels.{_FILES.get(work.op, work.op)}")
        function, reference = getattr(module, work.op), getattr(module, f"{work.op}_reference")
        error = _error(make(_Sizes(replace(context, dry=True))), function, reference, options)
        ms = milliseconds(lambda: work.call(function, **options), context.device)
        floor = context.floor(work.bytes, work.flops, precision)
        result: dict[str, Any] = {"ms": ms, "floor_ms": floor, "error_small": error}
        result |= {"bytes": work.bytes, "flops": work.flops}
        rates = f"{work.flops / ms / 1e9:.4g} TFLOP/s, {work.bytes / ms / 1e6:.4g} GB/s"
        result["note"] = f"{rates}, error {error:.1e}"
        if not error <= ALLOWED[precision]:  # NaN fails, too
            expected = f"expected at most {ALLOWED[precision]}"
            result["error"] = f"error {error:.2g} against float64, {expected}"
        return result

    return run


def _error(
    work: Work, function: Callable[..., Any], reference: Callable[..., Any], options: dict[str, Any]
) -> float:
    """Returns the largest error against float64, relative to the largest value.

    Memory that is allocated is filled with NaN first, so that values never written show.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    got = work.call(function, **options)
    torch.use_deterministic_algorithms(deterministic)
    wide = [_wide(argument) for argument in work.arguments]
    exact = reference(*wide, **{key: _wide(value) for key, value in work.options.items()})
    return float((got.double() - exact).abs().max() / exact.abs().max())


def _wide(value: Any) -> Any:
    """Returns an argument in float64."""
    if isinstance(value, Blended):
        return Blended(value.tensors.double(), value.coefficients.double())
    if isinstance(value, list):
        return [
            replace(layer, weight=_wide(layer.weight), bias=_wide(layer.bias)) for layer in value
        ]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Sizes:
    """Draws random tensors on the device, and chooses sizes: the ones meant, or tiny ones."""

    def __init__(self, context: Context) -> None:
        self.dry, self.device = context.dry, context.device

    def __call__(self, meant: int, tiny: int) -> int:
        return tiny if self.dry else meant

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(scale)

    def blended(self, points: int, terms: int, *shape: int, scale: float = 1.0) -> Blended:
        t = torch.linspace(0.1, 0.9, points, device=self.device)
        columns = [1 - t, t] if terms == 2 else [torch.ones_like(t)]
        return Blended(self.normal(terms, *shape, scale=scale), torch.stack(columns, 1))

    def layer(self, points: int, before: int, after: int) -> tuple[Blended, Blended]:
        return self.blended(points, 2, after, before, scale=(2 / before) ** 0.5), self.blended(
            points, 2, after, scale=0.1
        )

    def labels(self, samples: int, classes: int) -> Tensor:
        return torch.randint(0, classes, (samples,), device=self.device)


def _linear(width: int) -> Callable[[_Sizes], Work]:
    def make(s: _Sizes) -> Work:
        points, rows, width_ = s(8, 2), s(60_000, 3), s(width, 17)
        weight, bias = s.layer(points, width_, width_)
        numbers = points * rows * width_
        return Work(
            "path_linear",
            (s.normal(points, rows, width_), weight, bias),
            {"activation": "relu"},
            4.0 * (2 * numbers + 2 * width_**2),
            2.0 * numbers * width_,
        )

    return make


def _combined(s: _Sizes) -> Work:
    points, rows, width = s(8, 2), s(60_000, 3), s(1024, 17)
    weight, bias = s.layer(points, width, width)
    x, numbers = s.blended(points, 2, rows, width), points * rows * width
    options = {"activation": "relu", "input_activation": "relu"}
    moved = 4.0 * (2 * rows * width + numbers + 2 * width**2)
    return Work("path_linear", (x, weight, bias), options, moved, 2.0 * numbers * width)


def _mlp(s: _Sizes) -> Work:
    from modeconn.kernels.path_mlp import PathLayer

    points, rows, width, depth = s(16, 2), s(60_000, 3), s(245, 17), s(9, 1)
    layers = [PathLayer(*s.layer(points, width, width), "relu", 0.01) for _ in range(depth)]
    layers.append(PathLayer(*s.layer(points, width, 10), "identity", 0.01))
    numbers = depth * width**2 + width * 10
    return Work(
        "path_mlp",
        (s.blended(points, 2, rows, width), layers, s.labels(rows, 10)),
        {"input_activation": "relu"},
        4.0 * (2 * rows * width + 2 * numbers),
        2.0 * points * rows * numbers,
    )


def _head(classes: int, width: int) -> Callable[[_Sizes], Work]:
    def make(s: _Sizes) -> Work:
        points, rows = s(8, 2), s(60_000 if classes < 100 else 4096, 3)
        width_, classes_ = s(width, 17), s(classes, 7)
        weight, bias = s.layer(points, width_, classes_)
        numbers = points * rows * width_
        return Work(
            "path_cross_entropy",
            (s.normal(points, rows, width_), weight, bias, s.labels(rows, classes_)),
            {},
            4.0 * (numbers + 2 * width_ * classes_),
            2.0 * numbers * classes_,
        )

    return make


def _logits(s: _Sizes) -> Work:
    points, rows, classes = s(1024, 2), s(60_000, 3), 10
    x = s.blended(points, 2, rows, classes)
    return Work(
        "path_cross_entropy",
        (x, None, None, s.labels(rows, classes)),
        {},
        4.0 * 2 * rows * classes,
        0.0,
    )


def _conv(s: _Sizes) -> Work:
    points, images, channels, side = s(8, 2), s(512, 2), s(64, 3), s(32, 4)
    x = s.normal(points, images, side, side, channels).permute(0, 1, 4, 2, 3)
    weight = s.blended(points, 2, channels, channels, 3, 3, scale=(2 / channels / 9) ** 0.5)
    scale, shift = (s.normal(points, channels) for _ in range(2))
    options = {"scale": scale, "shift": shift, "padding": (1, 1), "activation": "relu"}
    numbers = points * images * channels * side**2
    return Work("path_conv2d", (x, weight), options, 8.0 * numbers, 2.0 * numbers * channels * 9)


def _pool(s: _Sizes) -> Work:
    x = s.normal(s(8, 2), s(512, 2), s(32, 4), s(32, 4), s(64, 3)).permute(0, 1, 4, 2, 3)
    return Work("path_pool2d", (x, "max", (2, 2), (2, 2), (0, 0)), {}, 4.0 * x.numel() * 1.25, 0.0)


def _layer_norm(s: _Sizes) -> Work:
    points, width = s(8, 2), s(768, 17)
    x = s.normal(points, s(16_384, 3), width)
    return Work(
        "path_layer_norm",
        (x, s.blended(points, 2, width), s.blended(points, 2, width), 1e-5),
        {},
        8.0 * x.numel(),
        0.0,
    )


_FILES = {"path_layer_norm": "path_norm"}
WORKS: dict[str, Callable[[_Sizes], Work]] = {
    "linear 245, T 8, N 60000": _linear(245),
    "linear 1024, T 8, N 60000": _linear(1024),
    "linear 1024, combined input": _combined,
    "mlp 245x9-10, T 16, N 60000": _mlp,
    "cross_entropy 1024-10, T 8": _head(10, 1024),
    "cross_entropy 768-50257, T 8, N 4096": _head(50_257, 768),
    "cross_entropy of logits, T 1024": _logits,
    "conv2d 64-64 3x3 on 32x32, T 8, N 512": _conv,
    "pool2d max 2x2, T 8, N 512": _pool,
    "layer_norm 768, T 8, N 16384": _layer_norm,
}
