"""Places subnetworks in a network: two consecutive ones side by side, on disjoint units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import Subnetwork, carry
from modeconn.errors import ModeconnError

# J_{l,p}: by layer p the units that a subnetwork has there.
Positions = dict[int, Tensor]


def room(
    chain: LayerChain, kept: Mapping[int, int], widths: Mapping[int, Sequence[int]]
) -> list[str]:
    """Lists where two consecutive subnetworks do not fit side by side.

    The condition is |I_{l+1}| + m_{l,l+1} ≤ n_{l+1} and m_{l+1,p} + m_{l,p} ≤ n_p for p ≥ l+2
    (Nguyen et al. 2021, Theorem 4.1).

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
            if index == 0:
                other, what = kept.get(p, 0), f"|I_{p}|"
            else:
                other, what = above[index - 1], f"m_{{{entry + 1},{p}}}"
            if units + other > chain.widths[p]:
                short = units + other - chain.widths[p]
                lines.append(
                    f"layer {p} has {chain.widths[p]} units, {short} short of "
                    f"m_{{{entry},{p}}} + {what} = {units} + {other}"
                )
    return lines


def assign_positions(chain: LayerChain, subs: Sequence[Subnetwork]) -> list[Positions]:
    """Chooses units J_{l,p} for each subnetwork, disjoint from those of the next one up.

    At layer p, S_l prefers the complement of I_p where p - l is odd and I_p itself where it is
    even: so every subnetwork that is no wider than those regions finds the same place whatever the
    others are.
    """
    positions: list[Positions] = [{} for _ in subs]
    for entry in reversed(range(chain.length - 1)):
        for p in range(entry + 1, chain.length):
            occupied = subs[p].kept if p == entry + 1 else positions[entry + 1][p]
            positions[entry][p] = _choose(chain, subs, entry, p, [occupied])
    return positions


def positions_around(
    chain: LayerChain, networks: Sequence[Sequence[Subnetwork]]
) -> list[list[Positions]]:
    """Chooses units for the subnetworks of several networks that share S_0.

    Args:
        networks: for each the full-depth subnetworks S_0 … S_{L-1}; S_0 is that of the first.

    Returns:
        for each the positions of its subnetworks. Those of S_0 are the same, free in all networks.

    Raises:
        ModeconnError: a layer has too few units.
    """
    found = [assign_positions(chain, subs) for subs in networks]
    shared: Positions = {}
    for p in range(1, chain.length):
        # A_1 uses S_1's own units, and those of layer 1 that it reads.
        taken = [own[1][p] if p > 1 else subs[1].kept for own, subs in zip(found, networks)]
        shared[p] = _choose(chain, networks[0], 0, p, taken)
    for own in found:
        own[0] = shared
    return found


def fits_below(chain: LayerChain, shared: Subnetwork, above: Sequence[Subnetwork]) -> bool:
    """Whether an S_0 has room beside each of several S_1; logits are carried to the top.

    S_1 of equal widths have their units in the same places, or in nested ones.
    """
    own = carry(chain, shared)
    for sub in above:
        full = carry(chain, sub)
        if len(full.kept) + own.widths[0] > chain.widths[1]:
            return False
        pairs = zip(own.widths[1:], full.widths, chain.widths[2:])
        if any(a + b > units for a, b, units in pairs):
            return False
    return True


def _choose(
    chain: LayerChain, subs: Sequence[Subnetwork], entry: int, p: int, occupied: Sequence[Tensor]
) -> Tensor:
    """Chooses free units of layer p for S_entry, those that it prefers first."""
    count = subs[entry].widths[p - entry - 1]
    free = torch.ones(chain.widths[p], dtype=torch.bool)
    for units in occupied:
        free[units.cpu()] = False
    preferred = torch.zeros(chain.widths[p], dtype=torch.bool)
    preferred[subs[p].kept.cpu()] = True
    if (p - entry) % 2:
        preferred = ~preferred
    order = torch.cat([(free & preferred).nonzero()[:, 0], (free & ~preferred).nonzero()[:, 0]])
    if len(order) < count:
        raise ModeconnError(
            f"no room: layer {p} has {chain.widths[p]} units, {len(order)} of them free, "
            f"and the subnetwork of entry layer {entry} needs {count}: {count - len(order)} too "
            f"few; keep fewer units in layer {p} or use narrower subnetworks"
        )
    return order[:count].sort().values
