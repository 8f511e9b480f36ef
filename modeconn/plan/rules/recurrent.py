"""Rule of recurrent layers: the units of each layer and direction are permuted on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modeconn.capture.graph import Node
from modeconn.errors import Unsupported
from modeconn.plan.rules.axes import (
    Atom,
    Axis,
    Unflattened,
    Uniform,
    concatenated,
    product,
    resolve,
    tie,
)
from modeconn.plan.rules.base import Axes, Rule


class Recurrent(Rule):
    """RNN, GRU and LSTM: states of units that the gates of a step know by their number.

    Args:
        gates: blocks of a weight's rows, each with a row for each unit.
        states: tensors of a state: 2 for an LSTM, which has cells as well.
    """

    def __init__(self, gates: int, states: int = 1) -> None:
        super().__init__()
        self._gates, self._states = gates, states

    def tie(self, node: Node, axes: Axes) -> list[list[Axis]]:
        directions = 2 if node["bidirectional"] else 1
        per = 4 if node["has_biases"] else 2
        layers, params = node["num_layers"], [axes.of(leaf) for leaf in node["params"]]
        if len(params) != layers * directions * per:
            raise Unsupported("projections of its states")
        given = axes.of(node["input"])
        feed, units = given[-1], []
        for layer in range(layers):
            axes.mix(feed, given[:-1])
            outputs = []
            for direction in range(directions):
                first = (layer * directions + direction) * per
                outputs.append(self._cell(params[first : first + per], feed))
            feed = concatenated(outputs)
            units += outputs
        _start(node["hx"], axes, units)
        rows = given[0] if node["batch_first"] else given[1]
        last = Unflattened(None, len(units), units[0].size, units)
        state: list[Axis] = [last.outer, rows, last.inner]
        return [[*given[:-1], feed], *([list(state)] * self._states)]

    def _cell(self, params: Sequence[list[Axis]], feed: Axis) -> Axis:
        """Tie the weights of one layer and direction, and return the axis of its units."""
        from_input, from_state, *biases = params
        units = Atom(from_state[1].size)
        tie(from_state[1], units)
        tie(from_input[1], feed)
        for rows in (from_input[0], from_state[0], *(bias[0] for bias in biases)):
            tie(rows, product([Atom(self._gates, "gates"), units]))
        return units


def _start(leaves: Any, axes: Axes, units: Sequence[Axis]) -> None:
    """Tie the states that the layers begin with, which are zero as a rule."""
    for leaf in leaves if isinstance(leaves, list | tuple) else [leaves]:
        first = axes.of(leaf)
        if isinstance(resolve(first[-1]), Uniform):
            continue
        for each in units:
            tie(first[-1], each)
