"""Random choices, by a seed or by hypothesis, which then finds the smallest case that fails."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Draw(Protocol):
    """A source of choices."""

    def whole(self, least: int, most: int) -> int:
        """A whole number, both ends included."""

    def pick(self, options: Sequence[T]) -> T:
        """One of several; the first is the simplest."""


class Seeded:
    """Choices by a seed: millions of cases, each repeated by its number."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def whole(self, least: int, most: int) -> int:
        return self._random.randint(least, most)

    def pick(self, options: Sequence[T]) -> T:
        return options[self._random.randrange(len(options))]


class Shrinking:
    """Choices by hypothesis.

    Args:
        data: what `hypothesis.strategies.data()` gives a test.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    def whole(self, least: int, most: int) -> int:
        from hypothesis import strategies

        return int(self._data.draw(strategies.integers(least, most)))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.whole(0, len(options) - 1)]


def chance(draw: Draw, percent: int) -> bool:
    """True in so many of a hundred cases; False is the simpler one."""
    return draw.whole(0, 99) >= 100 - percent
