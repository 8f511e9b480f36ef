"""Computes the exact 0-1 error along a swing, where the logits are affine in t.

On the segment z(t) = (1 - t) z_0 + t z_1.

A sample with label y is classified correctly where its logit beats every other one: an intersection
of half lines {t : g_c(t) > 0}, g_c = z_y - z_c, so one interval. Its ends are the crossings t =
g_c(0) / (g_c(0) - g_c(1)). No grid is needed: the error along the segment is a step function whose
steps are the ends of these intervals.

Ties are decided as the library's error decides them, by the first maximum: against a class before y
the half line is open, against one after y it is closed. A sample with a logit that is not finite
counts as an error everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeconn.errors import ModeconnError

# The floats next to the ends of the segment, strictly inside.
_SMALLEST = float(np.nextafter(0.0, 1.0))
_LARGEST = float(np.nextafter(1.0, 0.0))


@dataclass(frozen=True, eq=False)
class StepFunction:
    """A step function on [0, 1], the error along a segment.

    Attributes:
        t: float64 [K], increasing, from 0 to 1: where the value may change.
        at_points: float64 [K], the value at each t.
        between: float64 [K - 1], the value on each open interval (t_k, t_{k+1}).
    """

    t: np.ndarray
    at_points: np.ndarray
    between: np.ndarray

    def __call__(self, t: np.ndarray | float) -> np.ndarray:
        """Values at any t in [0, 1], float64 of t's shape."""
        where = np.asarray(t, np.float64)
        if not ((where >= 0) & (where <= 1)).all():
            raise ModeconnError(
                f"t runs from {where.min():.6g} to {where.max():.6g}, "
                "outside of the step function: expected values in [0, 1]"
            )
        left = np.searchsorted(self.t, where, side="right") - 1
        inside = self.between[np.minimum(left, len(self.between) - 1)]
        values: np.ndarray = np.where(self.t[left] == where, self.at_points[left], inside)
        return values

    @property
    def maximum(self) -> float:
        """The supremum over [0, 1], which is attained."""
        return float(max(self.at_points.max(), self.between.max()))

    @property
    def argmax(self) -> float:
        """A t at which the supremum is attained.

        The middle of the longest interval that has it, else a point.
        """
        highest = self.maximum
        gaps = np.flatnonzero(self.between == highest)
        if not len(gaps):
            return float(self.t[self.at_points == highest][0])
        longest = gaps[np.diff(self.t)[gaps].argmax()]
        return float(0.5 * (self.t[longest] + self.t[longest + 1]))


@dataclass(frozen=True, eq=False)
class Intervals:
    """For each sample the interval of t in [0, 1] on which it is classified correctly.

    Attributes:
        left, right: float64 [N], the ends; an empty interval has left > right.
        left_closed, right_closed: bool [N], whether the end belongs to it.
    """

    left: np.ndarray
    right: np.ndarray
    left_closed: np.ndarray
    right_closed: np.ndarray

    def __len__(self) -> int:
        return len(self.left)

    @staticmethod
    def joined(parts: Sequence[Intervals]) -> Intervals:
        """Concatenates the intervals of several batches, without the empty ones."""
        left = np.concatenate([np.zeros(0), *(part.left for part in parts)])
        right = np.concatenate([np.zeros(0), *(part.right for part in parts)])
        left_closed = np.concatenate([np.zeros(0, bool), *(part.left_closed for part in parts)])
        right_closed = np.concatenate([np.zeros(0, bool), *(part.right_closed for part in parts)])
        real = left <= right
        return Intervals(left[real], right[real], left_closed[real], right_closed[real])


