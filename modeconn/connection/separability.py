"""Decides whether features are linearly separable: a witness, a counterproof, or "not decided".

If the kept features of an entry layer are separable, a subnetwork on them drives the loss to 0
(Nguyen et al. 2021, second corollary of Theorem 4.1). Separable means: there are U [C, d] and c [C]
such that for every sample i and every class k other than its label y

    (u_y - u_k) · x_i + (c_y - c_k) > 0.

Yes is proved by (U, c), evaluated in float64 with every rounding error bounded; no by multipliers
of the inequalities (farkas.py).
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.backends.precision import without_autocast
from modeconn.connection.farkas import affine, inequalities, largest_margin, proves_none
from modeconn.errors import ModeconnError

_EPS = float(np.finfo(np.float64).eps)
# Iterations of L-BFGS between two checks whether all samples are right, and before the first search
# for a proof: most witnesses are found before it, and a proof needs the regression to have settled.
_CHECK_EVERY = 20
_FIRST_PROOF = 100
# Pairs of classes, the most confused first, that are searched for a proof at a time: the first one
# usually has it.
_PAIRS = 3
# All constraints together: numbers in their matrix (160 MB), and multiply-adds in a Newton step
# (some seconds), that are still taken on.
_MOST_NUMBERS = 20_000_000
_MOST_WORK = 2e10
_CHUNK = 8192
# A bound on the underflow of sums of products, beyond the relative errors of their terms.
_UNDERFLOW = 1e-290
# Multipliers that sum up to less are lost in rounding.
_VANISHED = 1e-280


class Outcome(enum.Enum):
    """The verdict; its text says what it means."""

    SEPARABLE = (
        "a linear readout is right on every sample with a positive margin: "
        "scaled up, it drives the loss to 0"
    )
    DUPLICATES = (
        "two samples have equal features and different labels: "
        "nothing that reads these features tells them apart"
    )
    NOT_SEPARABLE = (
        "no linear readout is right on every sample: "
        "positive multipliers of its inequalities add up to 0"
    )
    ONE_CLASS = "there is one class only: any readout separates it"
    UNDECIDED = (
        "neither a separating readout nor a proof that there is none was found: "
        "more iterations may find one"
    )


@dataclass(frozen=True, eq=False)
class Separation:
    """Whether features are linearly separable, and the proof.

    Margins are those of (U, c) with Frobenius norm 1, the features taken as they are: the smallest
    (u_y - u_k) · x + (c_y - c_k) over all samples and wrong classes k.

    Attributes:
        outcome: the verdict; its value is the explanation.
        witness: U [C, d] and c [C], float64, of norm 1, if separable.
        margin: a lower bound on the witness's margin, rounding included; NaN without a witness.
        margin_at_most: no (U, c) of norm 1 has a larger margin: 0 where it is proved that there is
            none, inf if unknown.
        radius: the largest norm of (x, 1), to put margins in proportion.
        samples, classes: N and C.
        proof: for DUPLICATES the numbers of two samples, for NOT_SEPARABLE two classes that are not
            separable even from each other, or () where it takes more than two.
    """

    outcome: Outcome
    samples: int
    classes: int
    radius: float
    witness: tuple[Tensor, Tensor] | None = None
    margin: float = math.nan
    margin_at_most: float = math.inf
    proof: tuple[int, ...] = ()

    @property
    def separable(self) -> bool | None:
        """True and False are proved; None is "not decided"."""
        if self.outcome is Outcome.UNDECIDED:
            return None
        return self.outcome in (Outcome.SEPARABLE, Outcome.ONE_CLASS)

    @property
    def reason(self) -> str:
        """The outcome in words, with its numbers."""
        text = self.outcome.value
        if self.outcome is Outcome.SEPARABLE:
            return f"{text} (margin {self.margin:.3g} at a radius of {self.radius:.3g})"
        if self.outcome is Outcome.DUPLICATES:
            return f"{text} (samples {self.proof[0]} and {self.proof[1]})"
        if self.outcome is Outcome.NOT_SEPARABLE and self.proof:
            return f"{text} (classes {self.proof[0]} and {self.proof[1]} alone)"
        if self.outcome is Outcome.UNDECIDED:
            return f"{text}; no readout of norm 1 has a margin above {self.margin_at_most:.3g}"
        return text


@dataclass(frozen=True)
class Coincidence:
    """Samples with equal features.

    Attributes:
        repeated: samples whose features are those of an earlier sample.
        conflicting: those of them whose label is not that of the first such sample.
        example: two samples with equal features and different labels, None if there are none.
    """

    repeated: int
    conflicting: int
    example: tuple[int, int] | None


def coinciding(features: Tensor, labels: Tensor) -> Coincidence:
    """Finds rows that are equal, number by number (0 and -0 are equal).

    Args:
        features: [N, …].
        labels: int64 [N].
    """
    rows = features.detach().cpu().flatten(1)
    first: dict[bytes, int] = {}
    repeated = conflicting = 0
    example: tuple[int, int] | None = None
    for start in range(0, len(rows), _CHUNK):
        block = (rows[start : start + _CHUNK] + 0.0).contiguous().numpy()  # + 0.0 turns -0 into 0
        for i, row in enumerate(block, start):
            other = first.setdefault(hashlib.blake2b(row, digest_size=16).digest(), i)
            if other != i and torch.equal(rows[other], rows[i]):
                repeated += 1
                if labels[other] != labels[i]:
                    conflicting += 1
                    example = example or (other, i)
    return Coincidence(repeated, conflicting, example)


@without_autocast
def linear_separability(
    features: Any, labels: Any, *, classes: int | None = None, iterations: int = 1000
) -> Separation:
    """Decides whether there is a linear readout (U, c) that is right on every sample.

    From cheap to dear: equal features with different labels; a softmax regression by L-BFGS, which
    finds a witness where there is a margin; Newton's method on the logistic loss of the most
    confused pairs of classes, and of all inequalities together where they are few enough, for a
    proof that there is none; a linear program, where scipy is installed. False means that no (U, c)
    exists, proved up to the bounds on rounding that the module states, which hold for matrix
    products summed in any order. Where data touch (separable but for points on the boundary) the
    answer may be None.

    Args:
        features: [N, …], flattened; tensor or array of finite numbers.
        labels: integers [N] from 0.
        classes: C; the largest label and 1 more if None.
        iterations: of L-BFGS, at most.

    Raises:
        ModeconnError: no samples, features that are not finite, labels that are no class numbers or
            of another length.
    """
    raw, y, C = _checked(features, labels, classes, iterations)
    N = len(raw)
    radius = _radius(raw)
    if len(torch.unique(y)) == 1:
        return Separation(Outcome.ONE_CLASS, N, C, radius)
    example = coinciding(raw, y).example
    if example is not None:
        return Separation(Outcome.DUPLICATES, N, C, radius, margin_at_most=0.0, proof=example)
    found = _search(raw, y, C, iterations)
    if found.witness is not None:
        return Separation(Outcome.SEPARABLE, N, C, radius, found.witness, found.margin)
    if found.proof is not None:
        return Separation(
            Outcome.NOT_SEPARABLE, N, C, radius, margin_at_most=0.0, proof=found.proof
        )
    return Separation(Outcome.UNDECIDED, N, C, radius, margin_at_most=found.at_most)


def _radius(raw: Tensor) -> float:
    """Returns the largest norm of (x, 1)."""
    squares = [float(block.double().square().sum(1).max()) for block in raw.split(_CHUNK)]
    return math.sqrt(max(squares) + 1.0)


def _checked(
    features: Any, labels: Any, classes: int | None, iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Returns features [N, d] and labels on the CPU, and the number of classes."""
    x, y = torch.as_tensor(features).detach().cpu(), torch.as_tensor(labels).cpu()
    if x.dim() < 2 or not len(x):
        raise ModeconnError(
            f"features have shape {list(x.shape)}: expected [N, …] with at least one sample"
        )
    if y.dim() != 1 or len(y) != len(x) or y.is_floating_point() or y.dtype == torch.bool:
        raise ModeconnError(
            f"labels have shape {list(y.shape)} and dtype {y.dtype}: expected integers [{len(x)}]"
        )
    if iterations < 1:
        raise ModeconnError(f"iterations is {iterations}: expected at least 1")
    low, high = int(y.min()), int(y.max())
    if low < 0 or (classes is not None and high >= classes):
        last = (classes or high + 1) - 1
        raise ModeconnError(
            f"labels run from {low} to {high}: expected class numbers from 0 to {last}"
        )
    x = (x if x.is_floating_point() else x.double()).flatten(1)
    if not all(bool(torch.isfinite(block).all()) for block in x.split(_CHUNK)):
        raise ModeconnError("features are not finite: expected numbers without NaN and infinity")
    return x, y.long(), classes or high + 1


