"""Finds the subnetworks of two residual networks, and the breakpoints of the path through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.connection.construct import Breakpoint
from modeconn.connection.data_digest import DataDigest
from modeconn.connection.labels import check_range, check_several, class_labels
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.residual.construct import residual_breakpoints
from modeconn.connection.residual.entries import Halves
from modeconn.connection.residual.network import ResidualNetwork
from modeconn.connection.residual.rounds import ResidualProblem, ResidualSearch
from modeconn.connection.residual.training import FoundSubnetwork
from modeconn.connection.residual.values import output_of
from modeconn.connection.solution import (
    DEFAULT_ROUNDS,
    Log,
    Settings,
    default_goal,
    load_ends,
)
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.files.writing import locked
from modeconn.metrics.convexity import name_of
from modeconn.parameters import state as states

# What `subnetworks` may be for residual networks.
_METHODS = ("auto", "trained")
# Without a target the networks' losses are estimated from some of the samples.
_ROWS_OF_THE_GOAL = 5000
_ROWS = 250


@dataclass(frozen=True, eq=False)
class ResidualSolution:
    """Subnetworks of two residual networks.

    Attributes:
        network: the architecture.
        ends: the weights of "a" and "b".
        found: of each the subnetworks from the top down; the last, on the input, is the same.
    """

    network: ResidualNetwork
    ends: Mapping[str, states.State]
    found: Mapping[str, Sequence[FoundSubnetwork]]

    def breakpoints(self) -> list[Breakpoint]:
        """Builds the path through the subnetworks."""
        of_a = [each.subnetwork for each in self.found["a"]]
        of_b = [each.subnetwork for each in self.found["b"]]
        return residual_breakpoints(self.network, self.ends["a"], of_a, self.ends["b"], of_b)

    def records(self) -> list[dict[str, Any]]:
        """Describes the subnetworks of both networks, as a connection's details keep them."""
        records = []
        for side, subnetworks in self.found.items():
            records += [_record(side, each) for each in subnetworks]
        return records


def _record(side: str, found: FoundSubnetwork) -> dict[str, Any]:
    subnetwork = found.subnetwork
    return {
        "side": side,
        "entry": subnetwork.entry.label,
        "method": "trained",
        "half": subnetwork.entry.side,
        "blocks": len(subnetwork.blocks),
        "widths": [len(block.rows) for block in subnetwork.half_blocks()],
        "loss": found.loss,
        "error": found.error,
        "epochs": found.epochs,
        "seconds": round(found.seconds, 2),
    }


def residual_network(model: nn.Module, train: Any) -> ResidualNetwork | None:
    """Returns the residual network that a model is; None for a chain of layers.

    Raises:
        ModeconnError: it is neither; the text says where and why.
    """
    sample = next(iter(as_batches(train, 16)))[0].float()
    try:
        LayerChain.of(model, sample)
    except ModeconnError as error:
        try:
            network = ResidualNetwork.of(model, sample)
        except ModeconnError as other:
            raise ModeconnError(f"{error}; and {other}") from error
        Halves(network).check()
        return network
    return None


def solve_residual(
    model: nn.Module,
    network: ResidualNetwork,
    networks: Mapping[str, Any],
    train: Any,
    settings: Settings,
    say: Log,
) -> ResidualSolution:
    """Finds subnetworks of both networks.

    Args:
        model: the architecture. network: what was recognised in it.
        networks: "a" and "b": modules, state dicts or checkpoint files.
        train: the data, with class labels.
        settings: checked already.
        say: called with a line of text now and then.

    Raises:
        ModeconnError: settings that residual networks do not have; networks or data that do not
            fit; a folder that belongs to another search.
    """
    if settings.subnetworks not in _METHODS:
        raise ModeconnError(
            f'subnetworks="{settings.subnetworks}" is of chains of layers: '
            f"expected one of {', '.join(_METHODS)} for the residual network {network.name}"
        )
    if settings.loss != "cross_entropy":
        raise ModeconnError(
            f"loss is {name_of(settings.loss)}: expected cross_entropy for a residual network"
        )
    if settings.kept != 0.5:
        raise ModeconnError(
            f"kept is {settings.kept}: expected 0.5 for a residual network, in which two "
            "subnetworks have one half of a stage's channels each"
        )
    ends = load_ends(model, networks)
    labels, digest = _read(network, train)
    labels = labels.to(ends["a"][network.weight].device)
    goal, rounds = _goal(network, ends, train, settings)
    problem = ResidualProblem(network, ends, train, labels, digest, goal, settings.seed)
    with locked(settings.folder):
        found = ResidualSearch(problem, say, settings.folder).run(rounds)
    return ResidualSolution(network, ends, found)


def _read(network: ResidualNetwork, train: Any) -> tuple[Tensor, str]:
    """Reads the labels, which must be classes of the network, and the digest of the data."""
    parts, digest = [], DataDigest()
    for x, y in as_batches(train, _ROWS):
        digest.add(x, y)
        parts.append(class_labels(y))
    labels = torch.cat(parts)
    check_range(labels, network.classes, network.name)
    check_several(labels)
    return labels, digest.finish()


def _goal(
    network: ResidualNetwork, ends: Mapping[str, states.State], train: Any, settings: Settings
) -> tuple[float, int | None]:
    """Returns the loss to search for, and the number of rounds (None for all)."""
    if settings.target is not None:
        return settings.target, None
    largest = max(_losses(network, ends, train))
    return default_goal(largest, math.log(network.classes)), DEFAULT_ROUNDS


@torch.no_grad()
def _losses(network: ResidualNetwork, ends: Mapping[str, states.State], train: Any) -> list[float]:
    """Estimates the networks' losses from the first samples."""
    totals, samples = dict.fromkeys(ends, 0.0), 0
    for x, y in as_batches(train, _ROWS):
        for name, end in ends.items():
            logits = output_of(network.graph, end, x.to(end[network.weight]))
            losses = nn.functional.cross_entropy(logits, y.to(logits.device).long())
            totals[name] += float(losses) * len(x)
        samples += len(x)
        if samples >= _ROWS_OF_THE_GOAL:
            break
    return [total / samples for total in totals.values()]
