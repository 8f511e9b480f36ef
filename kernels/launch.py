"""Launching kernels: Triton itself, precisions, configurations and chunks of points."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError, out_of_memory

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as missing:
    raise ModeconnError(
        "the GPU kernels need Triton, which is not installed: pip install triton (Linux)"
    ) from missing

__all__ = [
    "INTERPRETED",
    "PRECISIONS",
    "blackwell",
    "chunks",
    "dot_precision",
    "launch",
    "multiply",
    "padded",
    "tl",
    "triton",
    "tuned",
    "why_not_built",
]

# Whether kernels run in Triton's interpreter, on the CPU: the environment said so when Triton was
# first imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# The `input_precision` of tl.dot for each precision. Three tf32 products carry 21 bits of each
# operand, so their error stays below that of adding up more than about fifty products in float32,
# at 2.5 times the rate of the CUDA cores; "ieee" is exact products on CUDA cores. Which is right
# for "float32" is the one choice that a GPU can still overrule.
PRECISIONS = {"float32": "tf32x3", "tf32": "tf32", "bf16": "bf16"}

if INTERPRETED:
    # Twice as fast without the search for integer overflow. NumPy's warnings, which `launch` turns
    # off, are about values that may be infinite.
    import numpy as np
    from triton.runtime import interpreter

    _builder = interpreter.interpreter_builder
    if hasattr(getattr(_builder, "options", None), "sanitize_overflow"):
        _builder.options = replace(_builder.options, sanitize_overflow=False)


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """Returns total + a @ b in float32, the operands rounded as the precision says."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "bf16_rounded":  # the interpreter cannot multiply bfloat16
        total = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


def dot_precision(precision: str) -> str:
    """Returns the `PRECISION` of `multiply` for a precision's name.

    Raises:
        ModeconnError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ModeconnError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    return "bf16_rounded" if INTERPRETED and precision == "bf16" else PRECISIONS[precision]


def launch(
    kernel: Any,
    programs: int | Callable[[dict[str, Any]], int],
    on: Tensor,
    /,
    *arguments: Any,
    **options: Any,
) -> None:
    """Starts a kernel on the device of a tensor.

    Args:
        programs: how many, at least one; or a function of the configuration.
    """
    grid = (lambda meta: (programs(meta),)) if callable(programs) else (programs,)
    with (
        torch.cuda.device_of(on),
        np.errstate(all="ignore") if INTERPRETED else contextlib.nullcontext(),
    ):
        kernel[grid](*arguments, **options)


@triton.jit
def _one(result):
    tl.store(result, 1.0)


@functools.cache
def why_not_built(device: torch.device) -> str:
    """Returns why no kernel can be built and started on a device, in one line; "" where one can.

    Triton compiles the start of each kernel by a C compiler with Python's headers, either of which
    a machine may lack. That is found here, by the smallest kernel, once for each device.
    """
    try:
        result = torch.zeros(1, device=device)
        launch(_one, 1, result, result)
        return "" if float(result) == 1.0 else "a kernel ran and wrote nothing"
    except Exception as error:  # a compiler, its output or a driver can fail in any way
        if out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def blackwell(device: torch.device) -> bool:
    """Whether a device is of compute capability 10 or later, where some configurations differ."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def tuned(configs: list[Any], key: list[str]) -> Callable[[Any], Any]:
    """Returns a decorator that chooses among configurations by measuring on the GPU, once per key.

    Without a GPU the kernel is returned as it is. Configurations differ in nothing that changes the
    order of a sum, so the choice changes no bit of the result.
    """
    return lambda kernel: (
        kernel if INTERPRETED else triton.autotune(configs, key=key, cache_results=True)(kernel)
    )


def padded(width: int, multiple: int = 16) -> int:
    """Rounds a width up to the next multiple."""
    return -(-width // multiple) * multiple


def chunks(points: int, bytes_per_point: int, budget: int) -> Iterator[slice]:
    """Yields the points in chunks whose temporary values fit a budget of bytes."""
    step = max(1, budget // max(1, bytes_per_point))
    for begin in range(0, points, step):
        yield slice(begin, min(begin + step, points))
