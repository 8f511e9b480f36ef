"""Values as JSON holds them: numbers that are not finite are text, and what is read is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modeconn.errors import ModeconnError

# JSON has no numbers that are not finite: they are written as text.
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain(value: Any) -> Any:
    """Returns the JSON values of nested dicts, lists and tuples, numpy numbers included.

    Floats that are not finite become text.

    Raises:
        ModeconnError: something that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else _name_of(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise ModeconnError(
        f"a value of type {type(value).__name__} cannot be written as JSON: "
        "expected numbers, text, lists and dicts"
    )


def _name_of(value: float) -> str:
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def array(value: Any, count: int | None = None) -> list[Any]:
    """Returns a list, of some length if that is given; raises ValueError for anything else."""
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
        expected = "some" if count is None else count
        raise ValueError(f"a list of {expected} values was expected, got {got}")
    return list(value)


def numbers(value: Any, count: int) -> tuple[float, ...]:
    """Returns a list of `count` numbers; raises ValueError for anything else."""
    return tuple(number(item) for item in array(value, count))


def number(value: Any) -> float:
    """Returns a number, or the one that text stands for; raises ValueError for anything else."""
    if isinstance(value, str):
        if value not in _SPECIAL:
            raise ValueError(f"{value!r} is no number")
        return _SPECIAL[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def text(value: Any) -> str:
    """Returns text; raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
