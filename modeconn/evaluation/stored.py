"""Values of a result as files hold them: read with their types checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Fields that are plain JSON values.
PLAIN = ("samples", "passes", "backend", "seconds", "info")
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Barrier(float):
    """The height of a barrier, a number, with how its maximum was found.

    Attributes:
        found: text, such as "largest of 101 points".
    """

    found: str

    def __new__(cls, height: float, found: str) -> Barrier:
        made = super().__new__(cls, height)
        made.found = found
        return made

    def __reduce__(self) -> tuple[type[Barrier], tuple[float, str]]:
        return Barrier, (float(self), self.found)


def encoded(value: Any) -> Any:
    """Return JSON values for numbers, or lists of them: text for those that are not finite."""
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf" or "-inf"
    return value


def plain_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are plain values, of the types that they have."""
    plain = {key: content[key] for key in PLAIN}
    for key in ("samples", "passes"):
        if type(plain[key]) is not int or plain[key] < 0:
            raise TypeError(f"{key} is {plain[key]!r}, expected a whole number")
    seconds = plain["seconds"] = float(decoded(plain["seconds"]))
    if not seconds >= 0:
        raise ValueError(f"seconds is {seconds}, expected at least 0")
    if not isinstance(plain["backend"], str):
        raise TypeError(f"backend is {plain['backend']!r}, expected a name")
    info = plain["info"]
    if not isinstance(info, dict) or not all(
        isinstance(value, (str, int, float)) for value in info.values()
    ):
        raise TypeError("info is no table of texts and numbers")
    return plain


def decoded(value: Any) -> np.ndarray:
    """Read numbers, or lists of them, of a file."""

    def number(item: Any) -> Any:
        if isinstance(item, list):
            return [number(inner) for inner in item]
        if isinstance(item, str):
            return _SPECIAL[item]
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise TypeError(f"{item!r} is no number")
        return item

    if isinstance(value, np.ndarray):
        if value.dtype != np.float64:
            raise TypeError(f"numbers are {value.dtype}, expected float64")
        return value
    return np.array(number(value), dtype=np.float64)
