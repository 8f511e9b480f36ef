"""Derives which units of every value can reach a network's output, from the weights alone.

Liveness goes down from the output, node by node: a node whose value is needed in some units needs
those units of its inputs that its operation reads for them (plan/rules), and of the inputs of a
product only those whose weights are not exactly zero. A unit that nothing needs is dead: whatever
its value, as long as it is finite, the output is the same.

An operation without a rule reads all of its inputs and of its entries: always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Graph, Node
from modeconn.plan.rules.base import Mismatch, Rule, Shapes
from modeconn.plan.rules.products import Grouped, Product
from modeconn.plan.rules.table import rule_for
from modeconn.plan.rules.views import Concatenation
from modeconn.plan.units import ALL, Units, static
from modeconn.plan.weights import Cut

# The non-zero entries of a parameter or buffer, by its name: bool, of its shape.
NonZero = Callable[[str], Tensor]


@dataclass(frozen=True)
class Liveness:
    """The live part of a network for some weights.

    Attributes:
        units: by node the live units of its value; a node that is not there is dead.
        cuts: by live node, for each of its entries, the part that the live units depend on.
    """

    units: dict[int, Units]
    cuts: dict[int, Sequence[Cut]]

    def whole(self, graph: Graph) -> bool:
        """Whether every unit of every value is live."""
        return len(self.units) == len(graph.nodes) and not any(self.units.values())


def live_units(graph: Graph, nonzero: NonZero) -> Liveness:
    """Derives the live units of every node.

    Args:
        graph: of a network whose output is one tensor.
        nonzero: tells the weights that are not exactly zero anywhere on the path's segment.
    """
    found = Liveness(dict.fromkeys(graph.outputs(), ALL), {})
    for node in reversed(graph.nodes):
        if node.id not in found.units or node.op == "input":
            continue
        requested = found.units[node.id]
        inputs, cuts = _read(graph, node, requested, nonzero)
        found.cuts[node.id] = cuts
        for i, units in zip(node.inputs, inputs):
            if units is not None:
                needed = units.of(graph.nodes[i].shape)
                before = found.units.get(i)
                found.units[i] = needed if before is None else needed.union(before)
    return found


def _read(
    graph: Graph, node: Node, requested: Units, nonzero: NonZero
) -> tuple[list[Units | None], Sequence[Cut]]:
    """Returns what a node reads for some units: of each input, None for nothing; of each entry."""
    rule = rule_for(node)
    if isinstance(rule, Product):
        return _read_by_product(rule, node, requested, nonzero)
    if isinstance(rule, Grouped):
        return _read_by_groups(rule, node, requested, nonzero)
    entries = [tuple(nonzero(name).shape) for name in node.entries]
    shapes = Shapes([graph.nodes[i].shape for i in node.inputs], entries)
    wanted = rule.requests(node, requested, shapes, _everything)
    try:
        cuts = rule.fit(node, requested, wanted, shapes).cuts
    except Mismatch:
        wanted, cuts = [ALL] * len(node.inputs), [()] * len(node.entries)
    if isinstance(rule, Concatenation):
        return _parts(rule, node, requested, shapes, wanted), cuts
    return list(wanted), cuts


def _everything(entry: int, axis: int, cut: Cut) -> np.ndarray:
    """Is never asked: products alone look at weights, and they are looked at here."""
    raise NotImplementedError


def _read_by_product(
    rule: Product, node: Node, requested: Units, nonzero: NonZero
) -> tuple[list[Units | None], list[Cut]]:
    """Returns what linear layers and convolutions read: the columns of rows that are requested."""
    axis = rule.axis(node)
    rows = requested.get(axis)
    weight = nonzero(node.entries[rule.weight]).movedim(rule.outputs, 0)  # [out, in, …]
    live = _any(weight if rows is None else weight[torch.from_numpy(rows)], keep=1)
    cuts: list[Cut] = [(rows,)] * len(node.entries)
    cuts[rule.weight] = (rows, None) if rule.outputs == 0 else (None, rows)
    columns = np.flatnonzero(live)
    if not len(columns):
        return [None], cuts
    return [Units({**rule.beside(node, requested), axis: columns})], cuts


def _read_by_groups(
    rule: Grouped, node: Node, requested: Units, nonzero: NonZero
) -> tuple[list[Units | None], list[Cut]]:
    """Returns what grouped and depthwise convolutions read, group by group."""
    groups, outputs = node["groups"], static(node.shape[1])
    rows = requested.get(1)
    weight = nonzero(node.entries[0])
    weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).flatten(3)
    if rule.transposed:  # [in, out / groups, …]
        weight = weight.transpose(1, 2)
    wanted = torch.zeros(outputs, dtype=torch.bool)
    wanted[slice(None) if rows is None else torch.from_numpy(rows)] = True
    mask = wanted.view(groups, -1, *[1] * (weight.dim() - 2)).to(weight.device)
    columns = np.flatnonzero((weight & mask).transpose(1, 2).flatten(2).any(2).flatten().cpu())
    # The rows of a transposed convolution are spread over its groups: it is taken as a whole.
    cuts: list[Cut] = [(None if rule.transposed else rows,), (rows,)]
    return [Units({1: columns}) if len(columns) else None], cuts[: len(node.entries)]


def _any(mask: Tensor, keep: int) -> np.ndarray:
    """Whether each index along one axis has any true number."""
    others = [axis for axis in range(mask.dim()) if axis != keep]
    found: np.ndarray = mask.any(dim=others).cpu().numpy()
    return found


def _parts(
    rule: Rule, node: Node, requested: Units, shapes: Shapes, wanted: Sequence[Units]
) -> list[Units | None]:
    """Leaves out the inputs of a concatenation of which nothing is requested."""
    axis = node["dim"] % len(node.shape)
    index = requested.get(axis)
    if index is None:
        return list(wanted)
    found: list[Units | None] = []
    start = 0
    for shape, units in zip(shapes.inputs, wanted):
        stop = start + static(shape[axis])
        found.append(units if bool(((index >= start) & (index < stop)).any()) else None)
        start = stop
    return found


def live_part(tensor: Tensor, cut: Cut) -> Tensor:
    """Returns the part of a parameter or buffer that live units depend on."""
    for axis, index in enumerate(cut):
        if index is not None:
            tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
    return tensor
