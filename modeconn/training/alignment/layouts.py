"""Axes of tensors in terms of permutation groups: tensors permuted, taken apart, and written down.

A layout is an axis tree (plan/rules/axes.py) in its final form: a leaf that belongs to a group, or
to none; a product of layouts, the outermost first; or a sum, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.plan.rules import axes as trees
from modeconn.plan.rules.axes import ROWS, Atom, Axis

# By the name of a group: index [size], or [outer indices, size] where it lies within another one.
# Index i of what is permuted is index p[i] of what was given.
Permutations = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """An axis.

    Attributes:
        size: the number of indices; 0 where it depends on the number of samples.
        group: of a leaf, the group that permutes it; "" for none.
        kind: "leaf", "product" or "sum".
        parts: of a product or sum.
    """

    size: int
    group: str = ""
    kind: str = "leaf"
    parts: tuple[Layout, ...] = ()

    def names(self) -> list[str]:
        """The groups of its leaves, in order."""
        found = [self.group] if self.group else []
        for part in self.parts:
            found += part.names()
        return found


# Of each axis of a tensor.
Layouts = tuple[Layout, ...]


def names_of(axes: Iterable[Layout]) -> list[str]:
    """The groups of some axes, in order."""
    found: list[str] = []
    for axis in axes:
        found += axis.names()
    return found


def layouts_of(axes: Iterable[Axis], names: Mapping[Atom, str]) -> Layouts:
    """Return the layouts of a tensor's axes."""
    return tuple(layout_of(axis, names) for axis in axes)


def layout_of(axis: Axis, names: Mapping[Atom, str]) -> Layout:
    """Return the layout of an axis, whose atoms have names where they belong to a group."""
    axis = trees.resolve(axis)
    size = 0 if axis.size % ROWS == 0 else axis.size
    if not isinstance(axis, trees.Product | trees.Sum):
        return Layout(size, names.get(axis, "") if isinstance(axis, Atom) else "")
    parts = tuple(layout_of(part, names) for part in axis.parts)
    if not any(part.names() for part in parts):
        return Layout(size)
    return Layout(size, "", "product" if isinstance(axis, trees.Product) else "sum", parts)


# -- permuting -------------------------------------------------------------------------------------


def permuted(
    tensor: Tensor,
    axes: Layouts,
    permutations: Mapping[str, np.ndarray],
    within: Mapping[str, str],
    leaving: tuple[int, frozenset[str]] = (-1, frozenset()),
) -> Tensor:
    """Return a tensor with its axes permuted.

    Args:
        tensor: of the layout `axes`.
        permutations: of the groups; those that are missing are identities.
        within: by group, the group on whose index its permutation depends.
        leaving: an axis, and groups that do not permute it.
    """
    if _crosses(axes, within):
        kept = {k: p for k, p in permutations.items() if leaving[0] < 0 or k not in leaving[1]}
        whole = Layout(math.prod(axis.size for axis in axes), "", "product", axes)
        index = torch.from_numpy(_sources(whole, kept, within)).to(tensor.device)
        return tensor.reshape(-1)[index].reshape(tensor.shape)
    for place, axis in enumerate(axes):
        own = permutations
        if place == leaving[0]:
            own = {k: p for k, p in permutations.items() if k not in leaving[1]}
        if any(name in own for name in axis.names()):
            index = torch.from_numpy(_sources(axis, own, within)).to(tensor.device)
            tensor = tensor.index_select(place, index)
    return tensor


def _crosses(axes: Layouts, within: Mapping[str, str]) -> bool:
    """Whether a permutation along one axis depends on the index along another one."""
    for axis in axes:
        names = axis.names()
        if any(name in within and within[name] not in names for name in names):
            return True
    return False


