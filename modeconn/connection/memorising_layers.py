"""Closed forms that give every sample its label: order of √N units in two hidden layers, or in one.

They prove the first corollary of Nguyen et al. 2021, Theorem 4.1, by a witness: N samples with
distinct features are fitted by two hidden layers of m and m' units with m·m' ≥ 4N, or by one of
4⌈N/k⌉ units on k features in general position. A network gives one number g, which is the sample's
label, and the logits β (c g - c²/2), affine in g, are largest at the nearest class c.

All is float64: the slopes grow with the inverse of the smallest gap between two samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeconn.errors import ModeconnError

# Random directions that the samples are projected to: the smallest gap varies by an order of
# magnitude between them.
_DIRECTIONS = 200
# Numbers of a block of projections (64 MB).
_BLOCK = 8_000_000
# A gap below this part of the range is lost in the rounding of a sum of products.
_SMALLEST_GAP = 1e-13
# Largest value between the clipping levels -1 and 1: the rest is what rounding may use up.
_LEVEL = 0.8
# Where the knots beside a group of samples lie, as parts of the gap to the next group.
_BESIDE = 0.25
# Orders of the samples that are tried for hyperplanes.
_ORDERS = 5
# An eigenvalue of the Gram matrix below this part of the largest does not count: those of rounding
# are 1e-16 of it.
_RANK = 1e-13


@dataclass(frozen=True)
class Affine:
    """An affine map of a hidden layer or readout: float64 weight [units, inputs], bias [units]."""

    weight: np.ndarray
    bias: np.ndarray

    def after(self, first: Affine) -> Affine:
        """Returns this map behind another, without a non-linearity between them."""
        return Affine(self.weight @ first.weight, self.weight @ first.bias + self.bias)


def line_of(features: np.ndarray, seed: int = 0) -> tuple[Affine, float]:
    """Projects samples to a line so that the two nearest are as far apart as may be.

    Args:
        features: float64 [N, k], no two rows equal.
        seed: of the directions, of which the best is taken.

    Returns:
        the map [1, k] to [0, 1], and the smallest gap.

    Raises:
        ModeconnError: two samples are too close together on every direction.
    """
    if len(features) == 1:
        return Affine(np.zeros((1, features.shape[1])), np.zeros(1)), 1.0
    spread = features.std(0)
    inverse = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    random = np.random.default_rng(seed)
    best, best_gap = None, 0.0
    at_once = max(1, _BLOCK // len(features))
    for start in range(0, _DIRECTIONS, at_once):
        count = min(at_once, _DIRECTIONS - start)
        directions = random.normal(size=(count, features.shape[1])) * inverse
        places = np.sort(features @ directions.T, axis=0)
        extent = places[-1] - places[0]
        gaps = np.diff(places, axis=0).min(0) / np.where(extent > 0, extent, np.inf)
        if gaps.max() > best_gap:
            chosen = int(gaps.argmax())
            best, best_gap = directions[chosen] / extent[chosen], float(gaps[chosen])
    if best is None or best_gap < _SMALLEST_GAP:
        raise ModeconnError(
            f"features of {len(features):,} samples: two are so close together that no projection "
            f"tells them apart in float64 (smallest gap {best_gap:.2g} of the range)"
        )
    return Affine(best[None], np.array([-(features @ best).min()])), best_gap


def two_layers(
    places: np.ndarray, values: np.ndarray, levels: int, widths: tuple[int, int]
) -> list[Affine]:
    """Builds two hidden ReLU layers and a readout from a number s to a number g, with g(s_i) = v_i.

    The samples, in the order of s, are cut into groups of q = 2⌊m'/4⌋. Layer 1 has two knots for
    each group. Unit pair k of layer 2 clips to [-1, 1] a saw whose steep part in group j goes
    through sample k of it; all other samples are clipped to ±1, and with alternating signs of the
    readout these cancel.

    Args:
        places: s, float64 [N], distinct, in [0, 1].
        values: v, whole numbers [N] from 0.
        levels: C, above all values.
        widths: m and m'. (m, m') must pass `two_layers_fit`.

    Returns:
        the maps [2G-1, 1], [2q, 2G-1] and [1, 2q] for G groups.
    """
    N, q = len(places), _group_size(widths[1])
    order = np.argsort(places)
    s = places[order]
    groups = np.array_split(np.arange(N), math.ceil(N / q))
    group = np.concatenate([np.full(len(each), j) for j, each in enumerate(groups)])
    member = np.concatenate([np.arange(len(each)) for each in groups])
    first = np.array([s[each[0]] for each in groups])
    last = np.array([s[each[-1]] for each in groups])
    between = first[1:] - last[:-1]
    begin = first - _BESIDE * np.concatenate([[1.0], between])
    end = last + _BESIDE * np.concatenate([between, [1.0]])
    knots = np.stack([begin, end], 1).ravel()
    # The largest value of a readout weight V, alternating in sign: V · level spans all values.
    middle = (levels - 1) / 2
    V = max(middle, 0.5) / _LEVEL
    signs = V * (-1.0) ** (np.arange(q) + 1)
    gaps = np.diff(s)
    nearest = np.minimum(np.concatenate([[1.0], gaps]), np.concatenate([gaps, [1.0]]))
    slopes, heights = 2.0 / nearest, (values[order] - middle) / signs[member]
    saw = np.full((q, 2 * len(groups)), -2.0)  # places without a sample are clipped to -1
    saw[member, 2 * group] = heights + slopes * (begin[group] - s)
    saw[member, 2 * group + 1] = heights + slopes * (end[group] - s)
    rises = np.diff(saw, axis=1) / np.diff(knots)
    kinks = np.concatenate([rises[:, :1], np.diff(rises, axis=1)], 1)
    hidden = Affine(np.ones((len(knots) - 1, 1)), -knots[:-1])
    clipped = Affine(
        np.concatenate([kinks, kinks]), np.concatenate([saw[:, 0] + 1.0, saw[:, 0] - 1.0])
    )
    readout = Affine(np.concatenate([signs, -signs])[None], np.array([middle + V - signs.sum()]))
    return [hidden, clipped, readout]


def _group_size(width: int) -> int:
    """Returns q, even, so that the alternating signs cancel."""
    return 2 * (width // 4)


def two_layers_fit(samples: int, widths: tuple[int, int]) -> bool:
    """Whether two hidden layers of these widths hold so many samples: about m·m' ≥ 4N."""
    q = _group_size(widths[1])
    return q > 0 and 2 * math.ceil(samples / q) - 1 <= widths[0]


