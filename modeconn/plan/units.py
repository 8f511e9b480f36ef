"""Parts of values: units (or channels, heads, tokens), by their indices along axes.

A part is the product of index sets, one for each axis that is cut down. So a rule can look at one
axis after the other, and two parts of a value have a smallest part that holds both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np

from modeconn.capture.graph import Dim, Size

# The sizes of a value: the batch axis and what follows from it are `Size`.
Shape = tuple[Dim, ...]


def static(dim: Dim) -> int:
    """A size that does not depend on the number of rows, as those along axes with units are."""
    if isinstance(dim, Size):
        raise TypeError(f"the size {dim} depends on the number of rows")
    return dim


class Units:
    """Some indices along some axes of a value, in rising order; all along the others.

    Args:
        along: the kept indices by axis.
    """

    def __init__(self, along: Mapping[int, np.ndarray]) -> None:
        self.along = dict(sorted(along.items()))

    @functools.cached_property
    def key(self) -> tuple[tuple[int, bytes], ...]:
        """Equal for equal units."""
        return tuple((axis, index.tobytes()) for axis, index in self.along.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __bool__(self) -> bool:
        return bool(self.along)

    def get(self, axis: int) -> np.ndarray | None:
        """The indices along an axis, None for all of them."""
        return self.along.get(axis)

    def without(self, *axes: int) -> Units:
        """These units, with all indices along some axes."""
        return Units({axis: index for axis, index in self.along.items() if axis not in axes})

    def of(self, shape: Shape) -> Units:
        """These units of a value of some shape, without axes along which all indices are kept."""
        items = self.along.items()
        return Units({axis: kept for axis, kept in items if len(kept) < static(shape[axis])})

    def shape(self, whole: Shape) -> Shape:
        """The part's shape, of a value of shape `whole`."""
        kept = {axis: len(index) for axis, index in self.along.items()}
        return tuple(kept.get(axis, size) for axis, size in enumerate(whole))

    def share(self, whole: Shape) -> float:
        """The part's size as a share of the whole value's."""
        items = self.along.items()
        return math.prod(len(index) / max(static(whole[axis]), 1) for axis, index in items)

    def union(self, other: Units) -> Units:
        """The smallest part that holds both."""
        both = self.along.keys() & other.along.keys()
        return Units({axis: np.union1d(self.along[axis], other.along[axis]) for axis in both})

    def within(self, other: Units) -> Units:
        """Returns where these are in a part that holds them: positions instead of indices."""
        places: dict[int, np.ndarray] = {}
        for axis, index in self.along.items():
            kept = other.get(axis)
            place = index if kept is None else np.searchsorted(kept, index)
            if kept is None or len(index) < len(kept):
                places[axis] = place
        return Units(places)


# Nothing is cut down.
ALL = Units({})


def regrouped(units: Units, before: Shape, after: Shape) -> Units | None:
    """Expresses a part of a value in a view of it: in [N, H·D] → [N, H, D], whole heads are heads.

    Args:
        before, after: shapes of the value and of its view, with the same numbers in the same order.

    Returns:
        None where it is not a product of index sets there.
    """
    result: dict[int, np.ndarray] = {}
    for axes, others in axis_runs(before, after):
        if not any(axis in units.along for axis in axes):
            continue
        sizes, targets = [before[a] for a in axes], [after[a] for a in others]
        if not _all_static(sizes) or not _all_static(targets):
            return None
        flat = _flat_indices(units, axes, before)
        places = [np.unique(place) for place in np.unravel_index(flat, targets)]
        if math.prod(map(len, places)) != len(flat):
            return None
        result |= {a: place for a, place, size in zip(others, places, targets) if len(place) < size}
    return Units(result)


def covering(units: Units, before: Shape, after: Shape) -> Units:
    """Returns the smallest part of a value that holds a part of its view and is one of the view.

    A head that is needed in some units is needed in all of them, where heads are an axis of the
    value.
    """
    result: dict[int, np.ndarray] = {}
    for axes, others in axis_runs(after, before):
        part = Units({axis: units.along[axis] for axis in axes if axis in units.along})
        exact = regrouped(part, after, before)
        result |= (_rounded(part, before, after, axes, others) if exact is None else exact).along
    return Units(result)


def _rounded(
    units: Units, before: Shape, after: Shape, axes: Sequence[int], others: Sequence[int]
) -> Units:
    """Rounds units along the axes of one group up to a part of the value and of its view.

    Args:
        axes, others: the group, as axes of the view and of the value.
    """
    sizes, targets = [after[a] for a in axes], [before[a] for a in others]
    if not _all_static(sizes) or not _all_static(targets):
        return ALL
    places = np.unravel_index(_flat_indices(units, axes, after), targets)
    along = {a: np.unique(place) for a, place in zip(others, places)}
    # Cut down along all axes if that is a part of the view, else along the first that will do.
    candidates = [along, *({a: index} for a, index in along.items())]
    parts = [Units(candidate).of(before) for candidate in candidates]
    return next((part for part in parts if regrouped(part, before, after) is not None), ALL)


def _all_static(sizes: Sequence[Dim]) -> TypeGuard[Sequence[int]]:
    return not any(isinstance(size, Size) for size in sizes)


def _flat_indices(units: Units, axes: Sequence[int], shape: Shape) -> np.ndarray:
    """The indices of a part along some axes, as those of a single axis that they make up."""
    sizes = [static(shape[axis]) for axis in axes]
    kept = [units.along.get(axis, np.arange(size)) for axis, size in zip(axes, sizes)]
    flat: np.ndarray = np.ravel_multi_index(np.ix_(*kept), sizes).reshape(-1)
    return flat


# Sizes are compared at these numbers of rows, primes that no layer's width is likely to have.
_ROWS = (1009, 1013)


@functools.lru_cache(maxsize=1024)  # the layers of a network have few different shapes
def axis_runs(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Splits the axes of two views into the shortest runs that have equally many numbers."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        axes = [i] if i < len(before) else []
        others = [j] if j < len(after) else []
        while not (axes and others and counts(before, axes) == counts(after, others)):
            i, j = (axes[-1] + 1 if axes else i), (others[-1] + 1 if others else j)
            shorter = counts(before, axes) <= counts(after, others)
            if i < len(before) and (shorter or j == len(after)):
                axes.append(i)
            elif j < len(after):
                others.append(j)
            else:
                break
        groups.append((axes, others))
        i, j = (axes[-1] + 1 if axes else i), (others[-1] + 1 if others else j)
    return groups


def counts(shape: Shape, axes: Sequence[int]) -> tuple[int, ...]:
    """Returns how many numbers some axes have together, at each of two numbers of rows."""
    sizes = [shape[axis] for axis in axes]
    found = []
    for rows in _ROWS:
        filled = [size.of(rows) if isinstance(size, Size) else size for size in sizes]
        found.append(math.prod(filled))
    return tuple(found)