@dataclass
class _Found:
    """The result of a search: a witness and its margin, or a proof, or a bound on the margin."""

    witness: tuple[Tensor, Tensor] | None = None
    margin: float = math.nan
    proof: tuple[int, ...] | None = None
    at_most: float = math.inf


def _search(raw: Tensor, y: Tensor, C: int, iterations: int) -> _Found:
    """Runs the regression, checks for a witness as it goes, and searches pairs for a proof."""
    regression = _Regression(raw, y, C)
    done, next_proof = 0, _FIRST_PROOF
    tried: set[tuple[int, int]] = set()
    while done < iterations:
        steps = min(_CHECK_EVERY, iterations - done)
        moved = regression.run(steps)
        done += steps
        U, c = regression.readout()
        margin = _margin(raw, y, U, c)
        if margin > 0:
            return _Found((U, c), margin)
        if done >= next_proof or not moved or done >= iterations:
            next_proof *= 2
            proof = _pair_proof(raw, y, regression.confusion(), tried)
            if proof is not None:
                return _Found(proof=proof)
            if not moved:
                break
    return _last_resort(raw, y, C, regression)


def _last_resort(raw: Tensor, y: Tensor, C: int, regression: _Regression) -> _Found:
    """Takes all inequalities together: Newton for a proof, a linear program for a witness."""
    at_most = regression.at_most(raw)
    m, D = len(raw) * (C - 1), (C - 1) * (raw.shape[1] + 1)
    if m * D > _MOST_NUMBERS:
        return _Found(at_most=at_most)
    rows = inequalities(raw, y, C)
    if m * D * D <= _MOST_WORK and proves_none(rows):
        return _Found(proof=())
    w = largest_margin(rows)
    if w is not None:
        # The last class's readout was taken to be 0: adding one readout to all classes' changes no
        # difference.
        full = torch.cat([w.view(C - 1, -1), w.new_zeros(1, raw.shape[1] + 1)])
        readout = _normalised(full[:, :-1], full[:, -1])
        margin = _margin(raw, y, *readout)
        if margin > 0:
            return _Found(readout, margin)
    return _Found(at_most=at_most)


# -- the witness -----------------------------------------------------------------------------------


class _Regression:
    """Softmax regression on standardised features, which converges faster than on raw ones."""

    def __init__(self, raw: Tensor, y: Tensor, C: int) -> None:
        self.y = y
        x = raw.to(torch.float64, copy=True)
        self.mean, deviation = x.mean(0), x.std(0, correction=0)
        self.inverse = torch.where(deviation > 0, 1.0 / deviation, torch.zeros_like(deviation))
        self.x = x.sub_(self.mean).mul_(self.inverse)
        self.V = torch.zeros(C, x.shape[1], dtype=torch.float64, requires_grad=True)
        self.b = torch.zeros(C, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.LBFGS(
            [self.V, self.b],
            lr=1.0,
            history_size=20,
            max_iter=_CHECK_EVERY,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

    def run(self, steps: int) -> bool:
        """Runs some iterations; returns False once they change nothing any more."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(self.x, self.V, self.b), self.y)
            loss.backward()
            return loss

        before = self.V.detach().clone()
        self.optimizer.param_groups[0]["max_iter"] = steps
        with torch.enable_grad():
            self.optimizer.step(closure)
        return not torch.equal(before, self.V.detach())

    def readout(self) -> tuple[Tensor, Tensor]:
        """Returns (U, c) for the raw features, of norm 1."""
        U = self.V.detach() * self.inverse
        return _normalised(U, self.b.detach() - U @ self.mean)

    def confusion(self) -> np.ndarray:
        """Counts the samples of each class that are taken for each other class, [C, C]."""
        guess = F.linear(self.x, self.V.detach(), self.b.detach()).argmax(1)
        C = len(self.b)
        counts = torch.bincount(self.y * C + guess, minlength=C * C).view(C, C).numpy()
        np.fill_diagonal(counts, 0)
        return counts

    def at_most(self, raw: Tensor) -> float:
        """Bounds the margin of any (U, c) of norm 1.

        The multipliers λ are the softmax probabilities of wrong classes: Σ λ a = r and Σ λ = s
        give s · min a · w <= r · w <= |r|, whatever w of norm 1.
        """
        p = F.linear(self.x, self.V.detach(), self.b.detach()).softmax(1)
        p.scatter_(1, self.y[:, None], 0.0)
        total = float(p.sum())
        if total < _VANISHED:
            return math.inf
        signed = (-p).scatter_(1, self.y[:, None], p.sum(1, keepdim=True))
        blocks = list(zip(signed.split(_CHUNK), (affine(block) for block in raw.split(_CHUNK))))
        r = sum(s.T @ x for s, x in blocks)
        size = sum(s.abs().T @ x.abs() for s, x in blocks)
        rounding = 2 * (len(raw) + len(self.b)) * _EPS
        return float((r.norm() + rounding * size.norm()) / total) * (1 + rounding)


def _normalised(U: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Scales a readout to norm 1, without the part common to all classes."""
    # That part changes no difference between classes, and would make the margin look smaller.
    U, c = U - U.mean(0), c - c.mean()
    norm = torch.cat([U, c[:, None]], 1).norm()
    return (U / norm, c / norm) if norm > 0 else (U, c)


def _margin(raw: Tensor, y: Tensor, U: Tensor, c: Tensor) -> float:
    """Bounds the smallest difference between the own class's output and another's from below.

    A product of d terms, summed in any order, is wrong by at most d ε Σ |x| |u| (Higham 2002,
    section 3.1); twice that with a few terms more covers the bound's own rounding.
    """
    worst = math.inf
    factor = 2 * (raw.shape[1] + 8) * _EPS
    for x, own in zip(raw.split(_CHUNK), y.split(_CHUNK)):
        x = x.double()
        z = x @ U.T + c
        size = (x.abs() @ U.abs().T + c.abs()) * factor + _UNDERFLOW
        at = own[:, None]
        low = z.gather(1, at) - size.gather(1, at) - z - size
        worst = min(worst, float(low.scatter_(1, at, math.inf).min()))
    return worst * (1 - 8 * _EPS) if worst > 0 else worst


def _pair_proof(
    raw: Tensor, y: Tensor, confusion: np.ndarray, tried: set[tuple[int, int]]
) -> tuple[int, int] | None:
    """Finds two classes that are not separable from each other, among the pairs confused most."""
    both = confusion + confusion.T
    pairs = sorted(itertools.combinations(range(len(both)), 2), key=lambda pair: -both[pair])
    left = [pair for pair in pairs if both[pair] and pair not in tried]
    for pair in left[:_PAIRS]:
        tried.add(pair)
        first, second = (affine(raw[y == k]) for k in pair)
        if proves_none(torch.cat([first, -second])):
            return pair
    return None
