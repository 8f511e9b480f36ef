"""Values at many points at once, and plain PyTorch for the operations that have no kernel of their own.

A value of a step is the same at all points (`Fixed`), has the points in front (`AtPoints`, [T, …]),
or is an activation of a combination that nobody has added up yet (`Combined`): the kernels that
can, add it up as they read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from modeconn.capture.graph import Node, Size
from modeconn.kernels.blended import Blended
from modeconn.plan.program import Moving, PerPoint
from modeconn.plan.rules.axiswise import Elementwise
from modeconn.plan.rules.table import rule_for

# What each activation of the kernels is; "slope" is leaky_relu's.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: x.relu(),
    "leaky_relu": F.leaky_relu,
    "tanh": lambda x, slope: x.tanh(),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
    "silu": lambda x, slope: F.silu(x),
    "sigmoid": lambda x, slope: x.sigmoid(),
}


@dataclass(frozen=True, eq=False)
class Fixed:
    """The same value at all points."""

    value: Any


@dataclass(frozen=True, eq=False)
class AtPoints:
    """A tensor [T, …], or a tuple of them."""

    value: Any


@dataclass(frozen=True, eq=False)
class Combined:
    """activation(Σ_j c_j(t) v_j) of shared values v_j, not yet added up."""

    blended: Blended
    activation: str = "identity"
    slope: float = 0.01

    def materialized(self) -> AtPoints:
        """The same, added up."""
        return AtPoints(ACTIVATIONS[self.activation](added(self.blended), self.slope))


Value = Fixed | AtPoints | Combined


def added(blended: Blended) -> Tensor:
    """What `Blended.materialized` gives, in one pass over each of the tensors."""
    tensors, columns = blended.tensors, blended.coefficients.to(blended.tensors.dtype)
    if len(tensors) != 2:
        of_all: Tensor = blended.materialized()
        return of_all
    first, second = (column.view(-1, *[1] * (tensors.dim() - 1)) for column in columns.T)
    total = torch.where(first == 0, 0.0, first * tensors[0])
    return torch.where(second == 0, total, torch.addcmul(total, second, tensors[1]))


class Weight:
    """An entry of a step at the segment's points: Σ_k c_k(t) · tensor_k, stacked when it is first used.

    Args:
        changes: the tensors may change, and want gradients: they are stacked each time.
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
        """The entry at some of the points, as the kernels take it."""
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
        """The entry at some of the points, [T, …]."""
        return (
            self.entry.table[points]
            if isinstance(self.entry, PerPoint)
            else added(self.blended(points))
        )

    def exact(self) -> Tensor:
        """The entry at all points in float64, [T, …]; for vectors, since it is materialized for all points at once."""
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
    """The value, added up where it is not yet."""
    return value.materialized() if isinstance(value, Combined) else value


