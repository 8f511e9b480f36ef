"""Rules of operations that take units as they come: each axis of the value goes with one axis of an input or entry.

What such an operation does along these axes it does index by index; along all others it may mix.
Number by number, by channel, along one axis, or head by head: the rule is the list of the axes that
go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modeconn.capture.graph import Entry, In, Node
from modeconn.plan.rules.base import (
    Fit,
    Linearity,
    Mismatch,
    Rule,
    Shapes,
    Support,
    cut_of,
    entries_of,
    resized,
)
from modeconn.plan.units import Shape, Units

# Axes of the value → axes of an input or entry.
Links = dict[int, int]
# A node and the shapes → the links of each input, and of each entry.
Linking = Callable[[Node, Shapes], tuple[list[Links], list[Links]]]


class Linked(Rule):
    """Units pass along the axes that go together."""

    def __init__(
        self,
        links: Linking,
        linear: str | Linearity = "",
        entries: Callable[[Node], frozenset[int]] | None = None,
    ) -> None:
        super().__init__(linear, entries)
        self._links = links

    def wants(self, node: Node, wanted: Units, shapes: Shapes, support: Support) -> list[Units]:
        inputs, _ = self._links(node, shapes)
        return [
            Units({links[a]: index for a, index in wanted.along.items() if a in links})
            for links in inputs
        ]

    def fit(self, node: Node, wanted: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        inputs, entries = self._links(node, shapes)
        along: dict[int, np.ndarray] = {}
        for axis in range(len(node.shape)):
            given = [units.get(links[axis]) for units, links in zip(have, inputs) if axis in links]
            if not given and any(axis in links for links in entries):  # a table's own features
                given = [wanted.get(axis)]
            if any(not np.array_equal(given[0], other) for other in given[1:]):  # type: ignore[arg-type]
                raise Mismatch
            if given and given[0] is not None:
                along[axis] = given[0]
        cuts = [
            cut_of(Units({links[a]: index for a, index in along.items() if a in links}), len(shape))
            for links, shape in zip(entries, shapes.entries)
        ]
        return Fit(Units(along), cuts, self.arguments(node, Units(along)))

    def arguments(self, node: Node, units: Units) -> dict[str, Any]:
        """The arguments that change with the units, by name: sizes among them."""
        return {}


class Elementwise(Linked):
    """Works number by number, with axes of one broadcast."""

    def __init__(
        self, linear: str | Linearity = "", entries: Callable[[Node], frozenset[int]] | None = None
    ) -> None:
        super().__init__(broadcast, linear, entries)


class Expand(Linked):
    """expand: the sizes that it names are those of the part."""

    def __init__(self) -> None:
        super().__init__(broadcast, "homogeneous", entries_of("self"))

    def arguments(self, node: Node, units: Units) -> dict[str, Any]:
        return {"size": resized(node["size"], units)}


def broadcast(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Axes from the last on go together where the sizes are equal."""

    def links(shape: Shape) -> Links:
        first = len(node.shape) - len(shape)
        return {
            first + a: a for a, size in enumerate(shape) if str(node.shape[first + a]) == str(size)
        }

    return [links(shape) for shape in shapes.inputs], [links(shape) for shape in shapes.entries]


