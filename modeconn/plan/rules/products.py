"""Rules of products with a weight [out, in, …], whose zero columns decide what is live.

Group norm is here as well: its groups pass on units as those of a grouped convolution do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeconn.capture.graph import Node
from modeconn.plan.rules.base import Fit, Mismatch, Rule, Shapes, Support
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
