"""The one exception that bad input raises."""

from __future__ import annotations


class ModeconnError(ValueError):
    """Bad input: one line that names the thing, its value, and what was expected."""
