"""The C++ extension, imported when it is first used, and a clear reason where it is missing."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    import torch

# setup.py writes it where it could not build
_MISSING_NOTE = Path(__file__).parents[2] / "_native_missing.txt"


@functools.cache
def _load() -> tuple[Any, str]:
    """The extension and "", or None and the reason why there is none."""
    try:
        return importlib.import_module("modeconn._native"), ""
    except ModuleNotFoundError:
        if _MISSING_NOTE.exists():
            return None, _MISSING_NOTE.read_text(encoding="utf-8").strip()
        return (
            None,
            "it has not been built for this Python; `pip install -e .` in a checkout builds it",
        )
    except ImportError as error:
        return None, f"it was built but does not load: {error}"


def available() -> bool:
    """Whether the C++ extension is built and loads."""
    return _load()[0] is not None


def reason() -> str:
    """Why the C++ extension is not available, in one line; "" where it is."""
    return _load()[1]


def extension() -> Any:
    """The C++ extension itself, for the native backend.

    Raises:
        ModeconnError: it is not available.
    """
    module, problem = _load()
    if module is None:
        raise ModeconnError(f"the C++ extension modeconn._native is not available: {problem}")
    return module


def features() -> dict[str, bool | int]:
    """What this CPU offers.

    Returns:
        `avx2`, `fma`, `avx512f`, `avx512bw`, `avx512dq`, `avx512vl`: whether the CPU and the
            operating system
        allow them; `cores`: the number that this process may use; `l1d_bytes`, `l2_bytes`,
            `l3_bytes`: cache
        sizes as the first core sees them, 0 where the system does not tell.

    Raises:
        ModeconnError: the extension is not available.
    """
    return dict(extension().features())


def versions() -> dict[str, str | int]:
    """What the extension was built with.

    Returns:
        `modeconn`, `compiler`, `pybind11`: versions; `cplusplus`: the value of `__cplusplus`;
        `instruction_sets`: those that the compiler could build code for, space-separated;
            `sanitizers`: "" in
        a normal build.

    Raises:
        ModeconnError: the extension is not available.
    """
    return dict(extension().versions())


def logsumexp(x: torch.Tensor) -> torch.Tensor:
    """Row-wise log-sum-exp, computed in float64 and shifted by each row's maximum.

    The input is read where it lies, whatever its strides; no gradient; the GIL is released
    meanwhile.

    Args:
        x: float32 or float64 tensor [rows, columns] on the CPU.

    Returns:
        float64 tensor [rows]. A row with a NaN gives NaN, otherwise one with +inf gives +inf; a row
            of -inf
        alone, or of no columns, gives -inf.

    Raises:
        ModeconnError: the extension is not available; x is on another device, requires a gradient,
            is not 2-dimensional, or has another dtype.
    """
    import torch

    module = extension()
    if x.device.type != "cpu":
        raise ModeconnError(f"logsumexp: x must be on the CPU; it is on {x.device}")
    if x.requires_grad:
        raise ModeconnError("logsumexp: has no gradient, and x requires one; pass x.detach()")
    if x.ndim != 2:
        raise ModeconnError(
            f"logsumexp: x must have 2 dimensions, [rows, columns]; its shape is {list(x.shape)}"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise ModeconnError(f"logsumexp: x must be float32 or float64; its dtype is {x.dtype}")
    return torch.from_numpy(module.logsumexp(x.numpy()))
