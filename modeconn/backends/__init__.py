"""The backends by name: where each is, what it offers, and which one "auto" takes.

A backend is imported when it is first asked for. A new one needs its module, with a class as
`modeconn.backends.base.Backend` describes it, and one line in `REGISTRY`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import cast

import torch

from modeconn.backends.base import Backend, Request, attempt
from modeconn.backends.extreme import Careful
from modeconn.errors import CannotRun, ModeconnError, Unsupported
from modeconn.plan.program import Program


@dataclass(frozen=True)
class Registered:
    """A backend's place and what it offers.

    Attributes:
        module, class_name: where its class is, imported when it is asked for.
        outputs: whether it gives outputs, and not only sums of losses and errors.
        gradients: whether its outputs can be differentiated.
        reduced: the precisions below float32 that it multiplies in on a CUDA device.
        automatic: the type of device on which "auto" tries it before the reference backend.
    """

    module: str
    class_name: str
    outputs: bool = True
    gradients: bool = False
    reduced: tuple[str, ...] = ()
    automatic: str | None = None

    def load(self) -> type[Backend]:
        """The backend's class."""
        return cast("type[Backend]", getattr(importlib.import_module(self.module), self.class_name))


# In the order of the help texts. "auto" prefers the first with gradients, where they are requested.
REGISTRY = {
    "reference": Registered(
        "modeconn.backends.reference", "ReferenceBackend", gradients=True, reduced=("tf32",)
    ),
    "native": Registered("modeconn.backends.native.backend", "NativeBackend", automatic="cpu"),
    "triton": Registered(
        "modeconn.backends.triton.backend",
        "TritonBackend",
        gradients=True,
        reduced=("tf32", "bf16"),
        automatic="cuda",
    ),
    # "auto" does not take it before a measurement says that it wins.
    "cuda": Registered(
        "modeconn.backends.cuda", "CudaBackend", outputs=False, reduced=("tf32", "bf16")
    ),
}
NAMES = tuple(REGISTRY)


def check_name(name: str, precision: str = "float32", device: torch.device | None = None) -> None:
    """Checks that a backend exists and has a precision on a device.

    Raises:
        ModeconnError: it does not.
    """
    if name not in ("auto", *NAMES):
        raise ModeconnError(
            f'backend {name!r} is unknown: expected "auto" or one of {", ".join(NAMES)}'
        )
    if precision not in ("tf32", "bf16"):
        return
    able = [other for other, backend in REGISTRY.items() if precision in backend.reduced]
    on_gpu = device is not None and device.type == "cuda"
    # Kernels run on the CPU too, emulated; PyTorch has no such products there.
    if name in able and (on_gpu or name != "reference"):
        return
    if name == "auto" and on_gpu:
        return
    kernels = " and ".join(other for other in able if other != "reference")
    raise ModeconnError(
        f"precision {precision!r} is not one of backend {name!r} on {device}: expected float32 or "
        f"float64; on a CUDA device {kernels} multiply in tf32 or bf16, and reference in tf32"
    )


def make_backend(
    name: str,
    program: Program,
    dtype: torch.dtype,
    device: torch.device,
    precision: str = "float32",
    needs: str = "sums",
) -> Backend:
    """Makes the backend of that name; "auto" takes the first of its candidates that can run.

    Args:
        needs: "sums" of losses and errors, "outputs", or outputs with "gradients".

    Raises:
        CannotRun: that backend cannot run the program.
    """
    check_name(name, precision, device)
    reason = ""
    candidates = [name] if name != "auto" else _automatic(precision, device, needs)
    for candidate in candidates:
        request = Request(program, dtype, device, precision, needs == "gradients", name != "auto")
        found = attempt(functools.partial(_create, candidate, request, needs))
        if not isinstance(found, Unsupported):
            # Of a GPU the answer would have to be waited for; gradients go through other weights.
            looks = device.type == "cpu" and needs != "gradients" and program.plain is not None
            return cast("Backend", Careful(found, request)) if looks else found
        reason = str(found)
    raise CannotRun(candidates[-1], reason)


def _automatic(precision: str, device: torch.device, needs: str) -> list[str]:
    """The backends that "auto" tries, in order.

    For gradients PyTorch's operations come first: they differentiate every operation, and the
    kernels only some.
    """
    reduced = precision in ("tf32", "bf16")
    able = [
        name for name, backend in REGISTRY.items() if not reduced or precision in backend.reduced
    ]
    if needs == "gradients":
        return [name for name in able if REGISTRY[name].gradients]
    here = "cuda" if device.type == "cuda" else "cpu"
    fast = [name for name in able if REGISTRY[name].automatic == here]
    return fast + [name for name in able if name == "reference"]


def _create(name: str, request: Request, needs: str) -> Backend:
    registered = REGISTRY[name]
    if needs == "gradients" and not registered.gradients:
        raise Unsupported("it computes no gradients")
    if needs == "outputs" and not registered.outputs:
        raise Unsupported("its kernel gives sums of losses and errors, no outputs")
    backend = registered.load()
    backend.supports(request)
    return backend.create(request)
