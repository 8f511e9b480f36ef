"""Sums over the samples that a certificate is made of, with what rounding can make of them.

Each sum is taken of the outputs as they are, and of the worst that lie within their rounding
errors. Both the loss and the errors' bound are convex along a swing, so worst outputs at its ends
bound those between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.connection.certificate import Rounding, Segment
from modeconn.connection.local_rounding import UNIT_ROUNDOFF
from modeconn.connection.loss_bounds import CertifiedLoss, worst_logits
from modeconn.connection.rounding import Sensitivity
from modeconn.connection.swing import StepFunction, SwingError, correct

# Stands for an error of unknown size: logits plus this are numbers still.
_UNKNOWN = 1e300


@dataclass(frozen=True)
class Curves:
    """Mean losses and errors of a path.

    Attributes:
        losses, errors: float64 [S + 1], at the breakpoints; errors are NaN where there are none.
        swings: the error along each swing, by segment.
    """

    losses: np.ndarray
    errors: np.ndarray
    swings: dict[int, StepFunction]

    def largest_error(self, k: int) -> tuple[float, float]:
        """Returns the largest error on segment k, and where it is, from 0 to 1."""
        ends = self.errors[k], self.errors[k + 1]
        if math.isnan(ends[0] + ends[1]):
            return math.nan, 0.0
        highest, where = float(max(ends)), 0.0 if ends[0] >= ends[1] else 1.0
        curve = self.swings.get(k)
        if curve is not None and curve.maximum > highest:
            highest, where = curve.maximum, curve.argmax
        return highest, where

    def error_at(self, k: int, t: float) -> float:
        """Returns the error at t of segment k, from 0 to 1."""
        if k in self.swings:
            return float(self.swings[k](t))
        return float(max(self.errors[k], self.errors[k + 1]))


class _Sums:
    """Sums of losses, wrong samples and swings of one variant of the outputs."""

    def __init__(self, loss: CertifiedLoss, breakpoints: int, swings: Sequence[int]) -> None:
        self._loss = loss
        self.losses = np.zeros(breakpoints)
        self._wrong = np.zeros(breakpoints)
        self._swings = {k: SwingError() for k in swings} if loss.has_error else {}

    def add_losses(self, totals: Sequence[float], places: Sequence[int]) -> None:
        """Adds the losses of a batch: at each breakpoint that of its place among the totals."""
        self.losses += [totals[place] for place in places]

    def add_errors(self, logits: Sequence[Tensor], places: Sequence[int], y: Tensor) -> None:
        """Adds the wrong samples at breakpoints and along swings."""
        if not self._loss.has_error:
            return
        wrong = [float((~correct(row, y)).sum()) for row in logits]
        self._wrong += [wrong[place] for place in places]
        for k, swing in self._swings.items():
            swing.add(logits[places[k]], logits[places[k + 1]], y)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums so far."""
        found = {"losses": torch.from_numpy(self.losses), "wrong": torch.from_numpy(self._wrong)}
        for k, swing in self._swings.items():
            found |= {f"{k}.{key}": value for key, value in swing.tensors().items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up the sums that `tensors` returned."""
        losses, wrong = tensors["losses"].numpy(), tensors["wrong"].numpy()
        if losses.shape != self.losses.shape or wrong.shape != self._wrong.shape:
            raise ValueError(f"sums of {len(losses)} breakpoints, not {len(self.losses)}")
        self.losses, self._wrong = losses.copy(), wrong.copy()
        for k, swing in self._swings.items():
            swing.restore({key: tensors[f"{k}.{key}"] for key in SwingError.KEYS})

    def finish(self, samples: int, count: float) -> Curves:
        """Returns the means."""
        with np.errstate(invalid="ignore", divide="ignore"):
            losses = self.losses / count
        errors = self._wrong / samples if self._loss.has_error else np.full(len(losses), np.nan)
        return Curves(losses, errors, {k: swing.finish() for k, swing in self._swings.items()})


class Tally:
    """Adds up batches.

    Args:
        loss: to be certified. breakpoints: S + 1. swings: segments that are.
        precision: the dtype that outputs are computed in.
    """

    def __init__(
        self, loss: CertifiedLoss, breakpoints: int, swings: Sequence[int], precision: torch.dtype
    ) -> None:
        self._loss, self._own = loss, precision
        self._computed, self._worst, self._best, self._worst_float32 = (
            _Sums(loss, breakpoints, swings) for _ in range(4)
        )
        self._bounded = True
        self._samples, self._count = 0, 0.0

    def add(self, logits: Tensor, known: Sequence[Sensitivity] | None, y: Tensor) -> None:
        """Adds a batch: outputs [S + 1, B, C], each breakpoint's rounding if known, and targets."""
        self._samples += len(y)
        self._count += self._loss.count(y)
        first, places = _distinct(logits, known)
        rows = [logits[k] for k in first]
        self._computed.add_losses([self._loss.total(row, y) for row in rows], places)
        self._computed.add_errors(rows, places, y)
        if known is None:
            self._bounded = False
            return
        bounds = [known[k] for k in first]
        own = [each.errors(self._own).clamp(max=_UNKNOWN) for each in bounds]
        for sums, dtype in ((self._worst, torch.float64), (self._worst_float32, torch.float32)):
            # Evaluations in a dtype are as far from exact outputs as their own rounding, and those
            # from the ones computed.
            errors = [
                (error + each.errors(dtype)).clamp(max=_UNKNOWN)
                for error, each in zip(own, bounds)
            ]
            self._add_worst(sums, rows, errors, places, dtype, y)
        if self._loss.has_error:
            best = [worst_logits(row, -error, y) for row, error in zip(rows, own)]
            self._best.add_errors(best, places, y)

    def _add_worst(
        self,
        sums: _Sums,
        rows: Sequence[Tensor],
        errors: Sequence[Tensor],
        places: Sequence[int],
        dtype: torch.dtype,
        y: Tensor,
    ) -> None:
        """Adds what evaluations in a dtype can make of the outputs, at worst."""
        totals = []
        for row, error in zip(rows, errors):
            total = self._loss.largest_total(row, error, y)
            totals.append(total + self._loss.own_rounding(row, total, UNIT_ROUNDOFF[dtype]))
        sums.add_losses(totals, places)
        if self._loss.has_error:
            worst = [worst_logits(row, error, y) for row, error in zip(rows, errors)]
            sums.add_errors(worst, places, y)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the sums so far, as tensors and plain values."""
        tensors: dict[str, Tensor] = {}
        for name, sums in self._variants().items():
            tensors |= {f"{name}.{key}": value for key, value in sums.tensors().items()}
        return tensors, {
            "samples": self._samples,
            "count": self._count,
            "bounded": self._bounded,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes up the sums that `state` returned.

        Raises:
            KeyError, TypeError, ValueError: they are of another tally.
        """
        for name, sums in self._variants().items():
            prefix = f"{name}."
            own = {key[len(prefix) :]: v for key, v in tensors.items() if key.startswith(prefix)}
            sums.restore(own)
        self._samples, self._count = int(state["samples"]), float(state["count"])
        self._bounded = bool(state["bounded"])

    def _variants(self) -> dict[str, _Sums]:
        return {
            "computed": self._computed,
            "worst": self._worst,
            "best": self._best,
            "worst_float32": self._worst_float32,
        }

    def finish(self) -> Tallied:
        """Returns the means, and their bounds."""
        computed = self._computed.finish(self._samples, self._count)
        if not self._bounded:
            return Tallied(computed, None, None, None, self._samples)
        worst, best, worst_float32 = (
            sums.finish(self._samples, self._count)
            for sums in (self._worst, self._best, self._worst_float32)
        )
        return Tallied(computed, worst, best, worst_float32, self._samples)


def _distinct(
    logits: Tensor, known: Sequence[Sensitivity] | None
) -> tuple[list[int], list[int]]:
    """Finds neighbouring breakpoints of equal outputs and bounds: rewrites join them.

    Returns:
        the first of each such group, and for each breakpoint its group's place among these.
    """
    first, places = [0], [0]
    for k in range(1, len(logits)):
        alike = known is None or known[k].roundoffs is known[k - 1].roundoffs
        if not (alike and torch.equal(logits[k], logits[k - 1])):
            first.append(k)
        places.append(len(first) - 1)
    return first, places


@dataclass(frozen=True)
class Tallied:
    """Means over the samples: as computed, at worst and at best, and at worst in float32.

    All but the first are None where rounding is not bounded; of the best, errors alone count.
    """

    computed: Curves
    worst: Curves | None
    best: Curves | None
    worst_float32: Curves | None
    samples: int

    def loss_slack(self, k: int, float32: bool = False) -> float | None:
        """Returns how far the loss at breakpoint k can be off; None where that is not known."""
        worst = self.worst_float32 if float32 else self.worst
        if worst is None:
            return None
        # Sums over samples are float64, in any order.
        order = self.samples * UNIT_ROUNDOFF[torch.float64] * abs(worst.losses[k])
        return float(worst.losses[k] - self.computed.losses[k] + order)

    def error_range(self, k: int | None, segment: int | None = None) -> tuple[float, float]:
        """Returns the least and largest error that rounding makes, of a breakpoint or segment."""
        found = []
        for curves in (self.best or self.computed, self.worst or self.computed):
            value = curves.errors[k] if segment is None else curves.largest_error(segment)[0]
            found.append(float(value))
        return found[0], found[1]

    def rounding(self, segments: Sequence[Segment], overflows: bool) -> Rounding | None:
        """Returns how far rounding lifts the bounds.

        Args:
            overflows: whether values may exceed the largest float32.
        """
        if self.worst is None or self.worst_float32 is None:
            return None
        bounds = max(s.losses[0] for s in segments), max(s.max_error for s in segments)
        bound = max(bounds[0], segments[-1].losses[1])
        lifts = []
        for curves, float32 in ((self.worst, False), (self.worst_float32, True)):
            slack = [self.loss_slack(k, float32) or 0.0 for k in range(len(curves.losses))]
            top = float(np.max(self.computed.losses + slack))
            error = float(np.max([curves.largest_error(k)[0] for k in range(len(segments))]))
            lifts.append((_lift(top, bound), _lift(error, bounds[1])))
        (loss, error), (loss_float32, error_float32) = lifts
        if overflows:
            loss_float32, error_float32 = math.inf, error_float32 * 0 + 1.0 - bounds[1]
        return Rounding(loss, loss_float32, error, error_float32)


def _lift(top: float, bound: float) -> float:
    """Returns how far one is above the other; infinite losses are lifted by infinity."""
    if math.isnan(top - bound):
        return math.inf if not math.isnan(bound) and top == math.inf else math.nan
    return max(0.0, top - bound)
