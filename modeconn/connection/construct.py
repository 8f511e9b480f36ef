"""Builds the path between two solutions: rewrites of dead units, swings of the output layer.

Implements Theorem 4.1 of Nguyen, Bréchet, Mondelli 2021 in a simpler form: two consecutive
subnetworks side by side at disjoint positions need no copy turned upside down. A unit is *live* if
its output can reach the network's output through non-zero weights, else *dead*. From a network θ
down to its narrow network A_0, for l = L-1 … 0:

    A_l      layers 1 … l are θ's own; the output is S_l(h_l[I_l]); S_l has the units J_{l,p} of
             layer p > l; all others are dead.
    rewrite  the dead units J_{l,p} take S_l's incoming weights; the function does not change.
    swing    the output layer moves from S_{l+1}'s readout to S_l's; the logits are affine in t, so
             the loss is convex in t.

Both sides end in the same S_0 where they share one; else a general join moves one S_0 to the
other's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.connection.layer_chain import LayerChain, Norm
from modeconn.connection.positions import Positions, assign_positions, positions_around, room
from modeconn.connection.subnetworks import Subnetwork, carry, full_depth
from modeconn.errors import ModeconnError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Breakpoint:
    """A breakpoint of the path and the kind of segment that leads to it.

    Attributes:
        state: parameters and buffers. Those that did not change are the same tensors as before.
        kind: "start", "rewrite", "swing" or "shift".
        label: names the network that it is, such as "S_3 of a".
    """

    state: State
    kind: str
    label: str


@dataclass(frozen=True)
class Side:
    """One of the two networks, with its subnetworks.

    Attributes:
        name: "a" or "b".
        state: its parameters and buffers.
        subnetworks: S_0 … S_{L-1}, of full depth.
        positions: where their units are.
    """

    name: str
    state: Mapping[str, Tensor]
    subnetworks: Sequence[Subnetwork]
    positions: Sequence[Positions]


def breakpoints(
    chain: LayerChain,
    a: Mapping[str, Tensor],
    subnetworks_a: Sequence[Subnetwork],
    b: Mapping[str, Tensor],
    subnetworks_b: Sequence[Subnetwork],
) -> list[Breakpoint]:
    """Builds the breakpoints of the path from a to b; the first and the last are a and b.

    Args:
        a, b: state dicts that fit the chain.
        subnetworks_a, subnetworks_b: for every entry layer 0 … L-1 one subnetwork of that side, in
            order. Shallow ones are carried to the top. If both sides have the same S_0 the path has
            4L-1 segments, else up to 4L+3.

    Raises:
        ModeconnError: a subnetwork is missing or does not fit, or a layer has too few units for two
            of them side by side.
    """
    full_a, full_b = full_depths(chain, subnetworks_a, "a"), full_depths(chain, subnetworks_b, "b")
    if _same(full_a[0], full_b[0]):
        down, up = descents(chain, {"a": a, "b": b}, {"a": full_a, "b": full_b})
        return joined(down, up, "b")
    side_a = Side("a", a, full_a, assign_positions(chain, full_a))
    side_b = Side("b", b, full_b, assign_positions(chain, full_b))
    down, up = _descend(chain, side_a), _descend(chain, side_b)
    return [*down, *_join(chain, side_a, down[-1].state, side_b, up[-1].state), *backwards(up)]


def descents(
    chain: LayerChain,
    ends: Mapping[str, Mapping[str, Tensor]],
    subnetworks: Mapping[str, Sequence[Subnetwork]],
) -> list[list[Breakpoint]]:
    """Builds for each network the breakpoints from it down to its A_0, whose S_0 all share.

    Any two of the last breakpoints differ in dead units alone.

    Args:
        ends: the networks' state dicts by name.
        subnetworks: of each S_0 … S_{L-1}; S_0 is the same in all.

    Raises:
        ModeconnError: as `breakpoints`.
    """
    full = [full_depths(chain, subnetworks[name], name) for name in ends]
    positions = positions_around(chain, full)
    sides = [Side(name, ends[name], *each) for name, each in zip(ends, zip(full, positions))]
    return [_descend(chain, side) for side in sides]


def joined(down: Sequence[Breakpoint], up: Sequence[Breakpoint], name: str) -> list[Breakpoint]:
    """Joins two descents to the same S_0 by a rewrite, the second of them walked backwards.

    Args:
        name: of the second network, for the label.
    """
    return [*down, Breakpoint(up[-1].state, "rewrite", f"S_0 in {name}"), *backwards(up)]


def backwards(down: Sequence[Breakpoint]) -> list[Breakpoint]:
    """Walks a descent backwards from its last breakpoint, which is left out.

    Each segment keeps its kind: that of the step it led to.
    """
    return [
        Breakpoint(before.state, step.kind, before.label)
        for before, step in zip(reversed(down[:-1]), reversed(down[1:]))
    ]


def _descend(chain: LayerChain, side: Side) -> list[Breakpoint]:
    """Walks from θ to A_0: the swing to S_{L-1}, then a rewrite and a swing per entry layer."""
    steps = [Breakpoint(dict(side.state), "start", side.name)]
    for entry in reversed(range(chain.length)):
        state = steps[-1].state
        if entry < chain.length - 1:
            state = _written(chain, state, side.subnetworks[entry], side.positions[entry])
            steps.append(Breakpoint(state, "rewrite", f"S_{entry + 1} of {side.name}"))
        state = _swung(chain, state, side.subnetworks[entry], side.positions[entry])
        steps.append(Breakpoint(state, "swing", f"S_{entry} of {side.name}"))
    return steps


def _written(chain: LayerChain, state: State, sub: Subnetwork, positions: Positions) -> State:
    """Writes a subnetwork's hidden layers into the incoming weights of its units, in a copy."""
    state, before = dict(state), sub.kept
    for weight, bias, p in zip(
        sub.weights[:-1], sub.biases[:-1], range(sub.entry + 1, chain.length)
    ):
        layer, units = chain.layer(p), positions[p]
        target = state[layer.weight]
        rows = target.new_zeros(len(units), *target.shape[1:])
        layer.by_unit(rows)[:, before] = layer.by_unit(weight.to(target))
        _put(state, layer.weight, units, rows)
        if layer.bias is not None:
            _put(state, layer.bias, units, torch.zeros(len(units)) if bias is None else bias)
        if layer.norm is not None:
            for key, value in _identity(layer.norm).items():
                _put(state, key, units, state[key].new_full((len(units),), value))
        before = units
    return state


