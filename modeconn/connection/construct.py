"""The constructive path between two solutions, from their subnetworks: rewrites of dead units and swings of the readout.

Nguyen, Bréchet, Mondelli 2021, Theorem 4.1, in a simpler form: two consecutive subnetworks side by
side at disjoint positions need no copy turned upside down. From a network θ down to its narrow
network A_0, for l = L-1 … 0:

    A_l: layers 1 … l are θ's own; the output is S_l(h_l[I_l]); S_l has the units J_{l,p} of layer p
    > l; all others are dead. rewrite: the dead units J_{l,p} take S_l's incoming entries. The
    function does not change. swing: the last layer moves from S_{l+1}'s readout to S_l's. The
    logits are affine in t, so the loss is convex in t.

Both sides end in the same S_0 where they share one; else a general join moves one S_0 to the
other's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.connection.chain import Chain, Norm
from modeconn.connection.subnetworks import Subnetwork, carry, full_depth
from modeconn.errors import ModeconnError

State = dict[str, Tensor]
# Layer p → the units of layer p that a subnetwork has.
Places = dict[int, Tensor]


@dataclass(frozen=True)
class Step:
    """A break point of the path and how it is reached from the one before.

    Attributes:
        state: the parameters. Entries that did not change are the same tensors as before.
        kind: "start", "rewrite", "swing" or "shift".
        label: what the network is now, such as "S_3 of a".
    """

    state: State
    kind: str
    label: str


@dataclass(frozen=True)
class Side:
    """One of the two networks, with a full-depth subnetwork for every entry layer and the places of their units."""

    name: str
    state: Mapping[str, Tensor]
    subnetworks: Sequence[Subnetwork]
    places: Sequence[Places]


def breakpoints(
    chain: Chain,
    a: Mapping[str, Tensor],
    subnetworks_a: Sequence[Subnetwork],
    b: Mapping[str, Tensor],
    subnetworks_b: Sequence[Subnetwork],
) -> list[Step]:
    """The break points of the path from a to b; the first and the last are a and b themselves.

    Args:
        a, b: state dicts that fit the chain.
        subnetworks_a, subnetworks_b: for every entry layer 0 … L-1 one subnetwork of that side, in
            order. Heads are carried to the top. If both have the same S_0 the path has 4L-1
            segments, else up to 4L+3.

    Raises:
        ModeconnError: a subnetwork is missing or does not fit, or a layer has too few units for two
            of them side by side.
    """
    full = [[carry(chain, sub) for sub in subs] for subs in (subnetworks_a, subnetworks_b)]
    for subs, name in zip(full, ("a", "b")):
        _check(chain, subs, name)
    shared = _same(full[0][0], full[1][0])
    places = [place(chain, subs) for subs in full]
    if shared:
        places[0][0] = places[1][0] = _shared_place(chain, full, places)
    sides = [Side(n, s, f, p) for n, s, f, p in zip(("a", "b"), (a, b), full, places)]
    down, up = (_descend(chain, side) for side in sides)
    if shared:
        middle = [Step(up[-1].state, "rewrite", "S_0 in b")]
    else:
        middle = _join(chain, sides[0], down[-1].state, sides[1], up[-1].state)
    # Walked backwards, each segment keeps its kind: that of the step it led to.
    back = [
        Step(before.state, step.kind, before.label)
        for before, step in zip(reversed(up[:-1]), reversed(up[1:]))
    ]
    return [*down, *middle, *back]


def room(chain: Chain, kept: Mapping[int, int], widths: Mapping[int, Sequence[int]]) -> list[str]:
    """Where two consecutive subnetworks do not fit side by side (theory: |I_{l+1}| + m_{l,l+1} ≤ n_{l+1} and so on).

    Args:
        kept: |I_l| by entry layer.
        widths: by entry layer the hidden widths m_{l,l+1}, m_{l,l+2}, … of its full-depth
            subnetwork.

    Returns:
        one line for each violation; empty if there is room.
    """
    lines = []
    for entry, own in sorted(widths.items()):
        above = widths.get(entry + 1, ())
        for index, units in enumerate(own):
            p = entry + 1 + index
            if index and index > len(above):
                continue
            other, what = (
                (kept.get(p, 0), f"|I_{p}|")
                if index == 0
                else (above[index - 1], f"m_{{{entry + 1},{p}}}")
            )
            if units + other > chain.widths[p]:
                short = units + other - chain.widths[p]
                lines.append(
                    f"layer {p} has {chain.widths[p]} units, {short} short of m_{{{entry},{p}}} + {what} = {units} + {other}"
                )
    return lines


def place(chain: Chain, subs: Sequence[Subnetwork]) -> list[Places]:
    """Units J_{l,p} for each subnetwork, disjoint from those of the next one up.

    At layer p, S_l prefers the complement of I_p where p - l is odd and I_p itself where it is
    even: so every subnetwork that is no wider than those regions finds the same place whatever the
    others are.
    """
    places: list[Places] = [{} for _ in subs]
    for entry in reversed(range(chain.length - 1)):
        for p in range(entry + 1, chain.length):
            occupied = subs[p].kept if p == entry + 1 else places[entry + 1][p]
            places[entry][p] = _choose(chain, subs, entry, p, [occupied])
    return places


def _shared_place(
    chain: Chain, subs: Sequence[Sequence[Subnetwork]], places: Sequence[Sequence[Places]]
) -> Places:
    """Units for an S_0 that both sides use: free on both of them."""
    found: Places = {}
    for p in range(1, chain.length):
        occupied = [own[1].kept if p == 1 else there[1][p] for own, there in zip(subs, places)]
        found[p] = _choose(chain, subs[0], 0, p, occupied)
    return found


def _choose(
    chain: Chain, subs: Sequence[Subnetwork], entry: int, p: int, occupied: Sequence[Tensor]
) -> Tensor:
    """Free units of layer p for S_entry, those of its own region first."""
    wanted = subs[entry].widths[p - entry - 1]
    free = torch.ones(chain.widths[p], dtype=torch.bool)
    for units in occupied:
        free[units.cpu()] = False
    own = torch.zeros(chain.widths[p], dtype=torch.bool)
    own[subs[p].kept.cpu()] = True
    if (p - entry) % 2:
        own = ~own
    order = torch.cat([(free & own).nonzero()[:, 0], (free & ~own).nonzero()[:, 0]])
    if len(order) < wanted:
        raise ModeconnError(
            f"no room: layer {p} has {chain.widths[p]} units, {len(order)} of them free, and the subnetwork of entry layer "
            f"{entry} needs {wanted}: {wanted - len(order)} too few; keep fewer units in layer {p} or use narrower subnetworks"
        )
    return order[:wanted].sort().values


def _descend(chain: Chain, side: Side) -> list[Step]:
    """From θ to A_0: the swing to S_{L-1}, then a rewrite and a swing for each entry layer down to 0."""
    steps = [Step(dict(side.state), "start", side.name)]
    for entry in reversed(range(chain.length)):
        state = steps[-1].state
        if entry < chain.length - 1:
            state = _written(chain, state, side.subnetworks[entry], side.places[entry])
            steps.append(Step(state, "rewrite", f"S_{entry + 1} of {side.name}"))
        state = _swung(chain, state, side.subnetworks[entry], side.places[entry])
        steps.append(Step(state, "swing", f"S_{entry} of {side.name}"))
    return steps


def _written(chain: Chain, state: State, sub: Subnetwork, places: Places) -> State:
    """The state with a subnetwork's hidden layers written into the incoming entries of its units."""
    state, before = dict(state), sub.kept
    for weight, bias, p in zip(
        sub.weights[:-1], sub.biases[:-1], range(sub.entry + 1, chain.length)
    ):
        layer, units = chain.layer(p), places[p]
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
    """What makes a batch norm the identity, to rounding."""
    values = ((norm.mean, 0.0), (norm.var, 1.0 - norm.eps), (norm.weight, 1.0), (norm.bias, 0.0))
    return {key: value for key, value in values if key is not None}


