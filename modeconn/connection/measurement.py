"""Measures a path for its certificate: one pass over the data, at the breakpoints alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.connection.certificate import Certificate, Rounding, Segment
from modeconn.connection.loss_bounds import CertifiedLoss
from modeconn.connection.rounding import PathRounding
from modeconn.connection.segment_kinds import SWING, Evidence
from modeconn.connection.structure import Structure
from modeconn.connection.tally import Tallied, Tally
from modeconn.connection.value_ranges import limit
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import dtype_of, positive
from modeconn.evaluation.outputs import PlannedForward
from modeconn.evaluation.progress import Progress
from modeconn.metrics.convexity import Loss
from modeconn.parameters.paths import PolyChain

# Rows that go through every breakpoint by a plain pass, too: enough to show a fault of the engine,
# and few beside the data.
_PLAIN_ROWS = 16
# Relative difference of a plain pass from the engine that counts as rounding, whatever is known of
# the networks' own.
_PLAIN_TOLERANCE = {"float32": 1e-3, "float64": 1e-8}
# Bytes for the logits of all breakpoints: two float64 copies of one batch.
_LOGITS_BUDGET = 64 << 20
_BYTES_PER_LOGIT = 16
# Rows that a source may have that does not say how many, for the budget of rounding's bounds.
_UNKNOWN_ROWS = 50_000
# A batch smaller than this leaves vector units idle.
_SMALLEST_BATCH = 16


class OverflowPossible(ModeconnError):
    """Raised where values may overflow on a segment."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A path to be measured, with the kinds of its segments found in the weights."""

    model: nn.Module
    structure: Structure
    path: PolyChain
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Measuring:
    """How to measure.

    Attributes:
        loss: as for `evaluate`, one that is convex in the outputs.
        batch_size: rows at a time; by default what fits the memory of a plain pass.
        precision: of the outputs, "float64" or "float32"; losses are summed in float64.
        progress: called with the samples done and all samples.
        effort: multiply-adds to spend on the bounds of rounding; with less, they are coarser.
    """

    loss: Loss = "cross_entropy"
    batch_size: int | None = None
    precision: str = "float64"
    progress: Progress | None = None
    effort: float = 1e11


@dataclass(frozen=True)
class MeasuredPath:
    """Losses and errors of a path on one data set, and what rounding can make of them."""

    segments: tuple[Segment, ...]
    digest: str
    loss: str
    tallied: Tallied
    rounding: Rounding | None

    def certificate(self, labels: Sequence[str] | None, target: float | None) -> Certificate:
        """Returns the certificate that the segments make."""
        return Certificate.of(
            self.segments,
            labels,
            self.tallied.samples,
            self.digest,
            target,
            self.loss,
            self.rounding,
        )


def measure_path(subject: Subject, data: Any, how: Measuring) -> MeasuredPath:
    """Measures losses and errors at the breakpoints, the exact errors of the swings, the digest.

    Outputs come from the engine, in float64 by default; losses are summed in float64.

    Raises:
        ModeconnError: bad data; a loss that is not convex in the outputs; values that may become so
            large on some segment that they overflow.
    """
    path, loss = subject.path, CertifiedLoss(how.loss)
    rows = positive("batch_size", how.batch_size) or _default_rows(subject, data)
    swings = [k for k, found in enumerate(subject.evidence) if found.kind == SWING]
    tally = Tally(loss, path.segments + 1, swings, dtype_of(how.precision))
    inputs_seen, digest = _Largest(), DataDigest()
    batches = as_batches(data, rows)
    forward: PlannedForward | None = None
    rounded: PathRounding | None = None
    for inputs, targets in batches:
        x = computed_with(inputs, path)
        if forward is None:
            count = path.segments + 1
            forward = PlannedForward(subject.model, path, count, x, precision=how.precision)
            seen = batches.samples or _UNKNOWN_ROWS
            rounded = subject.structure.rounding(
                path.control_points, subject.evidence, seen, how.effort
            )
            _check_engine(subject, x[:_PLAIN_ROWS], forward, how.precision, rounded)
        logits = forward(x).double()
        y = loss.fit(logits[0], targets)
        digest.add(x, y)
        inputs_seen.add(x)
        tally.add(logits, y, None if rounded is None else rounded.of_rows(x))
        if how.progress is not None:
            how.progress(digest.rows, batches.samples)
    tallied = tally.finish()
    reach = _check_reach(subject, inputs_seen.value)
    segments = tuple(_segment(k, found, tallied) for k, found in enumerate(subject.evidence))
    rounding = tallied.rounding(segments, overflows=not reach <= limit(torch.float32))
    return MeasuredPath(segments, digest.finish(), loss.name, tallied, rounding)