def _identity(norm: Norm) -> dict[str, float]:
    """Returns the values that make a batch norm the identity, to rounding."""
    values = ((norm.mean, 0.0), (norm.var, 1.0 - norm.eps), (norm.weight, 1.0), (norm.bias, 0.0))
    return {key: value for key, value in values if key is not None}


def _swung(chain: LayerChain, state: State, sub: Subnetwork, positions: Positions) -> State:
    """Makes a subnetwork's readout the output layer, in a copy."""
    layer, units = chain.layers[-1], positions.get(chain.length - 1, sub.kept)
    state = dict(state)
    weight = torch.zeros_like(state[layer.weight])
    layer.by_unit(weight)[:, units] = layer.by_unit(sub.weights[-1].to(weight))
    state[layer.weight] = weight
    bias = sub.biases[-1]
    if layer.bias is not None:
        old = state[layer.bias]
        state[layer.bias] = torch.zeros_like(old) if bias is None else bias.to(old)
    return state


def _put(state: State, key: str, units: Tensor, rows: Tensor) -> None:
    """Puts new rows for some units into a copy of a tensor."""
    changed = state[key].clone()
    changed[units] = rows.to(changed)
    state[key] = changed


def _join(chain: LayerChain, a: Side, state: State, b: Side, end: State) -> list[Breakpoint]:
    """Walks from a's A_0 to b's A_0 where they have different S_0.

    b's S_0 is written onto units that are free beside a's, which may not be those that it is to
    have in the end. There twins of its units are made, and the outgoing weights shift to them.
    """
    sub, target = b.subnetworks[0], b.positions[0]
    copies = {p: _copies(chain, p, a.positions[0][p], units) for p, units in target.items()}
    state = _written(chain, state, sub, copies)
    steps = [Breakpoint(state, "rewrite", "S_0 of a")]
    state = _swung(chain, state, sub, copies)
    steps.append(Breakpoint(state, "swing", "S_0 of b"))
    if any(not torch.equal(copies[p], units) for p, units in target.items()):
        state = _twinned(chain, state, copies, target)
        steps.append(Breakpoint(state, "rewrite", "S_0 of b, twins"))
        state = _shifted(chain, state, copies, target)
        steps.append(Breakpoint(state, "shift", "S_0 of b, shifted"))
    steps.append(Breakpoint(end, "rewrite", "S_0 in b"))
    return steps


