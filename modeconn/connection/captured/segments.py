"""Classifies the linear segments of a path of any captured network, from the weights alone.

Weights are linear in t on a segment, so a weight that is zero at both ends is zero throughout, and
one that is equal at both ends does not change. The kinds are those of chains of layers
(segment_kinds.py), but for shifts, which are found in chains alone:

    rewrite  nothing changes that a live unit depends on. The function is constant.
    swing    of what live units depend on, only that changes in which the outputs are affine: the
             last layer, or a layer that only linear operations follow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modeconn.capture.graph import Entry, Graph, Node
from modeconn.connection.captured.liveness import Liveness, NonZero, live_part, live_units
from modeconn.connection.captured.network import CapturedNetwork
from modeconn.connection.segment_kinds import REWRITE, SWING, Evidence
from modeconn.errors import ModeconnError
from modeconn.plan.rules.base import UNKNOWN
from modeconn.plan.rules.table import rule_for

State = Mapping[str, Tensor]
# Rows that a message lists by number: enough to find the mistake.
_LISTED = 6


def classify_captured(network: CapturedNetwork, start: State, stop: State) -> Evidence:
    """Classifies the segment from one state to another.

    Args:
        network: the captured network.
        start, stop: states of equal keys and shapes.

    Raises:
        ModeconnError: the segment is no rewrite and no swing: the text names the entry, the node
            and the live units that moved, and operations whose liveness is not known. Or a weight
            is not finite, a variance negative, tied weights differ.
    """
    for state in (start, stop):
        _check_values(network, state)
    moved = _moved(network, start, stop)
    if not moved:
        return Evidence(REWRITE, (), "nothing moves")
    live = liveness_between(network, start, stop)
    changed = _changed(network.graph, live, start, stop)
    keys = ", ".join(moved)
    if not changed:
        return Evidence(REWRITE, moved, f"only what no live unit depends on moves: {keys}")
    _check_affine(network, live, changed, start, stop)
    touched: dict[str, None] = {}
    for node_id, places in changed.items():
        touched |= dict.fromkeys(network.graph.nodes[node_id].entries[k] for k in places)
    text = f"the logits are affine in t: live units depend on what moves in {', '.join(touched)}"
    return Evidence(SWING, moved, text)


def liveness_between(network: CapturedNetwork, start: State, stop: State) -> Liveness:
    """Derives the units that are live anywhere between two states."""
    return live_units(network.graph, nonzero_at(network.graph, start, stop))


def nonzero_at(graph: Graph, *states: State) -> NonZero:
    """Tells which numbers of an entry are non-zero in any of some states."""
    known: dict[str, Tensor] = {}

    def nonzero(name: str) -> Tensor:
        if name not in known:
            mask = tensor_of(graph, states[0], name) != 0
            for state in states[1:]:
                mask = mask | (tensor_of(graph, state, name) != 0)
            known[name] = mask
        return known[name]

    return nonzero


def tensor_of(graph: Graph, state: State, name: str) -> Tensor:
    """Returns a parameter, buffer or constant by its name."""
    return graph.constants[name] if name in graph.constants else state[name]


def _moved(network: CapturedNetwork, start: State, stop: State) -> tuple[str, ...]:
    """Lists the keys of the floating point tensors that differ; a path does not move the others.

    They are in the order in which the network reads them, whatever the order of the states.

    Raises:
        ModeconnError: one that moves is not read by the network.
    """
    order: dict[str, None] = {}
    for node in network.graph.nodes:
        order |= dict.fromkeys(key for key in node.entries if key in start)
    moved = tuple(
        key
        for key in dict.fromkeys([*order, *sorted(start)])
        if start[key].is_floating_point() and _differs(start[key], stop[key])
    )
    stray = [key for key in moved if key in network.others]
    if stray:
        raise ModeconnError(f"{stray[0]} changes, and is nothing that the network reads")
    return moved


def _differs(a: Tensor, b: Tensor) -> bool:
    same = a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride())
    return not same and not torch.equal(a, b)


def _check_values(network: CapturedNetwork, state: State) -> None:
    """Raises where a dead unit's value may be no number, which a weight of zero would pass on."""
    for key, value in state.items():
        numbers = value.is_floating_point() and value.numel()
        if numbers and not all(map(torch.isfinite, value.aminmax())):
            raise ModeconnError(f"{key} is not finite")
    for group in network.ties:
        first = state[group[0]]
        for key in group[1:]:
            if not torch.equal(first, state[key]):
                raise ModeconnError(f"{key} and {group[0]} are one tensor in the model, and differ")
    for node in network.graph.nodes:
        if node.op == "batch_norm":
            _check_variance(node, state)


