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
