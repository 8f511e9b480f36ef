"""The backends, by name. Each is imported when it is asked for; all have the methods of `ReferenceBackend`."""

from __future__ import annotations

import torch

from modeconn.backends.reference import ReferenceBackend
from modeconn.errors import ModeconnError
from modeconn.plan.program import Program

NAMES = ("reference", "native", "cuda")


def check_name(name: str) -> None:
    """Raise a ModeconnError for a backend that does not exist."""
    if name not in ("auto", *NAMES):
        raise ModeconnError(f'backend {name!r} is unknown: expected "auto" or one of {", ".join(NAMES)}')


def make_backend(name: str, program: Program, dtype: torch.dtype, device: torch.device) -> ReferenceBackend:
    """The backend of that name; "auto" takes the fastest that runs the program."""
    check_name(name)
    if name == "cuda":  # "auto" does not take it before a measurement says that it wins
        from modeconn.backends.cuda import CudaBackend

        return CudaBackend(program, dtype, device)
    if name != "reference":
        from modeconn.backends.native import CannotRun, NativeBackend

        try:
            return NativeBackend(program, dtype, device, every=name == "native")
        except CannotRun:
            if name == "native":
                raise
    return ReferenceBackend(program, dtype, device)