def _copies(chain: LayerChain, p: int, taken: Tensor, final: Tensor) -> Tensor:
    """Chooses K_p: for each unit that S_0' is to have, itself if it is free, else another one."""
    free = torch.ones(chain.widths[p], dtype=torch.bool)
    free[taken] = False
    stays = free[final]
    free[final] = False
    spare = free.nonzero()[:, 0]
    missing = int((~stays).sum())
    if len(spare) < missing:
        raise ModeconnError(
            f"no room to join: layer {p} has {chain.widths[p]} units, and the two subnetworks of "
            f"entry layer 0 need {len(taken)} + {len(final)}: {missing - len(spare)} too few; "
            "use one subnetwork for both sides"
        )
    copies = final.clone()
    copies[~stays] = spare[:missing]
    return copies


def _twinned(chain: LayerChain, state: State, copies: Positions, target: Positions) -> State:
    """Gives each unit of `target` the incoming weights of its copy, in all hidden layers."""
    state = dict(state)
    for layer in chain.layers[:-1]:
        p = layer.index
        for key in layer.incoming():
            _put(state, key, target[p], state[key][copies[p]])
    return state


def _shifted(chain: LayerChain, state: State, copies: Positions, target: Positions) -> State:
    """Moves outgoing weights from each copy to its twin, in all layers at once."""
    state = dict(state)
    for layer in chain.layers[1:]:
        units, twins = copies[layer.index - 1], target[layer.index - 1]
        away = units != twins
        changed = state[layer.weight].clone(memory_format=torch.contiguous_format)
        view, old = layer.by_unit(changed), layer.by_unit(state[layer.weight])
        # The twins are dead until now, but for being read by rows that are dead themselves: those
        # may keep what they read.
        readers: Tensor | slice = slice(None)
        if layer.index < chain.length:
            readers = torch.cat([copies[layer.index], target[layer.index]])
        block = view[readers]
        block[:, units[away]] = 0
        block[:, twins[away]] = old[readers][:, units[away]]
        view[readers] = block
        state[layer.weight] = changed
    return state


def _same(a: Subnetwork, b: Subnetwork) -> bool:
    """Whether two subnetworks have equal weights."""
    if a is b:
        return True
    pairs = [*zip(a.weights, b.weights), *zip(a.biases, b.biases)]
    return len(a.weights) == len(b.weights) and all(_equal(x, y) for x, y in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def full_depths(chain: LayerChain, subs: Sequence[Subnetwork], name: str) -> list[Subnetwork]:
    """Carries shallow subnetworks to the top and checks that all fit."""
    full = [carry(chain, sub) for sub in subs]
    _check(chain, full, name)
    return full


def _check(chain: LayerChain, subs: Sequence[Subnetwork], name: str) -> None:
    if [sub.entry for sub in subs] != list(range(chain.length)):
        raise ModeconnError(
            f"the subnetworks of {name} have entry layers {[sub.entry for sub in subs]}: "
            f"expected 0 to {chain.length - 1}"
        )
    if len(subs[0].kept) != chain.widths[0]:
        raise ModeconnError(
            f"the subnetwork of entry layer 0 of {name} keeps {len(subs[0].kept)} "
            f"of {chain.widths[0]} inputs: expected all"
        )
    for sub in subs:
        _check_shapes(chain, sub, name)
    kept = {sub.entry: len(sub.kept) for sub in subs}
    lines = room(chain, kept, {sub.entry: sub.widths for sub in subs})
    if lines:
        raise ModeconnError(
            f"no room for the subnetworks of {name} side by side: {'; '.join(lines[:3])}"
        )


def _check_shapes(chain: LayerChain, sub: Subnetwork, name: str) -> None:
    """Raises unless a subnetwork reaches the output and each layer reads the one before."""
    if not full_depth(chain, sub):
        raise ModeconnError(
            f"the subnetwork of entry layer {sub.entry} of {name} does not reach the last layer"
        )
    before = len(sub.kept)
    for weight, layer in zip(sub.weights, chain.layers[sub.entry :]):
        read = layer.by_unit(weight).shape[1]
        if read != before:
            raise ModeconnError(
                f"the subnetwork of entry layer {sub.entry} of {name}: its weight of layer "
                f"{layer.index} reads {read} units, expected {before}"
            )
        before = len(weight)
