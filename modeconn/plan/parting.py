"""Points of a segment part, and those that have a prefix of the network in common share it.

Points are told apart by what moves: a node's weights are the same at two points where the tensors
that they are made of have the same coefficients there. The points that part at a node are either
left on one segment, on which all behind the node varies, or taken to segments of their own, on
which the node is constant: there its value is computed once for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Graph, Node
from modeconn.capture.optimisations import current
from modeconn.plan.cost import flops
from modeconn.plan.program import Segment
from modeconn.plan.segment_weights import SegmentWeights
from modeconn.plan.weights import Contents


@dataclass(eq=False)
class Branch:
    """Points that have all weights before a node in common.

    Attributes:
        source: of the node at which they part; "" where they are alike to the end.
        points: how many there are.
        own: those of them that make a segment here, by their places on the parted one.
        parts: those that go on together behind the node.
        cost: arithmetic per row from the node on, over all points, as it is estimated.
        segment: the number of the segment of `own`.
    """

    source: str
    points: int
    own: np.ndarray
    parts: list[Branch] = field(default_factory=list)
    cost: float = 0.0
    segment: int = -1

    def all(self) -> Iterator[Branch]:
        """Yield this branch and all within it, each before its parts."""
        pending = [self]
        while pending:
            branch = pending.pop()
            yield branch
            pending += reversed(branch.parts)


class Parting:
    """Divides the segments of a path where some of their points have a prefix in common.

    Args:
        graph: the network.
        contents: of the control points.
    """

    def __init__(self, graph: Graph, contents: Contents) -> None:
        self._graph, self._contents = graph, contents
        self._nodes = [node for node in graph.nodes if node.entries]
        on = current()
        self._idle = not (contents.by_content and on.parting and on.constant and on.sharing)

    def parted(
        self, empty: Segment, tables: Mapping[str, Tensor]
    ) -> tuple[list[Segment], Branch | None]:
        """Return the segments that the points of one are better divided into, and their tree.

        Args:
            empty: the segment, without steps. It is returned alone, with no tree, where nothing
                that is worth sharing moves for some of its points only.
            tables: entries with a tensor of their own at each of its points.
        """
        if self._idle or len(empty.point_indices) < 2:
            return [empty], None
        tree = self._tree(_Kinds(self._nodes, self._contents, empty, tables))
        found = [branch for branch in tree.all() if len(branch.own)]
        if len(found) == 1:
            return [empty], None
        segments = []
        for branch in found:
            coefficients = empty.coefficients[branch.own]
            active = np.flatnonzero((coefficients != 0).any(0))
            active = active if len(active) else np.zeros(1, np.int64)
            segments.append(
                replace(
                    empty,
                    point_indices=empty.point_indices[branch.own],
                    active=tuple(empty.active[k] for k in active),
                    coefficients=coefficients[:, active],
                )
            )
        return segments, tree

    def _tree(self, kinds: _Kinds) -> Branch:
        """The tree of a segment's points, without the branches that save nothing.

        It is as deep as the network at most, and so it is no recursion.
        """
        root = kinds.parting(kinds.everyone, 0)
        growing = [root]
        for node in growing:
            growing += node.divided(kinds)
        for node in reversed(growing):  # parts before what they are parts of
            self._settle(node)
        return root.branch

    def _settle(self, node: _Parted) -> None:
        """Find what a branch costs, and take back the parts that do not pay."""
        if node.place is None:
            node.branch.own = node.points
            return
        own_cost, behind = self._costs[0][node.place], self._costs[1][node.place]
        alone = node.alone
        for part in node.parts:
            part.branch.cost += own_cost
            if part.branch.cost < len(part.points) * behind:
                node.branch.parts.append(part.branch)
            else:
                alone.append(part.points)
        left = np.sort(np.concatenate(alone)) if alone else node.points[:0]
        cost = len(left) * behind + min(len(alone), 2) * own_cost
        node.branch.own = left
        node.branch.cost = cost + sum(part.cost for part in node.branch.parts)

    @functools.cached_property
    def _costs(self) -> tuple[np.ndarray, np.ndarray]:
        """Arithmetic per row of each node that has weights, and of all that is behind it."""
        costs = np.zeros(len(self._graph.nodes))
        places = []
        for place, node in enumerate(self._graph.nodes):
            if node.batched:
                tensors = [self._contents.tensor(name, 0) for name in node.entries]
                costs[place] = flops(node, tensors, node.numel())
            if node.entries:
                places.append(place)
        behind = np.append(np.cumsum(costs[::-1])[::-1], 0.0)
        where = np.array(places, np.int64)
        return costs[where], behind[where + 1]


@dataclass(eq=False)
class _Parted:
    """A branch while the tree grows.

    Attributes:
        points: of the segment, by their places.
        place: of the node at which they part, among those with weights; None for none.
        branch: what it becomes.
        alone: points, kind by kind, that leave the branch here.
        parts: those that go on together.
    """

    points: np.ndarray
    place: int | None
    branch: Branch
    alone: list[np.ndarray] = field(default_factory=list)
    parts: list[_Parted] = field(default_factory=list)

    def divided(self, kinds: _Kinds) -> list[_Parted]:
        """Return the parts of two points or more in which the node's weights are the same."""
        if self.place is None:
            return []
        numbers = kinds.at(self.place)[self.points]
        for kind in dict.fromkeys(numbers.tolist()):
            alike = self.points[numbers == kind]
            if len(alike) > 1:
                self.parts.append(kinds.parting(alike, self.place + 1))
            else:
                self.alone.append(alike)
        return self.parts


class _Kinds:
    """At which points of a segment the weights of nodes are the same."""

    def __init__(
        self,
        nodes: Sequence[Node],
        contents: Contents,
        empty: Segment,
        tables: Mapping[str, Tensor],
    ) -> None:
        self._nodes, self._contents, self._tables = nodes, contents, tables
        self._weights = SegmentWeights(contents, empty, tables)
        self.everyone = np.arange(len(empty.point_indices))
        self._found: dict[int, np.ndarray] = {}

    def parting(self, points: np.ndarray, first: int) -> _Parted:
        """Return the branch of points that have the weights of all nodes before one in common."""
        for place in range(first, len(self._nodes)):
            numbers = self.at(place)[points]
            if bool((numbers != numbers[0]).any()):
                source = self._nodes[place].source
                return _Parted(points, place, Branch(source, len(points), points[:0]))
        return _Parted(points, None, Branch("", len(points), points))

    def at(self, place: int) -> np.ndarray:
        """Return a number for each point, equal where a node's weights are."""
        if place not in self._found:
            names = self._nodes[place].entries
            columns = [self._of_entry(name) for name in dict.fromkeys(names)]
            self._found[place] = _numbered(np.stack(columns, axis=1))
        return self._found[place]

    def _of_entry(self, name: str) -> np.ndarray:
        if name in self._tables:
            table = self._tables[name].flatten(1)
            rows: Sequence[int] = torch.unique(table, dim=0, return_inverse=True)[1].tolist()
            return np.array(rows)
        if self._contents.is_fixed(name):
            return np.zeros(len(self.everyone), np.int64)
        moving = self._weights.moving([name])
        tensors = [(self._weights.tensor(name, k, ()),) for k in moving]
        groups = self._weights.groups(moving, tensors)
        if not groups:
            return np.zeros(len(self.everyone), np.int64)
        return _numbered(np.stack([group.coefficients for group in groups], axis=1))


def _numbered(rows: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers
