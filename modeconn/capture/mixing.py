"""Looks for samples that depend on each other, with numbers, where nothing is proved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modeconn.capture.graph import Graph
from modeconn.capture.opaque import tensors_of
from modeconn.data.inputs import Inputs, rows, take
from modeconn.errors import out_of_memory

# Two runs of the same operations differ by the order of sums alone. So much of a value, as a
# multiple of the precision's epsilon, and of the largest value where it is small.
_RELATIVE, _ABSOLUTE = 2048.0, 256.0


def mixes(graph: Graph, state: dict[str, Tensor], x: Inputs) -> bool:
    """Whether a sample's output depends on the other samples of a batch, as far as can be told.

    Args:
        graph: of which no proof is known (`rows_are_independent`).
        state: parameters and buffers.
        x: a batch: some networks mix samples only where there are many.
    """
    count = rows(x)
    if count < 2:
        return False
    try:
        whole = run(graph, state, x)
        first = run(graph, state, take(x, 0, count // 2))
        rest = run(graph, state, take(x, count // 2, count))
    except (RuntimeError, ValueError) as error:  # the module takes batches of one size only
        if out_of_memory(error):
            raise
        return True
    pairs = zip(tensors_of(first), tensors_of(rest), tensors_of(whole))
    return not all(_apart(*three, count) for three in pairs)


def _apart(first: Tensor, rest: Tensor, whole: Tensor, count: int) -> bool:
    """Whether an output of two parts of a batch, joined, is that of the batch."""
    if not whole.dim() or len(whole) != count:
        return True  # no output of samples
    if first.shape[1:] != rest.shape[1:] or len(first) + len(rest) != count:
        return False
    return alike(torch.cat([first, rest]), whole)


def run(graph: Graph, state: dict[str, Tensor], x: Inputs) -> Any:
    """Interprets a graph for one set of parameters and buffers; values go after their last use."""
    return graph.fill_output(values_of(graph, state, x, graph.outputs()))


def values_of(
    graph: Graph, state: Mapping[str, Tensor], x: Inputs, requested: Iterable[int]
) -> dict[int, Any]:
    """Interprets a graph up to the last of some nodes, and returns the values of these."""
    return dict(each_value(graph, state, x, requested))


def each_value(
    graph: Graph, state: Mapping[str, Tensor], x: Inputs, requested: Iterable[int]
) -> Iterator[tuple[int, Any]]:
    """Interprets a graph up to the last of some nodes, and yields each of these and its value.

    No value is held after its last use.
    """
    wanted = set(requested)
    values: dict[int, Any] = dict(enumerate(graph.given(x)))
    yield from ((i, value) for i, value in values.items() if i in wanted)
    nodes = graph.nodes[: max(wanted, default=0) + 1]
    last: dict[int, int] = {}
    for node in nodes:
        last |= dict.fromkeys(node.inputs, node.id)
    for node in nodes[len(values) :]:
        tensors = [
            graph.constants[name] if name in graph.constants else state[name]
            for name in node.entries
        ]
        values[node.id] = node.run([values[i] for i in node.inputs], tensors, rows(x))
        if node.id in wanted:
            yield node.id, values[node.id]
        for i in (*node.inputs, node.id):
            if last.get(i, node.id) == node.id:
                values.pop(i, None)


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are those of the same operations on the same values."""
    first, second = tensors_of(one), tensors_of(other)
    return len(first) == len(second) and all(map(alike, first, second))


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two values are equal element by element, up to the order of sums.

    Elements that are equal, as the huge ones of masks are and infinities, say nothing of the others
    and set no scale.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    differs = (one != other) & ~(one.isnan() & other.isnan())
    if not bool(differs.any()):
        return True
    a, b = one[differs].double(), other[differs].double()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return False
    epsilon = torch.finfo(one.dtype).eps
    ordinary = b.abs().median()
    allowed = epsilon * (_RELATIVE * b.abs() + _ABSOLUTE * max(float(ordinary), _typical(other)))
    return bool(((a - b).abs() <= allowed).all())


def _typical(values: Tensor) -> float:
    """The size of ordinary values: what is masked by huge ones is not."""
    finite = values[values.isfinite()].abs().double()
    return float(finite.median()) if finite.numel() else 0.0
