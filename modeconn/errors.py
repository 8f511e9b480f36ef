"""The exceptions that bad input raises."""

from __future__ import annotations


class ModeconnError(ValueError):
    """Bad input: one line that names the thing, its value, and what was expected."""


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