def _sources(
    layout: Layout, permutations: Mapping[str, np.ndarray], within: Mapping[str, str]
) -> np.ndarray:
    """For each index of the permuted axis, the index that it comes from."""
    new = np.arange(layout.size)
    seen: dict[str, np.ndarray] = {}
    _note(layout, new, new, seen, layout.size)

    def sources(part: Layout, new: np.ndarray, at: np.ndarray) -> np.ndarray:
        if part.kind == "product":
            sizes = [each.size for each in part.parts]
            digits = zip(part.parts, np.unravel_index(new, sizes))
            old = [sources(each, digit, at) for each, digit in digits]
            index: np.ndarray = np.ravel_multi_index(old, sizes)
            return index
        if part.kind == "sum":
            result = np.empty_like(new)
            for each, start, here in _pieces(part, new):
                result[here] = start + sources(each, new[here] - start, at[here])
            return result
        index = permutations.get(part.group, new)
        if index is new:
            return new
        outer = within.get(part.group)
        taken: np.ndarray = index[new] if outer is None else index[seen[outer][at], new]
        return taken

    return sources(layout, new, new)


def _note(
    layout: Layout, new: np.ndarray, at: np.ndarray, seen: dict[str, np.ndarray], whole: int
) -> None:
    """Note the index along each group's leaf, by place in the whole axis."""
    if layout.kind == "product":
        digits = np.unravel_index(new, [part.size for part in layout.parts])
        for part, digit in zip(layout.parts, digits):
            _note(part, digit, at, seen, whole)
    elif layout.kind == "sum":
        for part, start, here in _pieces(layout, new):
            _note(part, new[here] - start, at[here], seen, whole)
    elif layout.group:
        seen.setdefault(layout.group, np.zeros(whole, np.int64))[at] = new


def _pieces(layout: Layout, new: np.ndarray) -> Iterator[tuple[Layout, int, np.ndarray]]:
    """The parts of a sum, each with its start and which of some indices are its own."""
    start = 0
    for part in layout.parts:
        yield part, start, (new >= start) & (new < start + part.size)
        start += part.size


# -- taking apart ----------------------------------------------------------------------------------


# A part of a tensor, and for each axis of it the group, "" for none, and the tensor's axis.
Exposed = tuple[Tensor, list[str], list[int]]


def exposed(tensor: Tensor, axes: Sequence[Layout]) -> Iterator[Exposed]:
    """Yield parts of a tensor in which each group has an axis of its own.

    Yields:
        a part; for each of its axes the group that permutes it, "" for none; and for each of its
        axes the axis of the tensor that it is, or is a part of.
    """
    return _exposed(tensor, list(axes), list(range(len(axes))))


def _exposed(tensor: Tensor, axes: list[Layout], places: list[int]) -> Iterator[Exposed]:
    for i, axis in enumerate(axes):
        if axis.kind == "sum":
            start = 0
            for part in axis.parts:
                piece = tensor.narrow(i, start, part.size)
                yield from _exposed(piece, [*axes[:i], part, *axes[i + 1 :]], places)
                start += part.size
            return
        if axis.kind == "product":
            sizes = [part.size or -1 for part in axis.parts]
            around = [*axes[:i], *axis.parts, *axes[i + 1 :]]
            again = [*places[:i], *[places[i]] * len(axis.parts), *places[i + 1 :]]
            yield from _exposed(tensor.unflatten(i, sizes), around, again)
            return
    yield tensor, [axis.group for axis in axes], places


# -- written down ----------------------------------------------------------------------------------


def as_json(layout: Layout) -> Any:
    """Return a layout as JSON: a size, [group, size], or {"product" or "sum": parts}."""
    if layout.kind != "leaf":
        return {layout.kind: [as_json(part) for part in layout.parts]}
    return [layout.group, layout.size] if layout.group else layout.size


def from_json(value: Any, name: str) -> Layout:
    """Return the layout that `as_json` wrote.

    Raises:
        ModeconnError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Layout(value)
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        if isinstance(value[1], int) and value[1] >= 1:
            return Layout(value[1], value[0])
    if isinstance(value, dict) and len(value) == 1:
        ((kind, parts),) = value.items()
        if kind in ("product", "sum") and isinstance(parts, list) and parts:
            return _joined(kind, [from_json(part, name) for part in parts])
    raise ModeconnError(
        f"{name}: {value!r} is no layout of an axis: expected a size, [group, size], or "
        '{"product": …} or {"sum": …} of some'
    )


def _joined(kind: str, parts: Iterable[Layout]) -> Layout:
    parts = tuple(parts)
    sizes = [part.size for part in parts]
    return Layout(math.prod(sizes) if kind == "product" else sum(sizes), "", kind, parts)
