"""Where the points of a segment part: those that have a prefix of the network in common share it.

Points are told apart by what moves: a node's weights are the same at two points where the tensors
that they are made of have the same coefficients there. The points that part at a node are either
left on one segment, on which all behind the node varies, or taken to segments of their own, on
which the node is constant: there its value is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Graph
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
        """Yield this branch and all within it."""
        yield self
        for part in self.parts:
            yield from part.all()


def parted(
    graph: Graph, contents: Contents, empty: Segment, tables: Mapping[str, Tensor]
) -> tuple[list[Segment], Branch | None]:
    """Return the segments that the points of one are better divided into, and the tree of them.

    Args:
        empty: the segment, without steps. It is returned alone, with no tree, where nothing that
            is worth sharing moves for some of its points only.
        tables: entries with a tensor of their own at each of its points.
    """
    on = current()
    if not (contents.by_content and on.parting and on.constant and on.sharing):
        return [empty], None
    tree = _Parting(graph, contents, empty, tables).branch(np.arange(len(empty.point_indices)), 0)
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


class _Parting:
    """The nodes of a graph that have weights, and which points of a segment have the same there."""

    def __init__(
        self, graph: Graph, contents: Contents, empty: Segment, tables: Mapping[str, Tensor]
    ) -> None:
        self._weights = SegmentWeights(contents, empty, tables)
        self._tables, self._count = tables, len(empty.point_indices)
        self._contents = contents
        self._nodes = [node for node in graph.nodes if node.entries]
        costs = np.zeros(len(graph.nodes))
        for place, node in enumerate(graph.nodes):
            if node.batched:
                tensors = [contents.tensor(name, 0) for name in node.entries]
                costs[place] = flops(node, tensors, node.numel())
        place_of = {node.id: place for place, node in enumerate(graph.nodes)}
        places = [place_of[node.id] for node in self._nodes]
        behind = np.append(np.cumsum(costs[::-1])[::-1], 0.0)
        self._costs = costs[places]
        self._behind = behind[np.array(places, np.int64) + 1]
        self._alike: dict[int, np.ndarray] = {}

    def branch(self, points: np.ndarray, first: int) -> Branch:
        """Part some points, which have the weights of all nodes before the first in common."""
        for place in range(first, len(self._nodes)):
            kinds = self._kinds(place)[points]
            if len(points) > 1 and bool((kinds != kinds[0]).any()):
                return self._parted(points, kinds, place)
        return Branch("", len(points), points)

    def _parted(self, points: np.ndarray, kinds: np.ndarray, place: int) -> Branch:
        own, parts = [], []
        for kind in dict.fromkeys(kinds.tolist()):
            alike = points[kinds == kind]
            if len(alike) > 1:
                part = self.branch(alike, place + 1)
                part.cost += self._costs[place]
                if part.cost < len(alike) * self._behind[place]:
                    parts.append(part)
                    continue
            own.append(alike)
        left = np.sort(np.concatenate(own)) if own else points[:0]
        cost = len(left) * self._behind[place] + min(len(own), 2) * self._costs[place]
        cost += sum(part.cost for part in parts)
        return Branch(self._nodes[place].source, len(points), left, parts, cost)

    def _kinds(self, place: int) -> np.ndarray:
        """A number for each point, equal where a node's weights are."""
        if place not in self._alike:
            names = self._nodes[place].entries
            columns = [self._kinds_of(name) for name in dict.fromkeys(names)]
            self._alike[place] = _numbered(np.stack(columns, axis=1))
        return self._alike[place]

    def _kinds_of(self, name: str) -> np.ndarray:
        if name in self._tables:
            table = self._tables[name].flatten(1)
            rows: Sequence[int] = torch.unique(table, dim=0, return_inverse=True)[1].tolist()
            return np.array(rows)
        if self._contents.is_fixed(name):
            return np.zeros(self._count, np.int64)
        everyone = self._weights.moving([name])
        tensors = [(self._weights.tensor(name, k, ()),) for k in everyone]
        groups = self._weights.groups(everyone, tensors)
        if not groups:
            return np.zeros(self._count, np.int64)
        return _numbered(np.stack([group.coefficients for group in groups], axis=1))


def _numbered(rows: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers
