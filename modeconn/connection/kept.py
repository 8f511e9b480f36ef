"""Chooses the kept units I_l: random ones among those that vary, or those that a readout needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.readout import fitted_weights
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError

# Rows that tell which units vary: a unit that is constant on these carries next to nothing.
_ROWS = 2000
# Rows and steps of L-BFGS that tell which units a readout needs: the order of the norms settles
# long before the readout does.
_RANKED_ROWS = 4000
_RANKING_STEPS = 60
# Of the readouts that rank units. It keeps the weights of units that repeat others small.
_RANKING_DECAY = 1e-4
# Part of the units that is left after each elimination.
_LEFT = 0.75


def activity(
    chain: LayerChain, ends: Mapping[str, Mapping[str, Tensor]], data: Any
) -> dict[int, Tensor]:
    """Measures how often each hidden unit is not at its smallest value, in the first 2,000 rows.

    A unit that is constant on the data (one whose ReLU never passes anything) has 0, one that is
    never constant about 1. A channel counts with all its pixels.

    Returns:
        by layer 1 … L-1 the smallest number among the networks, float64 [n_p].
    """
    found: dict[int, Tensor] = {}
    rows = next(iter(as_batches(data, _ROWS)))[0][:_ROWS]
    with torch.no_grad():
        for end in ends.values():
            h = rows.to(next(iter(end.values())))
            for p in range(1, chain.length):
                h = chain.run(end, h, p - 1, p)
                values = h.reshape(len(h), chain.widths[p], -1)
                above = values > values.amin((0, 2), keepdim=True)
                share = above.double().mean((0, 2)).cpu()
                found[p] = torch.minimum(found[p], share) if p in found else share
    return found


def drawn_units(
    chain: LayerChain, kept: float | Sequence[float], active: Mapping[int, Tensor], seed: int
) -> dict[int, Tensor]:
    """Draws I_l for every entry layer: all inputs, and random units of each hidden layer.

    Units that are constant on the data are taken only where there are no others. All networks keep
    the same units, so that they can share the subnetwork on the input.

    Args:
        kept: the fraction of the units, for all hidden layers or for each.
        active: by hidden layer the activity of its units.

    Raises:
        ModeconnError: a fraction that leaves no units to keep, or none to use.
    """
    hidden = chain.length - 1
    fractions = list(kept) if isinstance(kept, Sequence) else [kept] * hidden
    if len(fractions) != hidden:
        raise ModeconnError(
            f"kept has {len(fractions)} numbers: "
            f"expected one, or {hidden} for the hidden layers of {chain.name}"
        )
    units = {0: torch.arange(chain.widths[0])}
    for p, fraction in enumerate(fractions, 1):
        count = kept_count(chain, p, fraction)
        # A prime factor keeps the layers' seeds apart for different seeds of the search.
        generator = torch.Generator().manual_seed(seed * 1009 + p)
        order = torch.randperm(chain.widths[p], generator=generator)
        varies = active[p][order] > 0
        units[p] = torch.cat([order[varies], order[~varies]])[:count].sort().values
    return units


def kept_count(chain: LayerChain, p: int, fraction: float) -> int:
    """Returns |I_p| for a fraction of layer p's units, at most half of them where that is asked.

    Raises:
        ModeconnError: the fraction leaves no units to keep, or none to use.
    """
    n = chain.widths[p]
    if not 0 < fraction < 1 or not 1 <= round(fraction * n) < n:
        raise ModeconnError(
            f"kept is {fraction} for layer {p} of {n} units: "
            "expected a fraction that leaves units both to keep and to use"
        )
    count = round(fraction * n)
    # Half of an odd number, rounded up, would leave too few for the subnetwork on the input.
    return min(count, max(1, n // 2)) if fraction <= 0.5 else count


def needed_units(
    features: Sequence[Tensor], units: int, labels: Tensor, classes: int, count: int
) -> Tensor:
    """Chooses the units that linear readouts need most, by backward elimination.

    A readout is fitted to the units that are left, for every network; then the units whose weights,
    scaled by the unit's root mean square, are smallest in all networks are dropped; and so on
    (recursive feature elimination, Guyon et al. 2002).

    Args:
        features: h_l [N, …] of each network, all units.
        units: n_l.
        labels: int64 [N].
        classes: C.
        count: units to be left.

    Returns:
        int64 [count], rising.
    """
    rows = torch.arange(len(labels))
    if len(rows) > _RANKED_ROWS:
        rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[:_RANKED_ROWS].sort().values
    chosen = [h[rows].reshape(len(rows), units, -1) for h in features]
    own, left = labels[rows], torch.arange(units)
    while len(left) > count:
        scores = torch.zeros(len(left), dtype=torch.float64)
        for h in chosen:
            block = h[:, left]
            weight = fitted_weights(block.flatten(1), own, classes, _RANKING_STEPS, _RANKING_DECAY)
            rms = block.double().square().mean(0).flatten().sqrt()
            norms = (weight * rms).view(classes, len(left), -1).square().sum((0, 2)).sqrt()
            scores = torch.maximum(scores, norms / norms.max().clamp(min=1e-300))
        keep = max(count, math.floor(_LEFT * len(left)))
        left = left[scores.topk(keep).indices].sort().values
    return left
