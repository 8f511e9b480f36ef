"""Subnetworks that memorise the training data: widths of order √N, with nothing trained.

They are those of the first corollary of Nguyen et al. 2021, Theorem 4.1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from modeconn.connection import memorising_layers as layers
from modeconn.connection.closed_form import MARGIN, STEPS, Found, Solved, check_carried
from modeconn.connection.kept import needed_units
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.readout import fit_readout
from modeconn.connection.separability import coinciding
from modeconn.connection.subnetworks import Subnetwork, why_not_carried
from modeconn.connection.trained_subnetwork import TrainedSubnetwork
from modeconn.connection.training import measure
from modeconn.errors import ModeconnError


def memorising_subnetworks(problem: Solved) -> Found:
    """Builds S_1 … S_{L-1} of all networks that give every training sample its label.

    Entry layers up to L-3 project to a line and memorise in layers L-2 and L-1; L-2 memorises in
    layer L-1; L-1 has a linear readout, whose loss no width above it can make small.
    `problem.units` of layers L-2 and L-1 may be changed.

    Raises:
        ModeconnError: too few units for so many samples, equal features of samples with different
            labels, weights that are not float64, a network that is not fully connected with ReLU.
    """
    chain = problem.chain
    check_carried(chain, "memorise")
    reason = why_not_memorised(chain)
    if reason is not None:
        raise ModeconnError(f'subnetworks="memorise" need a bias and ReLU in every layer: {reason}')
    if chain.length > 2:
        _keep_active(problem, chain.length - 2)
    found: Found = {}
    for entry in reversed(range(1, chain.length)):
        problem.say(f"closed forms at entry layer {entry}")
        if entry == chain.length - 1:
            found |= _top_readouts(problem)
            continue
        for name in problem.ends:
            found[name, entry] = memorised(problem, name, entry)
    return found


def why_not_memorised(chain: LayerChain) -> str | None:
    """Says why a network's layers cannot be memorising ones; None if they can."""
    reason = why_not_carried(chain, 1)
    if reason is not None:
        return reason
    for layer in chain.layers:
        if layer.bias is None:
            return f"layer {layer.index} ({layer.weight}) has no bias"
        if layer.index < chain.length and layer.activation != "relu":
            return f"layer {layer.index} ({layer.weight}) has {layer.activation}"
    return None


def _keep_active(problem: Solved, entry: int) -> None:
    """Keeps the units of a layer that vary most often: samples must be in general position."""
    count = len(problem.units[entry])
    problem.units[entry] = problem.activity[entry].topk(count).indices.sort().values


def _top_readouts(problem: Solved) -> Found:
    """Fits the readouts of entry layer L-1, on the units that need be kept where some have to."""
    chain, entry = problem.chain, problem.chain.length - 1
    found = {(name, entry): _readout(problem, name) for name in problem.ends}
    if all(each.loss <= problem.goal for each in found.values()):
        return found
    drawn, count = problem.units[entry], len(problem.units[entry])
    features = [each.entry(entry) for each in problem.features.values()]
    problem.units[entry] = needed_units(
        features, chain.widths[entry], problem.labels, chain.classes, count
    )
    chosen = {(name, entry): _readout(problem, name) for name in problem.ends}
    if max(each.loss for each in chosen.values()) < max(each.loss for each in found.values()):
        return chosen
    problem.units[entry] = drawn
    return found


def _readout(problem: Solved, name: str) -> TrainedSubnetwork:
    entry = problem.chain.length - 1
    h = problem.kept(name, entry)
    classes = problem.chain.classes
    zero = Subnetwork(
        entry, problem.units[entry], (h.new_zeros(classes, h.shape[1]),), (h.new_zeros(classes),)
    )
    level = MARGIN * problem.goal
    return fit_readout(problem.chain, zero, h, problem.labels, iterations=STEPS, stop_loss=level)


