"""Bounds the size of every value along a segment, so that no dead unit can overflow there.

A dead unit is read through weights of zero. That passes nothing on as long as its value is finite:
infinity times zero is NaN. Between two finite ends of a segment, products of weights that both move
may still overflow. So the graph is run once more, on bounds: with the largest magnitude of every
input over all rows, and of every weight over the two ends, each operation gives a bound of its own
value (bounds.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.capture.graph import Graph, In, Node
from modeconn.connection.captured.bounds import BOUNDS, NoBound
from modeconn.connection.captured.segments import named, tensor_of

State = Mapping[str, Tensor]

# Arguments that are indices, whose size does not matter.
_INDICES = {"embedding": "indices"}


@dataclass(frozen=True, eq=False)
class _Fixed:
    """A value that neither inputs nor weights enter."""

    value: Tensor


@dataclass(frozen=True)
class _Unknown:
    """Stands for the values of a node that no bound is known of."""

    node: Node
    why: str


def largest_value(graph: Graph, start: State, stop: State, inputs: Tensor) -> tuple[float, str]:
    """Bounds every value on the segment between two states, for all rows, units and t.

    Args:
        graph: of the network, which takes one tensor.
        start, stop: the ends of the segment, all of them finite.
        inputs: the largest magnitude of each number of a row, over all rows: [1, …].

    Returns:
        the largest bound, and the node it is of, in words; NaN where no bound is known of one.
    """
    values: dict[int, Tensor | _Fixed | _Unknown] = {}
    worst, where = float(inputs.abs().max()), "the inputs"
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "input":
                values[node.id] = inputs.double().abs()
                continue
            values[node.id] = found = _value(graph, node, values, start, stop)
            top = float(found.max()) if isinstance(found, Tensor) and found.numel() else 0.0
            if not math.isfinite(top):  # what follows may be NaN
                return top, named(node)
            if top > worst:
                worst, where = top, named(node)
    for i in graph.outputs():
        if isinstance(unknown := values[i], _Unknown):
            name = f"{named(unknown.node)}{unknown.why}"
            return math.nan, f"{name}, of whose values no bound is known"
    return worst, where


def _value(
    graph: Graph,
    node: Node,
    values: Mapping[int, Tensor | _Fixed | _Unknown],
    start: State,
    stop: State,
) -> Tensor | _Fixed | _Unknown:
    """Returns the bound of a node's value, or the value itself where it is a constant."""
    given = [values[i] for i in node.inputs]
    fixed = [value.value for value in given if isinstance(value, _Fixed)]
    constants = [graph.constants[name] for name in node.entries if name in graph.constants]
    if len(fixed) == len(given) and len(constants) == len(node.entries):
        return _Fixed(node.run(fixed, constants, 1))
    if node.op not in BOUNDS:
        return _Unknown(node, "")
    index = node.arguments.get(_INDICES.get(node.op, ""))
    inputs = []
    for place, value in enumerate(given):
        if index == In(place):
            value = torch.zeros(1)
        if isinstance(value, _Unknown):
            return value
        inputs.append(value.value.double().abs() if isinstance(value, _Fixed) else value)
    ends = [(tensor_of(graph, start, name), tensor_of(graph, stop, name)) for name in node.entries]
    try:
        return BOUNDS[node.op](node, inputs, [(a.double(), b.double()) for a, b in ends])
    except NoBound as error:
        return _Unknown(node, f", {error}")