def computed_with(inputs: Tensor, path: PolyChain) -> Tensor:
    """Moves inputs to the dtype and device of the computation."""
    device = next(iter(path.control_points[0].values())).device
    return inputs.to(device, _precision(path)[1] if inputs.is_floating_point() else None)


def _precision(path: PolyChain) -> tuple[str, torch.dtype]:
    double = any(value.dtype == torch.float64 for value in path.control_points[0].values())
    return ("float64", torch.float64) if double else ("float32", torch.float32)


def _default_rows(subject: Subject, data: Any) -> int:
    """Returns the batch size whose widest value and logits at all breakpoints fit the budgets."""
    if isinstance(data, Batches):
        return data.batch_size
    path, structure = subject.path, subject.structure
    first = next(iter(as_batches(data, 2)))[0]
    of_plain_pass = structure.rows(computed_with(first, path))
    of_logits = _LOGITS_BUDGET // (_BYTES_PER_LOGIT * (path.segments + 1) * structure.classes)
    return max(_SMALLEST_BATCH, min(of_plain_pass, of_logits))


def _check_engine(
    subject: Subject,
    x: Tensor,
    forward: PlannedForward,
    precision: str,
    rounded: PathRounding | None,
) -> None:
    """Raises where a plain pass of a few rows gives other outputs than the engine.

    Where large weights cancel, as those of layers that memorise, the two may differ by as much as
    rounding can move both.
    """
    dtype = dtype_of(precision)
    bounds: list[Tensor | None] = [None] * len(subject.path.control_points)
    if rounded is not None:
        bounds = [each.errors(dtype) for each in rounded.of_rows(x)]
    x = x.to(dtype) if x.is_floating_point() else x
    outputs = zip(subject.path.control_points, forward(x), bounds)
    for k, (point, own, bound) in enumerate(outputs):
        state = {key: v.to(dtype) if v.is_floating_point() else v for key, v in point.items()}
        plain = subject.structure.run(state, x)
        finite = own.isfinite().all(1)
        scale = float(own[finite].abs().max()) if bool(finite.any()) else 0.0
        rtol = _PLAIN_TOLERANCE[precision]
        allowed = rtol * (own.abs() + scale)
        if bound is not None:
            allowed = allowed.maximum(2 * bound.where(bound.isfinite(), 0.0))
        if bool(((plain - own).abs() > allowed)[finite].any() | plain[finite].isnan().any()):
            raise ModeconnError(
                f"breakpoint {k}: a plain pass gives other outputs than the engine, "
                "which leaves out units that are not read: "
                "look for weights so large that such units overflow"
            )


def _check_reach(subject: Subject, inputs: Tensor) -> float:
    """Returns the largest value that is possible on the path.

    Raises:
        OverflowPossible: it may overflow in the weights' precision, or is not bounded at all.
    """
    points, dtype = subject.path.control_points, _precision(subject.path)[1]
    worst = 0.0
    for k in range(subject.path.segments):
        reach, where = subject.structure.largest(points[k], points[k + 1], inputs)
        if not reach <= limit(dtype):
            raise OverflowPossible(
                f"segment {k} is not certified: values of {where} may reach {reach:.3g} on it, and "
                f"{dtype} ends at {torch.finfo(dtype).max:.3g}: a unit that overflows makes NaN, "
                "even a dead one; look for weights or inputs that are too large"
            )
        worst = max(worst, reach)
    return worst


def _segment(k: int, found: Evidence, tallied: Tallied) -> Segment:
    """Puts together segment k from the losses and errors at all breakpoints."""
    curves = tallied.computed
    count = len(curves.losses) - 1
    highest, where = curves.largest_error(k)
    losses = float(curves.losses[k]), float(curves.losses[k + 1])
    errors = float(curves.errors[k]), float(curves.errors[k + 1])
    start, end = k / count, (k + 1) / count
    at = end if where == 1.0 else start + where / count
    return Segment(found.kind, start, end, found.moved, losses, errors, highest, at, found.text)


class _Largest:
    """The largest absolute value of each input, over all rows; NaN where one is NaN."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Adds rows [B, …]."""
        top = x.abs().amax(0, keepdim=True)
        self.value = torch.maximum(self.value.to(top), top)


class DataDigest:
    """SHA-256 of inputs and targets, row after row, whatever the batches."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256(), hashlib.sha256()]
        self._kinds = ["", ""]
        self.rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        self.rows += len(inputs)
        for i, tensor in enumerate((inputs, targets)):
            self._kinds[i] = f"{list(tensor.shape[1:])} {tensor.dtype}"
            self._parts[i].update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)

    def finish(self) -> str:
        """Returns the digest of all batches, in hexadecimal."""
        sums = [part.hexdigest() for part in self._parts]
        text = " ".join([str(self.rows), *self._kinds, *sums])
        return hashlib.sha256(text.encode()).hexdigest()