def _swung(chain: Chain, state: State, sub: Subnetwork, places: Places) -> State:
    """The state with a subnetwork's readout as its last layer."""
    layer, units = chain.layers[-1], places.get(chain.length - 1, sub.kept)
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
    """New rows for some units of an entry, in a copy of its own."""
    changed = state[key].clone()
    changed[units] = rows.to(changed)
    state[key] = changed


def _join(chain: Chain, a: Side, state: State, b: Side, end: State) -> list[Step]:
    """From a's A_0 to b's A_0 where they have different S_0 (theory, "Joining A_0 and A_0'")."""
    sub, target = b.subnetworks[0], b.places[0]
    copies = {p: _copies(chain, p, a.places[0][p], units) for p, units in target.items()}
    state = _written(chain, state, sub, copies)
    steps = [Step(state, "rewrite", "S_0 of a")]
    state = _swung(chain, state, sub, copies)
    steps.append(Step(state, "swing", "S_0 of b"))
    moved = {p: copies[p] != target[p] for p in target}
    if any(bool(m.any()) for m in moved.values()):
        state = _each(chain, state, lambda p, key, value: _twinned(value, target[p], copies[p]))
        steps.append(Step(state, "rewrite", "S_0 of b, twins"))
        state = _shifted(chain, state, copies, target)
        steps.append(Step(state, "shift", "S_0 of b, shifted"))
    steps.append(Step(end, "rewrite", "S_0 in b"))
    return steps


