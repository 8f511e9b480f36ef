"""Builds the breakpoints of the path between two residual networks.

From each network down, entry by entry: the dead channels of a half take the rows of the next
subnetwork (a rewrite), then the linear layer moves to its readout (a swing). Both descents end in
one subnetwork on the input, so that a last rewrite of dead rows joins them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modeconn.connection.construct import Breakpoint, backwards
from modeconn.connection.residual.entries import EntryValue
from modeconn.connection.residual.network import ResidualNetwork
from modeconn.connection.residual.subnetwork import ResidualSubnetwork

State = dict[str, Tensor]


def on_the_input(
    network: ResidualNetwork,
    state: Mapping[str, Tensor],
    entry: EntryValue,
    top: ResidualSubnetwork,
) -> ResidualSubnetwork:
    """Makes the subnetwork on the input from that on v_0: they are one function of the input.

    Args:
        state: the network's weights; those of its stem come before the subnetwork on v_0.
        entry: the input, on the other side.
        top: the subnetwork on v_0.
    """
    found = ResidualSubnetwork(network, entry, state)
    same_side = replace(entry, side=top.entry.side)
    own = ResidualSubnetwork(network, same_side, state)
    assert found.stem is not None and own.stem is not None
    # What v_0's subnetwork reads goes, channel by channel, to the half that this one lives on.
    found.stem.load_state_dict(own.stem.state_dict())
    found.take_over(top)
    return found.eval()


def residual_breakpoints(
    network: ResidualNetwork,
    a: Mapping[str, Tensor],
    subnetworks_a: Sequence[ResidualSubnetwork],
    b: Mapping[str, Tensor],
    subnetworks_b: Sequence[ResidualSubnetwork],
) -> list[Breakpoint]:
    """Builds the breakpoints of the path from a to b; the first and the last are a and b.

    Args:
        a, b: state dicts that fit the network.
        subnetworks_a, subnetworks_b: in the order of the entries; the last, on the input, is the
            same for both.
    """
    down = _descend(network, a, subnetworks_a, "a")
    up = _descend(network, b, subnetworks_b, "b")
    middle = Breakpoint(up[-1].state, "rewrite", f"{up[-1].label} in b")
    return [*down, middle, *backwards(up)]


def _descend(
    network: ResidualNetwork,
    state: Mapping[str, Tensor],
    subnetworks: Sequence[ResidualSubnetwork],
    side: str,
) -> list[Breakpoint]:
    """Walks from a network to the subnetwork on the input."""
    steps = [Breakpoint(dict(state), "start", side)]
    for subnetwork in subnetworks:
        before = steps[-1]
        state = _written(before.state, subnetwork)
        if any(state[key] is not before.state[key] for key in state):
            steps.append(Breakpoint(state, "rewrite", before.label))
        state = _swung(network, state, subnetwork)
        steps.append(Breakpoint(state, "swing", f"S_{subnetwork.entry.label} of {side}"))
    return steps


def _written(state: State, subnetwork: ResidualSubnetwork) -> State:
    """Writes a subnetwork's blocks into the rows of its channels, in a copy."""
    state = dict(state)
    for channels, tensors in subnetwork.incoming(state):
        for key, rows in tensors.items():
            changed = state[key].clone()
            changed[channels] = rows.to(changed)
            state[key] = changed
    return state


def _swung(network: ResidualNetwork, state: State, subnetwork: ResidualSubnetwork) -> State:
    """Makes a subnetwork's readout the linear layer, in a copy."""
    state = dict(state)
    weight = torch.zeros_like(state[network.weight])
    weight[:, subnetwork.columns] = subnetwork.weight.detach().to(weight)
    state[network.weight] = weight
    if network.bias is not None and subnetwork.bias is not None:
        state[network.bias] = subnetwork.bias.detach().to(weight)
    return state
