"""Values at many points at once, and plain PyTorch for the operations that have no kernel.

A value of a step is the same at all points (`Fixed`), has the points in front (`AtPoints`, [T, …]),
or is an activation of a combination that is not materialized yet (`Combined`): the kernels that can
combine its terms as they read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.backends.activations import IDENTITY, TABLE, Activation
from modeconn.capture.graph import Node, Size
from modeconn.kernels.blended import Blended
from modeconn.plan.program import Moving, PerPoint
from modeconn.plan.rules.axiswise import Elementwise
from modeconn.plan.rules.table import rule_for

# A combination of more terms than this is materialized, not summed by each tile of a kernel that
# reads it: every term is one more tile in shared memory and one more read.
_MOST_TERMS = 4
_FUNCTIONS = {row.name: row.function for row in TABLE}


@dataclass(frozen=True, eq=False)
class Fixed:
    """A value that is the same at all points."""

    value: Any


@dataclass(frozen=True, eq=False)
class AtPoints:
    """A tensor [T, …], or a tuple of them."""

    value: Any


@dataclass(frozen=True, eq=False)
class Combined:
    """activation(Σ_j c_j(t) v_j) of shared values v_j, not yet materialized."""

    blended: Blended
    activation: Activation = IDENTITY

    def materialized(self) -> AtPoints:
        """Sums the terms and applies the activation."""
        function = _FUNCTIONS[self.activation.name]
        return AtPoints(function(summed(self.blended), self.activation.slope))


Value = Fixed | AtPoints | Combined


def summed(blended: Blended) -> Tensor:
    """Returns Σ_k c_k(t) tensor_k, [T, …]; two terms, the most common, in a pass over each."""
    tensors, columns = blended.tensors, blended.coefficients.to(blended.tensors.dtype)
    if len(tensors) != 2:
        total: Tensor = blended.materialized()
        return total
    first, second = (column.view(-1, *[1] * (tensors.dim() - 1)) for column in columns.T)
    begun = torch.where(first == 0, 0.0, first * tensors[0])
    return torch.where(second == 0, begun, torch.addcmul(begun, second, tensors[1]))


class Weight:
    """A parameter or buffer of a step at the segment's points: Σ_k c_k(t) · tensor_k.

    Its tensors are stacked when they are first used.

    Args:
        changes: whether the tensors may change, and need gradients: they are stacked each time.
    """

    def __init__(
        self, entry: Tensor | Moving, points: int, device: torch.device, changes: bool = False
    ) -> None:
        self.entry = entry
        self._changes = changes
        self._points, self._device = points, device
        self._stacked: Blended | None = None

    @property
    def fixed(self) -> bool:
        """Whether it is one tensor."""
        return isinstance(self.entry, Tensor)

    @property
    def shape(self) -> torch.Size:
        """Its shape at one point."""
        return self.entry.shape if isinstance(self.entry, Tensor) else self.entry.like.shape

    def blended(self, points: slice) -> Blended:
        """Returns the weight at some of the points, as the kernels take it."""
        if isinstance(self.entry, PerPoint):
            table = self.entry.table[points]
            return Blended(table, torch.eye(len(table), device=self._device))
        stacked = self._stacked or self._stack()
        self._stacked = None if self._changes else stacked
        return Blended(stacked.tensors, stacked.coefficients[points])

    def _stack(self) -> Blended:
        if isinstance(self.entry, Tensor):
            return Blended.fixed(self.entry.contiguous(), self._points)
        assert not isinstance(self.entry, PerPoint)
        columns = [torch.from_numpy(column) for column in self.entry.coefficients]
        coefficients = torch.stack(columns, 1).to(self._device, torch.float32)
        return Blended(torch.stack(list(self.entry.tensors)), coefficients)

    def materialized(self, points: slice) -> Tensor:
        """Returns the weight at some of the points, [T, …]."""
        if isinstance(self.entry, PerPoint):
            return self.entry.table[points]
        return summed(self.blended(points))

    def exact(self) -> Tensor:
        """Returns the weight at all points in float64, [T, …].

        Meant for vectors, since it is materialized for all points at once.
        """
        if isinstance(self.entry, Tensor):
            return self.entry.double().expand(self._points, *self.entry.shape)
        if isinstance(self.entry, PerPoint):
            return self.entry.table.double()
        columns = [torch.from_numpy(column).to(self._device) for column in self.entry.coefficients]
        total = torch.zeros(self._points, *self.shape, dtype=torch.float64, device=self._device)
        for tensor, column in zip(self.entry.tensors, columns):
            column = column.view(-1, *[1] * tensor.dim())
            total += torch.where(column == 0, 0.0, column * tensor.double())
        return total


def materialized(value: Value) -> Fixed | AtPoints:
    """Returns the value, with a combination materialized."""
    return value.materialized() if isinstance(value, Combined) else value


def run(
    node: Node,
    shapes: Sequence[tuple[Any, ...]],
    values: Sequence[Fixed | AtPoints],
    weights: Sequence[Weight],
    points: slice,
    rows: int,
) -> AtPoints:
    """Computes a node's value at some of a segment's points, by PyTorch.

    Args:
        shapes: of the node's inputs, as in the graph.
        values: of its inputs, at least one of them, or one of the weights, with the points in
            front.
        points: which of the segment's.
        rows: of the samples.
    """
    if node.op == "getitem" and isinstance(values[0], AtPoints):
        return AtPoints(values[0].value[node["index"]])
    if is_elementwise(node):
        return _run_elementwise(node, values, weights, points, rows)
    moving = [shape for value, shape in zip(values, shapes) if isinstance(value, AtPoints)]
    fixed = all(weight.fixed for weight in weights)
    if all(map(has_rows, moving)) and fixed and treats_rows_apart(node, shapes):
        return _run_folded(node, shapes, values, weights, points.stop - points.start, rows)
    return _run_each(node, values, weights, points, rows)


def _run_elementwise(
    node: Node,
    values: Sequence[Fixed | AtPoints],
    weights: Sequence[Weight],
    points: slice,
    rows: int,
) -> AtPoints:
    """Runs a node once, on values with the points in front."""
    rank = len(node.shape)
    operands = [_aligned(v.value, rank) if isinstance(v, AtPoints) else v.value for v in values]
    entries = [
        w.entry if isinstance(w.entry, Tensor) else _aligned(w.materialized(points), rank)
        for w in weights
    ]
    return AtPoints(node.run(operands, entries, rows))


def _run_folded(
    node: Node,
    shapes: Sequence[tuple[Any, ...]],
    values: Sequence[Fixed | AtPoints],
    weights: Sequence[Weight],
    count: int,
    rows: int,
) -> AtPoints:
    """Runs a node once, with the points as more rows."""
    operands = [_folded(value, shape, count) for value, shape in zip(values, shapes)]
    out = node.run(operands, [w.entry for w in weights], count * rows)  # type: ignore[misc]
    return AtPoints(
        pytree.tree_map(lambda part: part.unflatten(0, (count, len(part) // count)), out)
    )


def _run_each(
    node: Node,
    values: Sequence[Fixed | AtPoints],
    weights: Sequence[Weight],
    points: slice,
    rows: int,
) -> AtPoints:
    """Runs a node point by point."""
    entries = [w.entry if isinstance(w.entry, Tensor) else w.materialized(points) for w in weights]
    outs = []
    for point in range(points.stop - points.start):
        operands = [at(value, point) for value in values]
        here = [e if w.fixed else e[point] for w, e in zip(weights, entries)]
        outs.append(node.run(operands, here, rows))
    return AtPoints(pytree.tree_map(lambda *parts: torch.stack(parts), outs[0], *outs[1:]))


# Besides those with an elementwise rule, which are all of one input.
_ELEMENTWISE = ("add", "sub", "mul", "div", "pow", "where", "maximum", "minimum", "masked_fill")


def is_elementwise(node: Node) -> bool:
    """Whether a node works number by number, so that more axes in front change nothing."""
    rearranges = ("clone", "contiguous")  # these may be given a layout of so many axes
    return node.op in _ELEMENTWISE or (
        isinstance(rule_for(node), Elementwise) and node.op not in rearranges
    )


# Operations that treat rows apart however they are called, once axis 0 of their values is that of
# the rows.
_BY_ROWS = frozenset(
    "linear conv1d conv2d batch_norm layer_norm group_norm rms_norm flatten clone contiguous "
    "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_max_pool2d scaled_dot_product_attention take".split()
)
# Those that do so unless an argument, `dim` or `dims`, names axis 0.
_BY_AXIS = frozenset(
    "softmax _softmax log_softmax _log_softmax cat stack slice select unsqueeze squeeze split "
    "split_with_sizes chunk unbind mean sum amax amin glu cumsum flip".split()
)


def has_rows(shape: Sequence[Any]) -> bool:
    """Whether axis 0 is that of the rows."""
    return bool(shape) and isinstance(shape[0], Size)


def treats_rows_apart(node: Node, shapes: Sequence[tuple[Any, ...]]) -> bool:
    """Whether points can be taken for more rows: axis 0 is that of the rows, which stay apart."""
    if not any(map(has_rows, shapes)) or any(map(_has_rows_inside, (*shapes, node.shape))):
        return False
    rank = len(shapes[0])
    if node.op == "reshape":
        return has_rows(node.shape) and isinstance(node["shape"][0], Size)
    if node.op == "expand":
        return has_rows(node.shape) and isinstance(node["size"][0], Size)
    if node.op == "permute":
        return bool(node["dims"][0] % rank == 0)
    if node.op == "transpose":
        return 0 not in (node["dim0"] % rank, node["dim1"] % rank)
    if node.op in _BY_AXIS:
        given = node.arguments.get("dims", node.arguments.get("dim"))
        axes = [given] if isinstance(given, int) else given or []
        longer = rank + 1 if node.op in ("unsqueeze", "stack") else rank
        return bool(axes) and all(axis % longer for axis in axes)
    return node.op in _BY_ROWS


def _has_rows_inside(shape: Sequence[Any]) -> bool:
    """Whether another axis than the first depends on the number of rows."""
    return any(isinstance(size, Size) for size in shape[1:])


def _aligned(value: Tensor, rank: int) -> Tensor:
    """Inserts axes of one after the points, so that [T, …] broadcasts with `rank` axes behind."""
    missing = rank + 1 - value.dim()
    if missing <= 0:
        return value
    return value.reshape(value.shape[0], *[1] * missing, *value.shape[1:])


def _folded(value: Fixed | AtPoints, shape: tuple[Any, ...], count: int) -> Any:
    """Returns the value with the points as more rows; one that has no rows stays as it is."""
    if isinstance(value, AtPoints):
        return pytree.tree_map(lambda part: part.flatten(0, 1), value.value)
    if not has_rows(shape):
        return value.value
    return value.value.expand(count, *value.value.shape).flatten(0, 1)


def at(value: Fixed | AtPoints, point: int) -> Any:
    """Returns the value at one point."""
    if isinstance(value, Fixed):
        return value.value
    return pytree.tree_map(lambda part: part[point], value.value)


def as_read(value: Value) -> tuple[Tensor | Blended, dict[str, Any]]:
    """Returns a value as the products take it, and their options for it."""
    if isinstance(value, Combined):
        name = value.activation.name
        if len(value.blended.tensors) <= _MOST_TERMS and name != "leaky_relu":
            return value.blended, {"input_activation": name}
        value = value.materialized()
    return value.value, {}


def as_matrix(x: Tensor | Blended, rank: int) -> tuple[Tensor | Blended, list[int]]:
    """Returns a value of `rank` axes as rows × features, and the lengths of its other axes."""
    if isinstance(x, Blended):
        return Blended(x.tensors.flatten(-rank, -2), x.coefficients), list(
            x.tensors.shape[-rank:-1]
        )
    return x.flatten(-rank, -2), list(x.shape[-rank:-1])


def at_points(value: Value, count: int) -> Tensor:
    """Returns a value with the points in front."""
    value = materialized(value)
    tensor: Tensor = value.value
    return tensor if isinstance(value, AtPoints) else tensor.expand(count, *tensor.shape)
