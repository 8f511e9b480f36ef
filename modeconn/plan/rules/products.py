"""Rules of products with a weight [out, in, …], whose zero columns decide what is live.

Group norm is here as well: its groups pass on units as those of a grouped convolution do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeconn.capture.graph import Entry, In, Node
from modeconn.plan.rules.axes import Atom, Axis, product, tie
from modeconn.plan.rules.base import (
    Axes,
    Fit,
    Mismatch,
    Rule,
    Shapes,
    Support,
    freeze_axes,
    own_axes,
)
from modeconn.plan.units import Shape, Units, static
from modeconn.plan.weights import Cut


def _by_bias(node: Node, moving: frozenset[int]) -> str:
    return "affine" if len(node.entries) > 1 else "homogeneous"


def _weight_and_bias(node: Node) -> frozenset[int]:
    return frozenset(range(len(node.entries)))


class Product(Rule):
    """Linear layers and ungrouped convolutions, transposed or not: a weight and maybe a bias [out].

    Args:
        outputs, inputs: the weight's axes: [out, in, …] where they are 0 and 1.
        bias_first: whether the bias comes before the weight among the entries.
        last: whether the features are the last axis, and all others are taken apart; else they are
            axis 1.

    Attributes:
        outputs, inputs: the weight's axes. weight: its place among the entries.
    """

    def __init__(
        self, outputs: int = 0, inputs: int = 1, bias_first: bool = False, last: bool = False
    ) -> None:
        super().__init__(_by_bias, _weight_and_bias)
        self.outputs, self.inputs = outputs, inputs
        self.weight, self._last = int(bias_first), last

    def axis(self, node: Node) -> int:
        """Returns the axis of the value, and of the input, that has the features."""
        return len(node.shape) - 1 if self._last else 1

    def _cut(self, rows: np.ndarray | None, columns: np.ndarray | None) -> Cut:
        return (rows, columns) if self.outputs == 0 else (columns, rows)

    def beside(self, node: Node, units: Units) -> dict[int, np.ndarray]:
        """Returns the units along axes that the layer takes apart."""
        return units.without(self.axis(node)).along if self._last else {}

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        axis = self.axis(node)
        live = support(self.weight, self.inputs, self._cut(requested.get(axis), None))
        if live.all():
            return [Units(self.beside(node, requested))]
        # A layer without any live input still needs an input for its shape: keep one.
        columns = np.flatnonzero(live) if live.any() else np.zeros(1, np.int64)
        return [Units({**self.beside(node, requested), axis: columns})]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        axis = self.axis(node)
        rows, columns = requested.get(axis), have[0].get(axis)
        cuts: list[Cut] = [(rows,)] * len(node.entries)
        cuts[self.weight] = self._cut(rows, columns)
        along = self.beside(node, have[0])
        return Fit(Units(along if rows is None else {**along, axis: rows}), cuts)

    def tie(self, node: Node, axes: Axes) -> list[Axis]:
        """Ties the input's features with the weight's, of a weight that is computed as well."""
        x, weight, bias = _operands(node, axes, self.weight)
        if self._last:
            tie(x[-1], weight[self.inputs])
            axes.mix(x[-1], x[:-1])
            out = weight[self.outputs]
            return [*x[:-1], tie(out, bias[0]) if bias else out]
        freeze_axes(node, weight[2:], "pixels of the kernel")
        freeze_axes(node, x[2:], "neighbouring pixels")
        group = Atom(node["groups"])
        out = _tie_channels(x[1], weight, group, self.outputs == 1)
        axes.mix(weight[self.inputs], [group])
        pixels = own_axes(node, f"{node.op}: neighbouring pixels")[2:]
        return [x[0], tie(out, bias[0]) if bias else out, *pixels]


def _operands(node: Node, axes: Axes, second: int) -> list[list[Axis]]:
    """The axes of the input, the weight and the bias; no axes where there is no bias.

    Args:
        second: whether the bias is the first argument, as that of addmm.
    """
    names = ("mat1", "mat2", "self") if second else ("input", "weight", "bias")
    bias = node[names[2]]
    others = axes.of(bias) if isinstance(bias, In | Entry) else []
    return [axes.of(node[names[0]]), axes.of(node[names[1]]), others[-1:]]


def _tie_channels(channels: Axis, weight: list[Axis], group: Atom, transposed: bool) -> Axis:
    """Tie a convolution's channels group by group, and return those of its value."""
    groups = group.size
    if groups == 1:
        tie(channels, weight[0 if transposed else 1])
        return weight[1 if transposed else 0]
    if transposed:
        tie(weight[0], product([group, Atom(weight[0].size // groups)]))
        tie(channels, weight[0])
        return product([group, weight[1]])
    own = tie(weight[0], product([group, Atom(weight[0].size // groups)]))
    tie(channels, product([group, weight[1]]))
    return own


class Grouped(Rule):
    """Grouped convolutions: groups of which nothing is requested are left out, others are whole.

    Args:
        transposed: whether the weight is [in, out / groups, …].

    Attributes:
        transposed: likewise.
    """

    def __init__(self, transposed: bool = False) -> None:
        super().__init__(_by_bias, _weight_and_bias)
        self.transposed = transposed

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        index = requested.get(1)
        if index is None:
            return [Units({})]
        groups = _touched(index, _size(node.shape, node["groups"]))
        return [Units({1: _members(groups, _size(shapes.inputs[0], node["groups"]))})]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        index = have[0].get(1)
        if index is None:
            return Fit(Units({}), [()] * len(node.entries))
        groups = _whole(index, _size(shapes.inputs[0], node["groups"]))
        out = _members(groups, _size(node.shape, node["groups"]))
        cuts: list[Cut] = [(index if self.transposed else out,), (out,)]
        return Fit(Units({1: out}), cuts[: len(node.entries)], {"groups": len(groups)})


class GroupNorm(Rule):
    """Group norm: groups of channels are normalised together, and apart from the others."""

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        index, size = requested.get(1), _size(node.shape, node["num_groups"])
        return [Units({}) if index is None else Units({1: _members(_touched(index, size), size)})]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        index = have[0].get(1)
        if index is None:
            return Fit(Units({}), [()] * len(node.entries))
        groups = _whole(index, _size(node.shape, node["num_groups"]))
        cuts: list[Cut] = [(index,)] * len(node.entries)
        return Fit(Units({1: index}), cuts, {"num_groups": len(groups)})

    def tie(self, node: Node, axes: Axes) -> list[Axis]:
        """Ties the channels as groups × channels of a group."""
        given, *others = axes.operands(node)
        groups, size = node["num_groups"], given[1].size
        if 1 < groups < size:
            group, inner = Atom(groups), Atom(size // groups)
            given[1] = tie(given[1], product([group, inner]))
            axes.mix(inner, [group])
        for (other,) in others:
            given[1] = tie(given[1], other)
        return given


def _size(shape: Shape, groups: int) -> int:
    """The number of channels (axis 1) of a group."""
    return static(shape[1]) // groups


def _touched(index: np.ndarray, size: int) -> np.ndarray:
    """The groups that some channels are of."""
    return np.unique(index // size)


def _members(groups: np.ndarray, size: int) -> np.ndarray:
    """All channels of some groups."""
    members: np.ndarray = (groups[:, None] * size + np.arange(size)).reshape(-1)
    return members


def _whole(index: np.ndarray, size: int) -> np.ndarray:
    """The groups that some channels make up."""
    groups = _touched(index, size)
    if not np.array_equal(index, _members(groups, size)):
        raise Mismatch
    return groups