def _check_variance(node: Node, state: State) -> None:
    leaf = node["var"]
    if not isinstance(leaf, Entry) or node.entries[leaf.index] not in state:
        return
    key = node.entries[leaf.index]
    smallest = float(state[key].min())
    if not smallest + node["eps"] > 0:
        raise ModeconnError(f"{key} holds {smallest:.4g}: a variance cannot be negative")


def _changed(graph: Graph, live: Liveness, start: State, stop: State) -> dict[int, list[int]]:
    """Finds by node the entries, by their places, whose live part differs between the ends."""
    changed: dict[int, list[int]] = {}
    for node_id, cuts in live.cuts.items():
        node = graph.nodes[node_id]
        for place, (name, cut) in enumerate(zip(node.entries, cuts)):
            a, b = (tensor_of(graph, state, name) for state in (start, stop))
            if _differs(a, b) and not torch.equal(live_part(a, cut), live_part(b, cut)):
                changed.setdefault(node_id, []).append(place)
    return changed


# -- swings ----------------------------------------------------------------------------------------


def _check_affine(
    network: CapturedNetwork,
    live: Liveness,
    changed: Mapping[int, list[int]],
    start: State,
    stop: State,
) -> None:
    """Raises unless the outputs are affine in the live weights that change.

    Going up, a value is affine in t where its operation is linear in the weights that change and
    its inputs do not change, or linear in the inputs that change and its weights do not.
    """
    graph = network.graph
    moving: set[int] = set()
    for node in graph.nodes:
        if node.id not in live.cuts:
            continue
        entries = frozenset(changed.get(node.id, ()))
        inputs = frozenset(k for k, i in enumerate(node.inputs) if i in moving)
        if not entries and not inputs:
            continue
        rule = rule_for(node)
        by_entries = bool(entries) and not inputs and entries <= rule.linear_entries(node)
        by_inputs = bool(inputs) and not entries and bool(rule.linearity(node, inputs))
        if not by_entries and not by_inputs:
            raise ModeconnError(_refusal(graph, live, changed, node, start, stop))
        moving.add(node.id)


def _refusal(
    graph: Graph,
    live: Liveness,
    changed: Mapping[int, list[int]],
    culprit: Node,
    start: State,
    stop: State,
) -> str:
    """Says which live part changes, and the operation that it is not affine through."""
    node_id = max(changed)
    node = graph.nodes[node_id]
    place = changed[node_id][0]
    name, cut = node.entries[place], live.cuts[node_id][place]
    a, b = (live_part(tensor_of(graph, state, name), cut) for state in (start, stop))
    different = a != b
    along = different.flatten(1).any(1) if different.dim() > 1 else different.flatten()
    rows = along.nonzero().flatten().cpu()
    if cut and cut[0] is not None:
        rows = torch.from_numpy(cut[0])[rows]
    listed = ", ".join(map(str, rows[:_LISTED].tolist())) + (", …" if len(rows) > _LISTED else "")
    unknown = [
        other for other in graph.nodes[node_id:] if other.id in live.cuts and is_unknown(other)
    ]
    why = "" if not unknown else f"; the liveness below {named(unknown[0])} is not known"
    return (
        f"it is no rewrite, for {named(node)} is live and reads {name}, which moves in row "
        f"{listed}{why}; and no swing, for the outputs are not affine through {named(culprit)}"
    )


def is_unknown(node: Node) -> bool:
    """Whether a node's operation has no rule, so that it is taken to need all that it reads."""
    return node.op != "input" and rule_for(node) is UNKNOWN


def named(node: Node) -> str:
    """Names a node by its operation and its place in the module."""
    return f"{node.op} ({node.source})" if node.source else node.op