def _copies(chain: Chain, p: int, taken: Tensor, wanted: Tensor) -> Tensor:
    """K_p: for each unit that S_0' is to have in the end itself if it is free, else another free one."""
    free = torch.ones(chain.widths[p], dtype=torch.bool)
    free[taken] = False
    stays = free[wanted]
    free[wanted] = False
    spare = free.nonzero()[:, 0]
    missing = int((~stays).sum())
    if len(spare) < missing:
        raise ModeconnError(
            f"no room to join: layer {p} has {chain.widths[p]} units, and the two subnetworks of entry layer 0 need "
            f"{len(taken)} + {len(wanted)}: {missing - len(spare)} too few; use one subnetwork for both sides"
        )
    copies = wanted.clone()
    copies[~stays] = spare[:missing]
    return copies


def _each(chain: Chain, state: State, change: Callable[[int, str, Tensor], Tensor]) -> State:
    """The state with a change made to every incoming entry of the hidden layers."""
    state = dict(state)
    for layer in chain.layers[:-1]:
        for key in layer.incoming():
            state[key] = change(layer.index, key, state[key])
    return state


def _twinned(value: Tensor, units: Tensor, twins: Tensor) -> Tensor:
    changed = value.clone()
    changed[units] = value[twins]
    return changed


def _shifted(chain: Chain, state: State, copies: Places, target: Places) -> State:
    """Outgoing weights moved from each copy to its twin, in all layers at once."""
    state = dict(state)
    for layer in chain.layers[1:]:
        units, twins = copies[layer.index - 1], target[layer.index - 1]
        away = units != twins
        changed = state[layer.weight].clone(memory_format=torch.contiguous_format)
        view, old = layer.by_unit(changed), layer.by_unit(state[layer.weight])
        # The twins are dead until now, but for being read by rows that are dead themselves: those
        # may keep what they read.
        readers = (
            torch.cat([copies[layer.index], target[layer.index]])
            if layer.index < chain.length
            else slice(None)
        )
        block = view[readers]
        block[:, units[away]] = 0
        block[:, twins[away]] = old[readers][:, units[away]]
        view[readers] = block
        state[layer.weight] = changed
    return state


def _same(a: Subnetwork, b: Subnetwork) -> bool:
    """Whether two subnetworks are one."""
    if a is b:
        return True
    pairs = [*zip(a.weights, b.weights), *zip(a.biases, b.biases)]
    return len(a.weights) == len(b.weights) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in pairs
    )


def _check(chain: Chain, subs: Sequence[Subnetwork], name: str) -> None:
    if [sub.entry for sub in subs] != list(range(chain.length)):
        raise ModeconnError(
            f"the subnetworks of {name} have entry layers {[sub.entry for sub in subs]}: expected 0 to {chain.length - 1}"
        )
    if len(subs[0].kept) != chain.widths[0]:
        raise ModeconnError(
            f"the subnetwork of entry layer 0 of {name} keeps {len(subs[0].kept)} of {chain.widths[0]} inputs: "
            "expected all"
        )
    for sub in subs:
        if not full_depth(chain, sub):
            raise ModeconnError(
                f"the subnetwork of entry layer {sub.entry} of {name} does not reach the last layer"
            )
        before = len(sub.kept)
        for weight, layer in zip(sub.weights, chain.layers[sub.entry :]):
            if layer.by_unit(weight).shape[1] != before:
                raise ModeconnError(
                    f"the subnetwork of entry layer {sub.entry} of {name}: its weight of layer {layer.index} reads "
                    f"{layer.by_unit(weight).shape[1]} units, expected {before}"
                )
            before = len(weight)
    lines = room(
        chain, {sub.entry: len(sub.kept) for sub in subs}, {sub.entry: sub.widths for sub in subs}
    )
    if lines:
        raise ModeconnError(
            f"no room for the subnetworks of {name} side by side: {'; '.join(lines[:3])}"
        )