def by_channel(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Channel by channel (axis 1): pooling, batch norm with given statistics. Entries are vectors over channels."""
    return [{1: 1}], [{1: 0} for _ in node.entries]


def along_dim(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """softmax: along one axis, and alike at each place of the others."""
    rank = len(node.shape)
    axis = node["dim"] % rank
    links = {a: a for a in range(rank) if a != axis}
    return [links] * len(node.inputs), [{} for _ in node.entries]


def over_last(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Layer norm: over as many of the last axes as its second argument names."""
    kept = len(node.shape) - len(node["normalized_shape"])
    return [{a: a for a in range(kept)}], [{} for _ in node.entries]


def reduced(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """mean, sum, …: over some axes; the others stay, in their order."""
    rank = len(shapes.inputs[0])
    # The overloads that reduce over everything have neither argument; no axis at all means every.
    dims, keepdim = node.arguments.get("dim") or [], node.arguments.get("keepdim", False)
    gone = {d % rank for d in dims} or set(range(rank))
    stay = [a for a in range(rank) if keepdim or a not in gone]
    links = {a: before for a, before in enumerate(stay) if before not in gone}
    return [links], [{} for _ in node.entries]


def permuted(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """transpose and permute: units go to another axis."""
    rank = len(node.shape)
    order = list(range(rank))
    if node.op == "permute":
        order = [axis % rank for axis in node["dims"]]
    elif rank > 1:
        a, b = (0, 1) if node.op == "t" else (node["dim0"] % rank, node["dim1"] % rank)
        order[a], order[b] = b, a
    links = dict(enumerate(order))
    return [links] * len(node.inputs), [links] * len(node.entries)


def looked_up(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Embedding: rows of a table [tokens, features], picked by indices."""
    last = len(node.shape) - 1
    return [{a: a for a in range(last)}], [{last: 1}]


def multiplied(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """matmul: each of the matrices, rows of the first and columns of the second."""
    rank = len(node.shape)
    first, second = map(len, shapes.inputs)
    if min(first, second) < 2:
        return [{}, {}], []
    batch = _batch(node, shapes.inputs, rank - 2)
    return [{**batch[0], rank - 2: first - 2}, {**batch[1], rank - 1: second - 1}], []


def attended(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Attention [N, heads, tokens, features]: head by head and query by query; a head is wanted with all its features."""
    rank = len(node.shape)
    inputs = _batch(node, shapes.inputs, rank - 2)
    mask, causal = node["attn_mask"], node["is_causal"]
    masks = _mask(node, mask, shapes, tokens=not causal)
    if not causal:  # "those before it" are counted from the first query
        inputs[0][rank - 2] = rank - 2
    if isinstance(mask, In):
        inputs[mask.index] = masks
    heads_apart = all(len(shape) == rank for shape in shapes.inputs[:3]) and all(
        len({str(shapes.inputs[i][a]) for i in range(3)}) == 1 for a in range(rank - 2)
    )
    if not heads_apart:  # fewer heads of keys than of queries
        inputs = [{a: b for a, b in links.items() if a >= rank - 2} for links in inputs]
        masks = {a: b for a, b in masks.items() if a >= rank - 2}
    return inputs, [masks] * len(node.entries)


def linear_in_values(node: Node, moving: frozenset[int]) -> str:
    """Attention with fixed weights is a weighted mean of the values."""
    return "homogeneous" if moving == {node["value"].index} else ""


def bilinear(node: Node, moving: frozenset[int]) -> str:
    """Products are linear in either factor."""
    return "homogeneous" if len(moving) == 1 and len(node.inputs) == 2 else ""


def linear_in_first(node: Node, moving: frozenset[int]) -> str:
    """Quotients of two values."""
    return "homogeneous" if moving == {0} and node["self"] == In(0) else ""


def _batch(node: Node, shapes: Sequence[Shape], count: int) -> list[Links]:
    """The first axes, where an input has them."""
    return [
        {
            a: a
            for a in range(count)
            if len(shape) == len(node.shape) and str(shape[a]) == str(node.shape[a])
        }
        for shape in shapes
    ]


def _mask(node: Node, mask: Any, shapes: Shapes, tokens: bool) -> Links:
    """A mask goes along with heads and queries, as far as it has them."""
    if not isinstance(mask, In | Entry):
        return {}
    shape = (shapes.inputs if isinstance(mask, In) else shapes.entries)[mask.index]
    rank, first = len(node.shape), len(node.shape) - len(shape)
    return {
        first + a: a
        for a, size in enumerate(shape[:-1])
        if str(size) == str(node.shape[first + a]) and (first + a < rank - 2 or tokens)
    }
