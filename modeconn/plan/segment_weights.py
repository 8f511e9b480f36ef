"""Parameters and buffers on one segment: fixed ones, and blends of control points."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Node
from modeconn.parameters.blending import blend
from modeconn.plan.program import Blend, Moving, PerPoint, Segment
from modeconn.plan.rules.base import Support
from modeconn.plan.weights import Contents, Cut

# Coefficients that differ by no more than this are rounding of one number: (1 - t) + t is not
# exactly 1 for every t. Eight units in the last place cover sums of a few such terms.
ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Group:
    """Active control points that have equal tensors.

    Attributes:
        points: their places among the active ones.
        tensors: those that they have.
        coefficients: the sum of theirs, over the segment's points.
    """

    points: list[int]
    tensors: tuple[Tensor, ...]
    coefficients: np.ndarray


@dataclass(frozen=True, eq=False)
class _Sum:
    """Coefficients over a segment's points: whether all are 0, all are 1, or all one number."""

    coefficients: np.ndarray
    zero: bool
    one: bool
    steady: bool


class SegmentWeights:
    """A path's parameters and buffers on one segment.

    Args:
        contents: of the control points.
        segment: gives the active control points and their coefficients.
        tables: parameters and buffers with a tensor of their own at each of the segment's points.
    """

    def __init__(self, contents: Contents, segment: Segment, tables: Mapping[str, Tensor]) -> None:
        self._contents, self._segment, self._tables = contents, segment, tables
        self.everyone = tuple(range(len(segment.active)))
        self._mixed: set[int] = set()  # ids of tensors
        self._sums: dict[tuple[int, ...], _Sum] = {}

    def tensor(self, name: str, k: int, cut: Cut) -> Tensor:
        """The tensor of the k-th active control point."""
        return self._contents.tensor(name, self._segment.active[k], cut)

    def moving(self, names: Sequence[str]) -> tuple[int, ...]:
        """The active control points that some entries are made of, by their places."""
        if not self._contents.apart:
            return self.everyone
        moves_with, active = self._contents.moves_with, self._segment.active
        found: set[int] = set()
        for name in names:
            found |= {k for k in self.everyone if moves_with(name, active[k])}
        return tuple(sorted(found)) or self.everyone[:1]

    def number(self, tensor: Tensor) -> int:
        """A number that stands for the tensor's content."""
        return self._contents.number(tensor)

    def combinable(self, node: Node, linear: frozenset[int]) -> bool:
        """Whether a value may be a combination over the control points' weights.

        Where a fixed entry is among those in which the value is linear, each summand holds it, and
        so the coefficients must sum to 1. Differences of far points are not taken up by plans whose
        weights change: those are materialized before they are used.
        """
        if self._segment.far and not self._contents.by_content:
            return False
        if not any(self._contents.is_fixed(node.entries[i]) for i in linear):
            return True
        columns = list(self.moving(node.entries))
        return sum_to_one(list(self._segment.coefficients[:, columns].T))

    def is_mixed(self, tensor: Tensor) -> bool:
        """Whether a tensor is fixed on the segment and yet that of no control point."""
        return id(tensor) in self._mixed

    def support(self, node: Node, points: Sequence[int]) -> Support:
        """The support of a node's weights over some of the active control points."""

        def support(entry: int, axis: int, cut: Cut) -> np.ndarray:
            tensors = [self.tensor(node.entries[entry], k, cut) for k in points]
            masks = [self._contents.support(tensor, axis) for tensor in tensors]
            live: np.ndarray = functools.reduce(np.logical_or, masks)
            return live

        return support

    def value(self, name: str, cut: Cut) -> Tensor | Moving:
        """Returns a tensor where nothing changes with t, else a blend of the different ones."""
        if name in self._tables:
            return self._tabulated(self._tables[name], cut)
        if self._contents.is_fixed(name):
            return self._contents.tensor(name, 0, cut)
        everyone = self.moving([name])
        tensors = [self.tensor(name, k, cut) for k in everyone]
        groups = self.groups(everyone, [(tensor,) for tensor in tensors])
        if not groups:
            return self._contents.unique(torch.zeros_like(tensors[0]))
        different = tuple(group.tensors[0] for group in groups)
        coefficients = tuple(group.coefficients for group in groups)
        sums = [self._summed(tuple(group.points)) for group in groups]
        alone = len(groups) == 1 and sums[0].one
        if not alone and not (self._contents.by_content and all(each.steady for each in sums)):
            return Blend(different, coefficients)
        fixed = self._contents.unique(blend(different, [each[0] for each in coefficients]))
        if not alone:
            self._mixed.add(id(fixed))
        return fixed

    def _tabulated(self, table: Tensor, cut: Cut) -> Tensor | PerPoint:
        for axis, index in enumerate(cut):
            if index is not None:
                table = table.index_select(axis + 1, torch.from_numpy(index).to(table.device))
        if bool((table == table[:1]).all()):
            return self._contents.unique(table[0].clone())
        return PerPoint(table)

    def groups(self, everyone: Sequence[int], tuples: Sequence[tuple[Tensor, ...]]) -> list[Group]:
        """Groups active control points by their tensors; leaves out those that are all zero.

        Args:
            everyone: the places of the control points.
            tuples: the tensors of each of them.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        given = dict(zip(everyone, tuples))
        for k, tensors in given.items():
            if not all(self._contents.is_zero(tensor) for tensor in tensors):
                key = tuple(self._contents.number(tensor) for tensor in tensors)
                members.setdefault(key, []).append(k)
        groups = []
        for points in members.values():
            summed = self._summed(tuple(points))
            if not summed.zero:
                groups.append(Group(points, given[points[0]], summed.coefficients))
        return groups

    def _summed(self, points: tuple[int, ...]) -> _Sum:
        """The coefficients of some active control points, added up."""
        found = self._sums.get(points)
        if found is None:
            summed = _unrounded(self._segment.coefficients[:, list(points)].sum(1))
            one, steady = bool((summed == 1.0).all()), bool(np.ptp(summed) == 0)
            found = self._sums[points] = _Sum(summed, not summed.any(), one, steady)
        return found


def sum_to_one(coefficients: Sequence[np.ndarray]) -> bool:
    """Whether coefficients sum to 1 at each of a segment's points."""
    difference = np.abs(sum(coefficients) - 1.0)
    return not bool((difference > ROUNDING * len(coefficients)).any())


def _unrounded(coefficients: np.ndarray) -> np.ndarray:
    """Coefficients of which those that are one number up to rounding are exactly one."""
    first = coefficients[0]
    if np.ptp(coefficients) > ROUNDING * np.abs(coefficients).max(initial=1.0):
        return coefficients
    return np.full_like(coefficients, 1.0 if abs(first - 1.0) <= ROUNDING else first)
