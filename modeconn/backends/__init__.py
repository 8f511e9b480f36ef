"""The backends, by name. Each is imported when it is asked for; all have the methods of `ReferenceBackend`."""

from __future__ import annotations

import torch

from modeconn.backends.reference import ReferenceBackend
from modeconn.errors import CannotRun, ModeconnError
from modeconn.plan.program import Program

NAMES = ("reference", "native", "triton", "cuda")
# Those with kernels for products of tf32 and bf16.
_REDUCED = ("triton", "cuda")


def check_name(name: str, precision: str = "float32", device: torch.device | None = None) -> None:
    """Raise a ModeconnError for a backend that does not exist, or that does not have a precision on a device."""
    if name not in ("auto", *NAMES):
        raise ModeconnError(
            f'backend {name!r} is unknown: expected "auto" or one of {", ".join(NAMES)}'
        )
    if precision not in ("tf32", "bf16") or name in _REDUCED:
        return
    on_gpu = device is not None and device.type == "cuda"
    if not on_gpu or name == "native" or (name == "reference" and precision == "bf16"):
        raise ModeconnError(
            f"precision {precision!r} is not one of backend {name!r} on {device}: expected float32 or float64; on a CUDA "
            f"device {' and '.join(_REDUCED)} multiply in tf32 or bf16, and reference in tf32"
        )


def make_differentiable(
    name: str,
    program: Program,
    dtype: torch.dtype,
    device: torch.device,
    precision: str = "float32",
) -> ReferenceBackend:
    """The backend of that name, whose outputs can be differentiated; "auto" takes PyTorch's operations where they can do it.

    Raises:
        CannotRun: that backend computes no gradients, or cannot run the program.
    """
    check_name(name, precision, device)
    if name == "triton" or (name == "auto" and precision == "bf16"):
        from modeconn.backends.triton.backend import TritonBackend

        return TritonBackend(program, dtype, device, precision, gradients=True)
    if name in ("native", "cuda"):
        raise CannotRun(name, "it computes no gradients")
    return ReferenceBackend(program, dtype, device)


def make_backend(
    name: str,
    program: Program,
    dtype: torch.dtype,
    device: torch.device,
    precision: str = "float32",
) -> ReferenceBackend:
    """The backend of that name; "auto" takes the fastest that runs the program.

    Raises:
        CannotRun: that backend cannot run the program.
    """
    check_name(name, precision, device)
    if name == "cuda":  # "auto" does not take it before a measurement says that it wins
        from modeconn.backends.cuda import CudaBackend

        return CudaBackend(program, dtype, device, precision)
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from modeconn.backends.triton.backend import TritonBackend

        try:
            return TritonBackend(program, dtype, device, precision)
        except CannotRun:
            if name == "triton" or precision == "bf16":
                raise
    if name == "native" or (name == "auto" and device.type != "cuda"):
        from modeconn.backends.native.backend import NativeBackend

        try:
            return NativeBackend(program, dtype, device, every=name == "native")
        except CannotRun:
            if name == "native":
                raise
    return ReferenceBackend(program, dtype, device)
