"""Subnetworks of linearly separable features: scaled witnesses, with nothing trained.

They are those of the second corollary of Nguyen et al. 2021, Theorem 4.1: if the kept features of a
layer are linearly separable, a readout scaled up drives the loss to 0.
"""

from __future__ import annotations

import math
import time

from torch import Tensor

from modeconn.connection.closed_form import MARGIN, STEPS, Found, Solved, check_carried
from modeconn.connection.kept import needed_units
from modeconn.connection.readout import fit_readout
from modeconn.connection.separability import linear_separability
from modeconn.connection.subnetworks import Subnetwork
from modeconn.connection.trained_subnetwork import TrainedSubnetwork
from modeconn.connection.training import measure
from modeconn.errors import ModeconnError


def separable_subnetworks(problem: Solved) -> Found:
    """Builds S_1 … S_{L-1} of all networks from witnesses of linear separability.

    A witness (U, c) of margin γ, scaled by ln((C-1)/ε)/γ, gives every sample a loss of at most ε.
    Where the units that were drawn are not separable, those that a readout of all units needs most
    are kept instead: `problem.units` is changed.

    Raises:
        ModeconnError: all units of some layer are not separable, so that no part of them is, or
            that is not decided; logits that cannot be carried to the top.
    """
    check_carried(problem.chain, "separable")
    found: Found = {}
    for entry in reversed(range(1, problem.chain.length)):
        problem.say(f"witnesses at entry layer {entry}")
        found |= _separable_entry(problem, entry)
    return found


def _separable_entry(problem: Solved, entry: int) -> Found:
    """Builds the subnetworks of one entry layer, on the smallest kept part that is separable."""
    found = _witnesses(problem, entry, problem.units[entry])
    if found is not None:
        return found
    _check_all_units(problem, entry)
    for count in _counts(problem, entry):
        features = [each.entry(entry) for each in problem.features.values()]
        units = needed_units(
            features, problem.chain.widths[entry], problem.labels, problem.chain.classes, count
        )
        found = _witnesses(problem, entry, units)
        if found is not None:
            problem.units[entry] = units
            return found
    raise ModeconnError(
        f"all {problem.chain.widths[entry]} units of layer {entry} are linearly separable, "
        f"but not the {_counts(problem, entry)[-1]} of them that a readout needs most: "
        'keep more units, or use subnetworks="auto"'
    )


def _counts(problem: Solved, entry: int) -> list[int]:
    """Lists sizes of a kept part to try: from the one asked for to what there is room for.

    S_{l-1} carries 2C numbers through layer l. At layer 1 S_0 needs as many units as S_1 reads.
    """
    chain, asked = problem.chain, len(problem.units[entry])
    most = chain.widths[entry] - 2 * chain.classes
    if entry == 1:
        most = min(most, chain.widths[1] // 2)
    return sorted({asked, max(asked, (asked + most) // 2), max(asked, most)})


def _witnesses(problem: Solved, entry: int, units: Tensor) -> Found | None:
    """Builds scaled readouts of some units for all networks; None if one has no witness."""
    found: Found = {}
    for name in problem.ends:
        result = _scaled_witness(problem, name, entry, units)
        if result is None:
            return None
        found[name, entry] = result
    return found


def _scaled_witness(
    problem: Solved, name: str, entry: int, units: Tensor
) -> TrainedSubnetwork | None:
    """Scales the witness of one network's units until every sample's loss is below the goal."""
    chain, labels, level = problem.chain, problem.labels, MARGIN * problem.goal
    began = time.perf_counter()
    h = problem.of(name, entry, units)
    separation = linear_separability(h, labels, classes=chain.classes)
    if separation.witness is None:
        return None
    U, c = separation.witness
    scale = math.log(max(2.0, (chain.classes - 1) / level)) / separation.margin
    has_bias = chain.layer(entry + 1).bias is not None
    bias = (scale * c).to(h) if has_bias else None
    readout = Subnetwork(entry, units, ((scale * U).to(h),), (bias,))
    loss, error = measure(chain, readout, h, labels)
    seconds = time.perf_counter() - began
    result = TrainedSubnetwork(readout, loss, error, 0, seconds, loss <= level)
    if result.reached:
        return result
    # The witness is lost in rounding, or needs a bias that the layer has not: the convex problem
    # has a solution that is not.
    fitted = fit_readout(chain, readout, h, labels, iterations=STEPS, stop_loss=level)
    return min(result, fitted, key=lambda each: each.loss)


def _check_all_units(problem: Solved, entry: int) -> None:
    """Raises where all units of a layer are not separable, or that is not decided."""
    for name in problem.ends:
        h = problem.features[name].entry(entry)
        separation = linear_separability(h, problem.labels, classes=problem.chain.classes)
        if separation.separable:
            continue
        verdict = "are not" if separation.separable is False else "are not known to be"
        raise ModeconnError(
            f'subnetworks="separable": all {problem.chain.widths[entry]} units of layer {entry} of '
            f"{name} {verdict} linearly separable, hence no part of them: {separation.reason}; "
            'use "auto" or "head"'
        )
