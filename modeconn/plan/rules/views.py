"""Rules of what rearranges a value: other axes for the same numbers, parts of it, several put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeconn.capture.graph import Node, Size
from modeconn.plan.rules.base import Fit, Mismatch, Rule, Shapes, Support, resized
from modeconn.plan.units import ALL, Shape, Units, covering, regrouped, static


class View(Rule):
    """reshape, flatten, squeeze, unsqueeze: the same numbers in the same order, with other axes."""

    def wants(self, node: Node, wanted: Units, shapes: Shapes, support: Support) -> list[Units]:
        (shape,) = shapes.inputs
        if node.op == "squeeze" and len(shape) - len(node.shape) != np.size(node["dim"]):
            # Squeeze leaves axes of more than one index; in a part, they might have only one.
            return [ALL]
        return [covering(wanted, shape, node.shape)]

    def fit(self, node: Node, wanted: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        units = regrouped(have[0], shapes.inputs[0], node.shape)
        if units is None:
            raise Mismatch
        changed = {"shape": resized(node["shape"], units)} if node.op == "reshape" else {}
        return Fit(units, [()] * len(node.entries), changed)


class Slice(Rule):
    """x[:, start:end:step], the parts of a split among them: units along its axis are counted from its start."""

    takes = True

    def wants(self, node: Node, wanted: Units, shapes: Shapes, support: Support) -> list[Units]:
        axis, taken = _taken(node, shapes.inputs[0])
        if taken is None:
            return [wanted.without(axis)]
        index = wanted.get(axis)
        return [Units({**wanted.along, axis: taken if index is None else taken[index]})]

    def fit(self, node: Node, wanted: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
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
    """x[:, i]: one index along an axis, which the value does not have."""

    takes = True

    def wants(self, node: Node, wanted: Units, shapes: Shapes, support: Support) -> list[Units]:
        axis, size = _axis(node, shapes.inputs[0])
        along = {a + (a >= axis): index for a, index in wanted.along.items()}
        if size is not None:
            along[axis] = np.array([node["index"] % size])
        return [Units(along)]

    def fit(self, node: Node, wanted: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        axis, size = _axis(node, shapes.inputs[0])
        kept = have[0].get(axis)
        units = Units({a - (a > axis): index for a, index in have[0].along.items() if a != axis})
        if kept is None or size is None:
            return Fit(units)
        place = int(np.searchsorted(kept, node["index"] % size))
        return Fit(units, (), {"dim": axis, "index": place})


class Concatenation(Rule):
    """Units along the joined axis are shared out among the inputs; along any other axis they pass through."""

    def wants(self, node: Node, wanted: Units, shapes: Shapes, support: Support) -> list[Units]:
        axis = _joined(node)
        index = wanted.get(axis)
        if index is None:
            return [wanted] * len(node.inputs)
        result: list[Units] = []
        for start, width in _places(shapes, axis):
            part = index[(index >= start) & (index < start + width)] - start
            # An input that nobody wants still takes part in the concatenation: one unit of it.
            result.append(
                Units({**wanted.along, axis: part if len(part) else np.zeros(1, np.int64)})
            )
        return result

    def fit(self, node: Node, wanted: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        axis = _joined(node)
        beside = [units.without(axis) for units in have]
        if any(other != beside[0] for other in beside[1:]):
            raise Mismatch
        if all(units.get(axis) is None for units in have):
            return Fit(beside[0])
        parts = [
            start + (np.arange(width) if units.get(axis) is None else units.along[axis])
            for units, (start, width) in zip(have, _places(shapes, axis))
        ]
        return Fit(Units({**beside[0].along, axis: np.concatenate(parts)}))


def _joined(node: Node) -> int:
    axis: int = node["dim"] % len(node.shape)
    return axis


def _places(shapes: Shapes, axis: int) -> list[tuple[int, int]]:
    """Where each input begins along the joined axis, and how wide it is."""
    widths = [static(shape[axis]) for shape in shapes.inputs]
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _axis(node: Node, shape: Shape) -> tuple[int, int | None]:
    """The axis that an operation's argument names, and its size; None where it depends on the rows."""
    axis = node["dim"] % len(shape)
    size = shape[axis]
    return axis, None if isinstance(size, Size) else size


def _taken(node: Node, shape: Shape) -> tuple[int, np.ndarray | None]:
    """The axis of a slice, and the indices that it takes, None where it is an axis of rows."""
    axis, size = _axis(node, shape)
    if size is None:
        return axis, None
    return axis, np.arange(size)[node["start"] : node["end"] : node["step"]]