def run(
    node: Node,
    shapes: Sequence[tuple[Any, ...]],
    values: Sequence[Fixed | AtPoints],
    weights: Sequence[Weight],
    points: slice,
    rows: int,
) -> AtPoints:
    """A node's value at some of a segment's points.

    Args:
        shapes: of the node's inputs, as in the graph.
        values: of its inputs, at least one of them, or one of the weights, with the points in
            front.
        points: which of the segment's.
        rows: of the samples.
    """
    count = points.stop - points.start
    if node.op == "getitem" and isinstance(values[0], AtPoints):
        return AtPoints(values[0].value[node.args[1]])
    if is_elementwise(node):
        rank = len(node.shape)
        operands = [_aligned(v.value, rank) if isinstance(v, AtPoints) else v.value for v in values]
        entries = [
            w.entry if isinstance(w.entry, Tensor) else _aligned(w.materialized(points), rank)
            for w in weights
        ]
        return AtPoints(node.run(operands, entries, rows))
    with_rows = all(has_rows(shape) for v, shape in zip(values, shapes) if isinstance(v, AtPoints))
    if with_rows and all(weight.fixed for weight in weights) and treats_rows_apart(node, shapes):
        operands = [_folded(v, shape, count) for v, shape in zip(values, shapes)]
        out = node.run(operands, [w.entry for w in weights], count * rows)  # type: ignore[misc]
        return AtPoints(
            pytree.tree_map(lambda part: part.unflatten(0, (count, len(part) // count)), out)
        )
    entries_at = [
        w.entry if isinstance(w.entry, Tensor) else w.materialized(points) for w in weights
    ]
    outs = [
        node.run(
            [at(v, p) for v in values],
            [e if w.fixed else e[p] for w, e in zip(weights, entries_at)],
            rows,
        )
        for p in range(count)
    ]
    return AtPoints(pytree.tree_map(lambda *parts: torch.stack(parts), outs[0], *outs[1:]))


# Besides those with an elementwise rule, which are all of one input.
_ELEMENTWISE = ("add", "sub", "mul", "div", "pow", "where", "maximum", "minimum", "masked_fill")


def is_elementwise(node: Node) -> bool:
    """Whether a node works number by number, so that more axes in front change nothing."""
    rearranges = ("clone", "contiguous")  # these may be asked for a layout of so many axes
    return node.op in _ELEMENTWISE or (
        isinstance(rule_for(node), Elementwise) and node.op not in rearranges
    )


# Operations that treat rows apart however they are called, once axis 0 of their values is that of
# the rows.
_BY_ROWS = frozenset(
    "linear conv1d conv2d batch_norm layer_norm group_norm rms_norm flatten clone contiguous max_pool1d max_pool2d avg_pool1d "
    "avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d scaled_dot_product_attention expand take".split()
)
# Those that do so unless an argument, the one at this position, names axis 0.
_BY_AXIS = {
    "softmax": 1,
    "_softmax": 1,
    "log_softmax": 1,
    "_log_softmax": 1,
    "cat": 1,
    "stack": 1,
    "slice": 1,
    "select": 1,
    "unsqueeze": 1,
    "squeeze": 1,
    "split": 2,
    "split_with_sizes": 2,
    "chunk": 2,
    "unbind": 1,
    "mean": 1,
    "sum": 1,
    "amax": 1,
    "amin": 1,
    "glu": 1,
    "cumsum": 1,
    "flip": 1,
}


def has_rows(shape: Sequence[Any]) -> bool:
    """Whether axis 0 is that of the rows."""
    return bool(shape) and isinstance(shape[0], Size)


def treats_rows_apart(node: Node, shapes: Sequence[tuple[Any, ...]]) -> bool:
    """Whether points can be taken for more rows: axis 0 is that of the rows, and what the node does keeps to a row."""
    if not any(map(has_rows, shapes)) or any(
        isinstance(size, Size) for shape in (*shapes, node.shape) for size in shape[1:]
    ):
        return False
    rank = len(shapes[0])
    if node.op in ("reshape", "view", "_unsafe_view", "expand"):
        return has_rows(node.shape) and isinstance(node.args[1][0], Size)
    if node.op == "permute":
        return bool(node.args[1][0] % rank == 0)
    if node.op == "transpose":
        return 0 not in (node.args[1] % rank, node.args[2] % rank)
    if node.op in _BY_AXIS:
        place = _BY_AXIS[node.op]
        given = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
        axes = [given] if isinstance(given, int) else given or []
        longer = rank + 1 if node.op in ("unsqueeze", "stack") else rank
        return bool(axes) and all(axis % longer for axis in axes)
    return node.op in _BY_ROWS


def _aligned(value: Tensor, rank: int) -> Tensor:
    """[T, …] with axes of one after the first, so that it goes together with values of a higher rank."""
    missing = rank + 1 - value.dim()
    return value.reshape(value.shape[0], *[1] * missing, *value.shape[1:]) if missing > 0 else value


def _folded(value: Fixed | AtPoints, shape: tuple[Any, ...], count: int) -> Any:
    """The value with the points as more rows; one that has no rows stays as it is."""
    if isinstance(value, AtPoints):
        return pytree.tree_map(lambda part: part.flatten(0, 1), value.value)
    if not has_rows(shape):
        return value.value
    return value.value.expand(count, *value.value.shape).flatten(0, 1)


def at(value: Fixed | AtPoints, point: int) -> Any:
    """The value at one point."""
    return (
        pytree.tree_map(lambda part: part[point], value.value)
        if isinstance(value, AtPoints)
        else value.value
    )
