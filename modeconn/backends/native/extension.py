"""The C++ extension, imported when it is first used, and a clear reason where it is missing."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from modeconn.backends.activations import mismatch
from modeconn.capture.optimisations import current
from modeconn.errors import ModeconnError

# setup.py writes it where it could not build
_MISSING_NOTE = Path(__file__).parents[2] / "_native_missing.txt"


@functools.cache
def _load() -> tuple[Any, str]:
    """The extension and "", or None and the reason why there is none."""
    try:
        module = importlib.import_module("modeconn._native")
    except ModuleNotFoundError:
        if _MISSING_NOTE.exists():
            return None, _MISSING_NOTE.read_text(encoding="utf-8").strip()
        return (
            None,
            "it has not been built for this Python; `pip install -e .` in a checkout builds it",
        )
    except ImportError as error:
        return None, f"it was built but does not load: {error}"
    problem = mismatch(module, "native")
    return (None, problem) if problem else (module, "")


def available() -> bool:
    """Whether the C++ extension is built, loads, and fits this version of the package."""
    return _load()[0] is not None


def reason() -> str:
    """Why the C++ extension is not available, in one line; "" where it is."""
    return _load()[1]


def extension() -> Any:
    """The C++ extension itself; modeconn/_native.pyi has its signatures.

    Raises:
        ModeconnError: it is not available.
    """
    module, problem = _load()
    if module is None:
        raise ModeconnError(f"the C++ extension modeconn._native is not available: {problem}")
    return module


def switches() -> dict[str, bool]:
    """Returns what a call into the engine is to leave out (capture/optimisations.py)."""
    return {} if current().winograd else {"winograd": False}
