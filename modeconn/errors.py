"""Exceptions that bad input raises, warnings, and words that their messages share."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence

# Items that one message spells out.
_LISTED = 4


class ModeconnError(ValueError):
    """Bad input: one line that names the thing, its value, and what was expected."""


class SystemFailure(ModeconnError):
    """The system could not do what was asked for: a full disk, say, or a missing permission."""


class OutOfMemory(SystemFailure, MemoryError, RuntimeError):
    """Memory of the host or of a device is used up; the text says by what, and what takes less.

    It is what Python and PyTorch raise, too, so that handlers of those work.
    """


class CannotRun(ModeconnError):
    """A backend can run nothing of a program; the text says why."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(backend, reason)

    def __str__(self) -> str:
        backend, reason = self.args
        return f'backend "{backend}" cannot run this: {reason}; ask for "reference" or "auto"'


class Unsupported(Exception):
    """A backend has no way to run an operation, a program or a device; the text says why.

    Raised where it is known. It is for the library alone: the caller tries another way, or makes a
    `CannotRun` of it.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device is used up.

    It says nothing of a model or a file, then, and is passed on as it is.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(words in text for words in ("allocate memory", "not enough memory"))


@contextlib.contextmanager
def naming_memory(what: str, remedy: str) -> Iterator[None]:
    """Within, an error of used-up memory says what asked for how much, and what takes less.

    Args:
        what: was done, "while …".
        remedy: what takes less, "expected …".

    Raises:
        OutOfMemory: in place of such an error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModeconnError) or not out_of_memory(error):
            raise
        lines = str(error).splitlines() or ["no more to be had"]
        asked = next((line for line in lines if "allocate" in line), lines[0]).strip()
        raise OutOfMemory(f"out of memory while {what}: {asked}: {remedy}") from error


def listed(items: Sequence[str], of: int | None = None) -> str:
    """Join the first few items, and say how many more there are: "2 of 22: x; y"."""
    count = f"{len(items):,} of {of:,}: " if of else ""
    more = f"; and {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return count + "; ".join(items[:_LISTED]) + more


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name as the place the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_own(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]
