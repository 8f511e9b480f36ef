"""Rules of rearrangements: views with other axes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeconn.capture.graph import Node, Size
from modeconn.errors import Unsupported
from modeconn.plan.rules.axes import (
    ROWS,
    Atom,
    Axis,
    Part,
    Unflattened,
    Uniform,
    concatenated,
    product,
    resolve,
    split,
)
from modeconn.plan.rules.base import (
    Axes,
    Fit,
    Mismatch,
    Rule,
    Shapes,
    Support,
    freeze_axes,
    resized,
)
from modeconn.plan.rules.tying import broadcast_axes
from modeconn.plan.units import ALL, Shape, Units, axis_runs, covering, regrouped, static


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

    def tie(self, node: Node, axes: Axes) -> list[Axis]:
        """Joins axes to products, and takes products apart."""
        (given,) = axes.operands(node)
        before = tuple(axis.size for axis in given)
        after = tuple(size.of(ROWS) if isinstance(size, Size) else size for size in node.shape)
        value: list[Axis] = [Uniform(1)] * len(after)
        for some, others in axis_runs(before, after):
            if not some or not others:
                continue
            parts = [given[axis] for axis in some if before[axis] != 1] or [Uniform(1)]
            whole = parts[0] if len(parts) == 1 else product(parts)
            for place, axis in zip(others, _unflattened(whole, [after[o] for o in others])):
                value[place] = axis
        return value


def _unflattened(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """An axis as several of some sizes, the outermost first."""
    found: list[Axis] = []
    for i, size in enumerate(sizes):
        inner = axis.size // size
        if size == 1:
            found.append(Uniform(1))
        elif inner == 1 or i == len(sizes) - 1:
            found.append(axis)
            axis = Uniform(1)
        else:
            parts = Unflattened(axis, size, inner)
            found.append(parts.outer)
            axis = parts.inner
    return found


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

    def tie(self, node: Node, axes: Axes) -> list[Axis]:
        """Cuts the axis at both ends of the slice; what is between is permuted on its own."""
        (given,) = axes.operands(node)
        place = node["dim"] % len(given)
        bounds = node["start"], node["end"]
        whole, size = given[place], node.shape[place]
        if isinstance(size, Size) or any(isinstance(bound, Size) for bound in bounds):
            raise Unsupported("a slice that depends on the number of samples")
        start, stop, step = slice(*bounds, node["step"]).indices(whole.size)
        part = _between(whole, start, stop) if step == 1 else None
        if part is None:
            freeze_axes(node, [whole], "a slice across its parts")
            part = Atom(size, f"{node.op}: a slice across parts")
        given[place] = part
        return given


def _between(axis: Axis, start: int, stop: int) -> Axis | None:
    """The part of an axis between two indices; None where a cut goes through inner axes."""
    if stop < axis.size:
        cut = split(axis, stop) if stop > 0 else None
        if cut is None:
            return None
        axis = cut[0]
    if start > 0:
        cut = split(axis, start) if start < axis.size else None
        return None if cut is None else cut[1]
    return axis


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

    def tie(self, node: Node, axes: Axes) -> list[Axis]:
        """Takes a slice of what the axis was unflattened from; other axes are told apart by it."""
        (given,) = axes.operands(node)
        axis = given.pop(node["dim"] % (len(given)))
        index = node["index"]
        if isinstance(index, Size):
            raise Unsupported("an index that depends on the number of samples")
        if isinstance(axis, Part) and axis is axis.of.outer:
            slices = axis.of.sliced(f"{node.op}: an index across its parts")
            if slices:
                replaced: dict[int, Unflattened] = {}
                taken = slices[index % axis.size]
                return [_instead(other, axis.of, taken, replaced) for other in given]
        if not isinstance(resolve(axis), Uniform):
            freeze_axes(node, [axis], "one index is taken")
            axes.mix(axis, given)
        return given


def _instead(axis: Axis, of: Unflattened, taken: Axis, replaced: dict[int, Unflattened]) -> Axis:
    """An axis of a value after one index of an unflattened one was taken.

    Args:
        of: what was unflattened.
        taken: the slice that takes the place of its inner axis.
        replaced: what was unflattened again of that inner axis, by id, and is of the slice now.
    """
    if not isinstance(axis, Part):
        return axis
    if axis.of is of:
        return taken
    inner = axis.of
    if inner.factors is not None or inner.axis is None:
        return axis
    if id(inner) not in replaced:
        whole = _instead(inner.axis, of, taken, replaced)
        if whole is inner.axis:
            return axis
        replaced[id(inner)] = Unflattened(whole, inner.count, inner.inner.size)
    found = replaced[id(inner)]
    return found.outer if axis is inner.outer else found.inner


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

    def tie(self, node: Node, axes: Axes) -> list[Axis]:
        """Ties all axes but the joined one, which is the sum of those of the tensors."""
        tensors = [axes.of(leaf) for leaf in node["tensors"]]
        # PyTorch passes over empty vectors, which caches of keys and values begin with
        if len(node.shape) > 1:
            tensors = [tensor for tensor in tensors if len(tensor) > 1]
        place = _joined(node)
        joined = concatenated([tensor.pop(place) for tensor in tensors])
        value = broadcast_axes(tensors, len(node.shape) - 1)
        return [*value[:place], joined, *value[place:]]


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