def correct_intervals(start: Tensor, stop: Tensor, labels: Tensor) -> Intervals:
    """Finds where on the segment each sample is classified correctly, in closed form and float64.

    Args:
        start, stop: logits [N, C] at t = 0 and t = 1.
        labels: int64 [N].
    """
    _check(start, stop, labels)
    first, last = start.double(), stop.double()
    finite = (first.isfinite() & last.isfinite()).all(1)
    column = labels[:, None]
    a, b = first.gather(1, column) - first, last.gather(1, column) - last  # g_c at 0 and 1
    classes = torch.arange(start.shape[1], device=labels.device)
    ties = classes > column  # equal logits leave the label the first maximum
    own = classes == column
    right_at_0, right_at_1 = ((g > 0) | ((g == 0) & ties) | own for g in (a, b))
    # Rounding must not move a crossing that lies strictly inside onto an end point of the segment,
    # nor beyond it.
    crossing = torch.where((a < 0) == (b < 0), 0.5, a / (a - b)).clamp(_SMALLEST, _LARGEST)
    crossing = torch.where(a == 0, 0.0, torch.where(b == 0, 1.0, crossing))
    rising, falling = ~right_at_0 & right_at_1, right_at_0 & ~right_at_1
    never = ~right_at_0 & ~right_at_1
    # Equality at the crossing is enough for a class after the label.
    lower, upper = torch.where(rising, crossing, -1.0), torch.where(falling, crossing, 2.0)
    left, right = lower.amax(1), upper.amin(1)
    left_closed = ~((lower == left[:, None]) & rising & ~ties).any(1)
    right_closed = ~((upper == right[:, None]) & falling & ~ties).any(1)
    left, right = left.clamp(min=0.0), right.clamp(max=1.0)
    no_point = (left > right) | ((left == right) & ~(left_closed & right_closed))
    empty = never.any(1) | ~finite | no_point
    left, right = torch.where(empty, 2.0, left), torch.where(empty, -1.0, right)
    return Intervals(*(v.cpu().numpy() for v in (left, right, left_closed, right_closed)))


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is the first maximum of the logits [N, C], all of them finite: bool [N]."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


class SwingError:
    """Sums up the exact error along one segment over batches of samples, added in any order.

    A sample that is right at both ends is right all along (half lines are convex), so only the
    others' intervals are kept.
    """

    # The tensors that hold the sums.
    KEYS = ("counts", "left", "right", "left_closed", "right_closed")

    def __init__(self) -> None:
        self.samples = 0
        self._always = 0  # right on the whole segment
        self._parts: list[Intervals] = []

    def add(self, start: Tensor, stop: Tensor, labels: Tensor) -> None:
        """Adds samples: logits [B, C] at t = 0 and t = 1, and labels int64 [B]."""
        _check(start, stop, labels)
        self.samples += len(labels)
        always = correct(start, labels) & correct(stop, labels)
        self._always += int(always.sum())
        rest = ~always
        if bool(rest.any()):
            self._parts.append(correct_intervals(start[rest], stop[rest], labels[rest]))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums so far, by `KEYS`."""
        known = Intervals.joined(self._parts)
        arrays = known.left, known.right, known.left_closed, known.right_closed
        counts = torch.tensor([self.samples, self._always])
        return dict(zip(self.KEYS, (counts, *map(torch.from_numpy, arrays))))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up the sums that `tensors` returned."""
        counts, *arrays = (tensors[key] for key in self.KEYS)
        self.samples, self._always = counts.tolist()
        self._parts = [Intervals(*(array.numpy() for array in arrays))]

    def finish(self) -> StepFunction:
        """Returns the error, a fraction of all samples, as a step function of t.

        Raises:
            ModeconnError: no sample was added.
        """
        if self.samples == 0:
            raise ModeconnError(
                "no sample was added: expected at least one sample for the error along a segment"
            )
        intervals = Intervals.joined(self._parts)
        t = np.unique(np.concatenate([[0.0, 1.0], intervals.left, intervals.right]))
        # Slot 2k is the point t_k, slot 2k + 1 the interval after it: an interval of t covers a
        # range of slots.
        begin = 2 * np.searchsorted(t, intervals.left) + ~intervals.left_closed
        end = 2 * np.searchsorted(t, intervals.right) - ~intervals.right_closed
        slots = 2 * len(t) - 1
        change = np.bincount(begin, minlength=slots + 1) - np.bincount(end + 1, minlength=slots + 1)
        wrong = self.samples - self._always - np.cumsum(change)[:slots]
        error = wrong / self.samples
        return StepFunction(t, error[0::2], error[1::2])


def _check(start: Tensor, stop: Tensor, labels: Tensor) -> None:
    if start.dim() != 2 or start.shape != stop.shape or labels.shape != start.shape[:1]:
        raise ModeconnError(
            f"logits at the two ends have shapes {list(start.shape)} and {list(stop.shape)}, "
            f"labels {list(labels.shape)}: expected [N, classes] twice, and [N]"
        )