def one_layer(features: np.ndarray, values: np.ndarray, width: int, seed: int = 0) -> list[Affine]:
    """Builds one hidden ReLU layer and a readout from features to a number g, with g(h_i) = v_i.

    For a group of samples, as many as the features have dimensions, there is a hyperplane w·h = 1
    through them, and a u with u·h = v + 1 on them. Four ReLUs give u·h on a thin slab about the
    hyperplane, and 0 beyond it, where all other samples lie (Baum 1988; Bubeck et al. 2020).

    Args:
        features: float64 [N, k], no two rows equal.
        values: whole numbers [N] from 0.
        width: units that there are.
        seed: of the orders in which samples are grouped; the one with the widest slabs is taken.

    Raises:
        ModeconnError: there are too few units, or another sample lies on a hyperplane.
    """
    N = len(features)
    size = min(N, rank(features))
    needed = 4 * math.ceil(N / max(1, size))
    if size == 0 or needed > width:
        raise ModeconnError(
            f"{N:,} samples on features of rank {size} need 4⌈N/rank⌉ = {needed:,} units, "
            f"and there are {width:,}"
        )
    scale = np.sqrt(np.square(features).mean(0))
    scale[scale == 0] = 1.0
    # Groups no larger than they need be: many samples of one linear region of the network below
    # bring all of that region onto their hyperplane.
    smallest = math.ceil(N / (width // 4))
    found = []
    for number in range(_ORDERS):
        own = size if number % 2 else smallest
        random = np.random.default_rng([seed, number])
        found.append(_slabs(features / scale, values + 1.0, own, random))
    hidden, readout, margin = max(found, key=lambda each: each[2])
    if not margin > 0:
        raise ModeconnError(
            f"{N:,} samples on features of rank {size}: another sample lies on the hyperplane "
            "through a group of them, to rounding: their features are not in general position"
        )
    return [Affine(hidden.weight / scale, hidden.bias), readout]


def _slabs(
    features: np.ndarray, values: np.ndarray, size: int, random: np.random.Generator
) -> tuple[Affine, Affine, float]:
    """Builds the slabs for one order of the samples.

    Returns:
        hidden layer, readout, and the smallest ratio of a slab's half width to what the group's own
        samples are off the hyperplane, less 1: positive where all is well.
    """
    N, margin = len(features), math.inf
    rows, biases, weights = [], [], []
    for group in np.array_split(random.permutation(N), math.ceil(N / size)):
        own = features[group]
        targets = np.stack([np.ones(len(group)), values[group]], 1)
        w, u = np.linalg.lstsq(own, targets, rcond=None)[0].T
        off, value = features @ w - 1.0, features @ u
        others = np.ones(N, bool)
        others[group] = False
        nearest = float(np.abs(off[others]).min(initial=1.0))
        half = nearest / 3
        thin = half / (2 * float(np.abs(value).max(initial=1.0)))
        miss = float(np.abs(off[group]).max())
        misfit = float(np.abs(value[group] - values[group]).max())
        # Half of the slab is what u·h may take up; a quarter of a label is decoded safely.
        good = 4 * miss < half and misfit < 0.25 and thin > 0
        margin = min(margin, half / max(miss, 1e-300) - 1 if good else -1.0)
        thin = thin or 1.0
        rows += [w + thin * u, w + thin * u, w, w]
        biases += [half - 1.0, -half - 1.0, half - 1.0, -half - 1.0]
        weights += [1.0 / thin, -1.0 / thin, -1.0 / thin, 1.0 / thin]
    hidden = Affine(np.array(rows), np.array(biases))
    return hidden, Affine(np.array(weights)[None], np.array([-1.0])), margin


def rank(features: np.ndarray) -> int:
    """Returns the rank of features [N, k], each scaled to a root mean square of 1."""
    scale = np.sqrt(np.square(features).mean(0))
    scaled = features[:, scale > 0] / scale[scale > 0]
    if not scaled.size:
        return 0
    values = np.linalg.eigvalsh(scaled.T @ scaled)
    return int((values > _RANK * values[-1]).sum())


def class_readout(classes: int, loss: float) -> Affine:
    """Decodes a number g as the nearest class: logits β (c g - c²/2) with a small loss at g = y.

    The logit of y is larger than that of c by β (y - c)²/2, so a loss of at most 4 exp(-β/2).
    """
    beta = 2.0 * math.log(4.0 / loss) if loss < 1.0 else 2.0 * math.log(4.0)
    c = np.arange(classes, dtype=np.float64)
    return Affine(beta * c[:, None], -beta * c * c / 2)


def evaluated(maps: Sequence[Affine], h: np.ndarray) -> np.ndarray:
    """Computes the outputs of maps with ReLUs between them, [N, outputs]."""
    for number, each in enumerate(maps):
        h = (h if number == 0 else np.maximum(h, 0.0)) @ each.weight.T + each.bias
    return h