def memorised(problem: Solved, name: str, entry: int) -> TrainedSubnetwork:
    """Builds the memorising subnetwork of an entry layer up to L-2 of one network.

    Raises:
        ModeconnError: too few units, or equal features of samples with different labels.
    """
    began = time.perf_counter()
    chain, labels = problem.chain, problem.labels
    h = problem.kept(name, entry)
    try:
        maps = memorising_maps(chain, entry, h, labels, memorising_widths(chain, problem.units))
    except ModeconnError as failure:
        raise ModeconnError(
            f'subnetworks="memorise": entry layer {entry} of {name}: {failure}; '
            'use "auto", or wider layers'
        ) from failure
    decode = layers.class_readout(chain.classes, min(0.5, MARGIN * problem.goal))
    maps[-1] = decode.after(maps[-1])
    sub = Subnetwork(
        entry,
        problem.units[entry],
        tuple(torch.from_numpy(np.ascontiguousarray(each.weight)).to(h) for each in maps),
        tuple(torch.from_numpy(np.ascontiguousarray(each.bias)).to(h) for each in maps),
    )
    loss, error = measure(chain, sub, h, labels)
    seconds = time.perf_counter() - began
    return TrainedSubnetwork(sub, loss, error, 0, seconds, loss <= problem.goal)


def memorising_maps(
    chain: LayerChain, entry: int, h: Tensor, labels: Tensor, widths: tuple[int, int]
) -> list[layers.Affine]:
    """Builds the layers of a memorising subnetwork up to one number, each sample's label.

    Args:
        entry: the entry layer, up to L-2.
        h: kept features [N, k].
        labels: int64 [N].
        widths: the units m and m' that it may have in layers L-2 and L-1.

    Raises:
        ModeconnError: too few units, equal features of samples with different labels, or features
            that float64 does not tell apart.
    """
    example = coinciding(h, labels).example
    if example is not None:
        first, second = example
        raise ModeconnError(
            f"samples {first} and {second} have equal features and the labels "
            f"{int(labels[first])} and {int(labels[second])}: no subnetwork tells them apart"
        )
    # Samples of equal features have one label: one of them stands for all.
    rows, first_of = np.unique(h.flatten(1).double().numpy(), axis=0, return_index=True)
    values = labels.numpy()[first_of].astype(np.float64)
    if entry == chain.length - 2:
        return layers.one_layer(rows, values, widths[1])
    if not layers.two_layers_fit(len(rows), widths):
        raise ModeconnError(
            f"{len(rows):,} samples need m·m' ≥ 4N = {4 * len(rows):,}, and layers "
            f"{chain.length - 2} and {chain.length - 1} leave m·m' = {widths[0]} · {widths[1]} "
            f"= {widths[0] * widths[1]:,}"
        )
    line, _ = layers.line_of(rows)
    places = layers.evaluated([line], rows)[:, 0]
    hidden = layers.two_layers(places, values, chain.classes, widths)
    one = layers.Affine(np.ones((1, 1)), np.zeros(1))
    if entry == chain.length - 3:
        return [hidden[0].after(line), *hidden[1:]]
    # The number is not negative on the data, so ReLUs carry it up to layer L-3.
    return [line, *[one] * (chain.length - 3 - entry - 1), *hidden]


def memorises(chain: LayerChain, units: Mapping[int, Tensor], samples: int) -> bool:
    """Whether the widths are enough for so many samples, whatever their features."""
    if why_not_memorised(chain) is not None:
        return False
    widths, last = memorising_widths(chain, units), chain.length - 1
    if chain.length > 2:
        one = 4 * math.ceil(samples / len(units[last - 1])) <= widths[1]
        return one and (chain.length < 4 or layers.two_layers_fit(samples, widths))
    return True


def memorising_widths(chain: LayerChain, units: Mapping[int, Tensor]) -> tuple[int, int]:
    """Returns the units m and m' of layers L-2 and L-1 that a memorising subnetwork may have.

    Two of them stand side by side, or one beside the kept units.
    """
    last = chain.length - 1
    own = chain.widths[last]
    second = min(own - len(units[last]), own // 2) if last > 1 else own - len(units[last])
    if last < 2:
        return 0, second
    first = chain.widths[last - 1]
    return min(first - len(units[last - 1]), first // 2), second
