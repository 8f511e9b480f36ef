"""Holds what closed-form subnetworks are built from: networks, features of all units, the goal.

Both conditions of Nguyen et al. 2021 that need no training are met by construction: linearly
separable features (separable.py), and order of √N units in the last two hidden layers
(memorising.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from modeconn.connection.features import Features
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import restrict, why_not_carried
from modeconn.connection.trained_subnetwork import TrainedSubnetwork
from modeconn.errors import ModeconnError

# Losses are built for this part of the goal: rounding, and another order of summation, add to them.
MARGIN = 0.9
# Steps of L-BFGS where a scaled witness is above the goal in the network's precision, and where a
# readout has no witness.
STEPS = 3000


@dataclass(frozen=True, eq=False)
class Solved:
    """The networks for which subnetworks are built, with the features of all their units.

    Attributes:
        chain: the architecture.
        ends: the networks' weights by name.
        features: h_l of all units on the training data.
        units: I_l by entry layer, as drawn.
        activity: by hidden layer how often a unit is not at its smallest value.
        goal: the loss to get to.
        say: called with a line of text now and then.
    """

    chain: LayerChain
    ends: Mapping[str, Mapping[str, Tensor]]
    features: Mapping[str, Features]
    units: dict[int, Tensor]
    activity: Mapping[int, Tensor]
    goal: float
    say: Callable[[str], None]

    @property
    def labels(self) -> Tensor:
        """Class labels int64 [N]."""
        return next(iter(self.features.values())).labels

    def kept(self, name: str, entry: int) -> Tensor:
        """Returns the kept features of a network, [N, k, …]."""
        return self.of(name, entry, self.units[entry])

    def of(self, name: str, entry: int, units: Tensor) -> Tensor:
        """Returns the features of some units of a network, [N, k, …]."""
        return restrict(self.chain, entry, self.features[name].entry(entry), units)


# By network and entry layer 1 … L-1.
Found = dict[tuple[str, int], TrainedSubnetwork]


def check_carried(chain: LayerChain, method: str) -> None:
    """Raises where logits cannot be carried to the top by identity."""
    reason = why_not_carried(chain, 1)
    if reason is not None:
        raise ModeconnError(
            f'subnetworks="{method}" need identity to carry them to the top: {reason}; '
            'use "trained"'
        )
