"""Rules of rearrangements: views with other axes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeconn.capture.graph import Node, Size
from modeconn.plan.rules.base import Fit, Mismatch, Rule, Shapes, Support, resized
from modeconn.plan.units import ALL, Shape, Units, covering, regrouped, static


class View(Rule):
    """reshape, flatten, squeeze, unsqueeze: other axes for the numbers, in unchanged order."""

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        (shape,) = shapes.inputs
        if node.op == "squeeze" and len(shape) - len(node.shape) != np.size(node["dim"]):
            # Squeeze leaves axes of more than one index; in a part, they might have only one.
            return [ALL]
        return [covering(requested, shape, node.shape)]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        units = regrouped(have[0], shapes.inputs[0], node.shape)
        if units is None:
            raise Mismatch
        changed = {"shape": resized(node["shape"], units)} if node.op == "reshape" else {}
        return Fit(units, [()] * len(node.entries), changed)


class Slice(Rule):
    """x[:, start:end:step], parts of a split: units along the axis are counted from start."""

    takes = True

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        axis, taken = _taken(node, shapes.inputs[0])
        if taken is None:
            return [requested.without(axis)]
        index = requested.get(axis)
        return [Units({**requested.along, axis: taken if index is None else taken[index]})]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        axis, taken = _taken(node, shapes.inputs[0])
        kept = have[0].get(axis)
        if taken is None or kept is None:
            return Fit(have[0])
        places = np.flatnonzero(np.isin(kept, taken))
        if not len(places) or places[-1] - places[0] >= len(places):
            raise Mismatch
        index = np.searchsorted(taken, kept[places])
        bounds = {"dim": axis, "start": int(places[0]), "end": int(places[-1]) + 1, "step": 1}
        return Fit(Units({**have[0].along, axis: index}), (), bounds)


class Select(Rule):
    """x[:, i]: one index along an axis, which the value has no longer."""

    takes = True

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        axis, size = _axis(node, shapes.inputs[0])
        along = {a + (a >= axis): index for a, index in requested.along.items()}
        if size is not None:
            along[axis] = np.array([node["index"] % size])
        return [Units(along)]

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        axis, size = _axis(node, shapes.inputs[0])
        kept = have[0].get(axis)
        units = Units({a - (a > axis): index for a, index in have[0].along.items() if a != axis})
        if kept is None or size is None:
            return Fit(units)
        place = int(np.searchsorted(kept, node["index"] % size))
        return Fit(units, (), {"dim": axis, "index": place})


class Concatenation(Rule):
    """Concatenation: units along the joined axis belong to one input each, others to all."""

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        axis = _joined(node)
        index = requested.get(axis)
        if index is None:
            return [requested] * len(node.inputs)
        result: list[Units] = []
        for start, width in _places(shapes, axis):
            part = index[(index >= start) & (index < start + width)] - start
            # An input of which nothing is requested still takes part, with one unit.
            result.append(
                Units({**requested.along, axis: part if len(part) else np.zeros(1, np.int64)})
            )
        return result

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        axis = _joined(node)
        beside = [units.without(axis) for units in have]
        if any(other != beside[0] for other in beside[1:]):
            raise Mismatch
        if all(units.get(axis) is None for units in have):
            return Fit(beside[0])
        parts = []
        for units, (start, width) in zip(have, _places(shapes, axis)):
            index = units.get(axis)
            parts.append(start + (np.arange(width) if index is None else index))
        return Fit(Units({**beside[0].along, axis: np.concatenate(parts)}))


def _joined(node: Node) -> int:
    axis: int = node["dim"] % len(node.shape)
    return axis


def _places(shapes: Shapes, axis: int) -> list[tuple[int, int]]:
    """The start and the width of each input along the joined axis."""
    widths = [static(shape[axis]) for shape in shapes.inputs]
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _axis(node: Node, shape: Shape) -> tuple[int, int | None]:
    """The axis that `dim` names, and its size; None where that depends on the rows."""
    axis = node["dim"] % len(shape)
    size = shape[axis]
    return axis, None if isinstance(size, Size) else size


def _taken(node: Node, shape: Shape) -> tuple[int, np.ndarray | None]:
    """The axis of a slice, and the indices that it takes, None where it is an axis of rows."""
    axis, size = _axis(node, shape)
    if size is None:
        return axis, None
    return axis, np.arange(size)[node["start"] : node["end"] : node["step"]]
