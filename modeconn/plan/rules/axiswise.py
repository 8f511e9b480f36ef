"""Rules of operations that work index by index along some axes, and may mix along all others.

Each such axis of the value is linked with one axis of an input or entry: number by number, by
channel, along one axis, or head by head, the rule is the list of linked axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modeconn.capture.graph import Entry, In, Node
from modeconn.plan.rules import tying
from modeconn.plan.rules.base import (
    Fit,
    Linearity,
    Mismatch,
    Rule,
    Shapes,
    Support,
    Ties,
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
    """Units pass along linked axes."""

    def __init__(
        self,
        links: Linking,
        linear: str | Linearity = "",
        entries: Callable[[Node], frozenset[int]] | None = None,
        ties: Ties | None = None,
    ) -> None:
        super().__init__(linear, entries, ties)
        self._links = links

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        inputs, _ = self._links(node, shapes)
        return [_passed(requested.along, links) for links in inputs]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        inputs, entries = self._links(node, shapes)
        along: dict[int, np.ndarray] = {}
        for axis in range(len(node.shape)):
            given = [units.get(links[axis]) for units, links in zip(have, inputs) if axis in links]
            if not given and any(axis in links for links in entries):  # a table's own features
                given = [requested.get(axis)]
            if any(not np.array_equal(given[0], other) for other in given[1:]):  # type: ignore[arg-type]
                raise Mismatch
            if given and given[0] is not None:
                along[axis] = given[0]
        pairs = zip(entries, shapes.entries)
        cuts = [cut_of(_passed(along, links), len(shape)) for links, shape in pairs]
        return Fit(Units(along), cuts, self.arguments(node, Units(along)))

    def arguments(self, node: Node, units: Units) -> dict[str, Any]:
        """The arguments that change with the units, by name: sizes among them."""
        return {}


def _passed(along: Mapping[int, np.ndarray], links: Links) -> Units:
    """The units of an input or entry that go with those of the value."""
    return Units({links[axis]: index for axis, index in along.items() if axis in links})


class Elementwise(Linked):
    """Operations on each number, with axes of size one broadcast."""

    def __init__(
        self, linear: str | Linearity = "", entries: Callable[[Node], frozenset[int]] | None = None
    ) -> None:
        super().__init__(broadcast, linear, entries, tying.elementwise)


class Expand(Linked):
    """expand: the sizes that it names are those of the part."""

    def __init__(self) -> None:
        super().__init__(broadcast, "homogeneous", entries_of("self"), tying.expanded)

    def arguments(self, node: Node, units: Units) -> dict[str, Any]:
        return {"size": resized(node["size"], units)}


def broadcast(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Elementwise operations: axes, counted from the last, are linked where sizes are equal."""

    def links(shape: Shape) -> Links:
        first = len(node.shape) - len(shape)
        equal = [a for a, size in enumerate(shape) if str(node.shape[first + a]) == str(size)]
        return {first + a: a for a in equal}

    return [links(shape) for shape in shapes.inputs], [links(shape) for shape in shapes.entries]


def by_channel(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Pooling, batch norm with given statistics: channel by channel (axis 1)."""
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
    batch, others = (_batch(node, shape, rank - 2) for shape in shapes.inputs)
    return [{**batch, rank - 2: first - 2}, {**others, rank - 1: second - 1}], []


def attended(node: Node, shapes: Shapes) -> tuple[list[Links], list[Links]]:
    """Attention [N, heads, tokens, features]: head by head and query by query, all features."""
    rank = len(node.shape)
    inputs = [_batch(node, shape, rank - 2) for shape in shapes.inputs]
    mask, causal = node["attn_mask"], node["is_causal"]
    masks = _mask(node, mask, shapes, tokens=not causal)
    if not causal:  # "those before it" are counted from the first query
        inputs[0][rank - 2] = rank - 2
    if isinstance(mask, In):
        inputs[mask.index] = masks
    heads = {tuple(map(str, shape[:-2])) for shape in shapes.inputs[:3]}
    if len(heads) > 1 or len(shapes.inputs[0]) != rank:  # fewer heads of keys than of queries
        inputs = [_from(rank - 2, links) for links in inputs]
        masks = _from(rank - 2, masks)
    return inputs, [masks] * len(node.entries)


def _from(first: int, links: Links) -> Links:
    """The links of an axis and of those after it."""
    return {a: b for a, b in links.items() if a >= first}


def linear_in_values(node: Node, moving: frozenset[int]) -> str:
    """Attention with fixed weights is a weighted mean of the values."""
    return "homogeneous" if moving == {node["value"].index} else ""


def bilinear(node: Node, moving: frozenset[int]) -> str:
    """Products are linear in either factor."""
    return "homogeneous" if len(moving) == 1 and len(node.inputs) == 2 else ""


def linear_in_first(node: Node, moving: frozenset[int]) -> str:
    """Quotients of two values."""
    return "homogeneous" if moving == {0} and node["self"] == In(0) else ""


def _batch(node: Node, shape: Shape, count: int) -> Links:
    """The first axes, as far as an input has them."""
    if len(shape) != len(node.shape):
        return {}
    return {a: a for a in range(count) if str(shape[a]) == str(node.shape[a])}


def _mask(node: Node, mask: Any, shapes: Shapes, tokens: bool) -> Links:
    """The links of a mask: with heads and queries, as far as it has them."""
    if not isinstance(mask, In | Entry):
        return {}
    shape = (shapes.inputs if isinstance(mask, In) else shapes.entries)[mask.index]
    rank, first = len(node.shape), len(node.shape) - len(shape)
    return {
        first + a: a
        for a, size in enumerate(shape[:-1])
        if str(size) == str(node.shape[first + a]) and (first + a < rank - 2 or tokens)
    }
