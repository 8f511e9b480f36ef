"""Measures a path for its certificate: one pass over the data, at the breakpoints alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.optimisations import without
from modeconn.connection.certificate import Certificate, Rounding, Segment
from modeconn.connection.data_digest import DataDigest
from modeconn.connection.loss_bounds import CertifiedLoss
from modeconn.connection.rounding import PathRounding, Sensitivity
from modeconn.connection.segment_kinds import SWING, Evidence
from modeconn.connection.structure import Structure
from modeconn.connection.tally import Tallied, Tally
from modeconn.connection.unfinished import UnfinishedSums
from modeconn.connection.value_ranges import limit
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import dtype_of, positive
from modeconn.evaluation.outputs import PlannedForward
from modeconn.evaluation.progress import Progress
from modeconn.files.fingerprints import digest_of_tensors
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
    """States how to measure.

    Attributes:
        loss: as for `evaluate`, one that is convex in the outputs.
        batch_size: rows at a time; by default what fits the memory of a plain pass.
        precision: of the outputs, "float64" or "float32"; losses are summed in float64.
        progress: called with the samples done and all samples.
        effort: multiply-adds to spend on the bounds of rounding; with less, they are coarser.
        file: keeps the sums so far, from which the same measurement goes on after an interruption.
    """

    loss: Loss = "cross_entropy"
    batch_size: int | None = None
    precision: str = "float64"
    progress: Progress | None = None
    effort: float = 1e11
    file: str | os.PathLike[str] | None = None


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
    unfinished = UnfinishedSums(how.file, _settings(subject, how, loss.name, rows))
    unfinished.restore(tally)
    inputs_seen, digest = _Largest(), DataDigest()
    batches = as_batches(data, rows)
    engine: _Engine | None = None
    for inputs, targets in batches:
        x = computed_with(inputs, path)
        y = loss.fit(x.new_zeros(len(x), subject.structure.classes, dtype=torch.float64), targets)
        digest.add(x, y)
        inputs_seen.add(x)
        if not unfinished.cover(digest):
            engine = engine or _Engine(subject, how, x, batches.samples or _UNKNOWN_ROWS)
            tally.add(*engine.run(x), y)
            unfinished.keep(tally, digest)
        if how.progress is not None:
            how.progress(digest.rows, batches.samples)
    unfinished.keep(tally, digest, finished=True)
    tallied = tally.finish()
    reach = _check_reach(subject, inputs_seen.value)
    segments = tuple(_segment(k, found, tallied) for k, found in enumerate(subject.evidence))
    rounding = tallied.rounding(segments, overflows=not reach <= limit(torch.float32))
    return MeasuredPath(segments, digest.finish(), loss.name, tallied, rounding)


def _settings(subject: Subject, how: Measuring, loss: str, rows: int) -> dict[str, Any]:
    """Describes all that decides the sums, beside the data; empty where nothing is kept."""
    if how.file is None:
        return {}
    return {
        "path": [digest_of_tensors(point) for point in subject.path.control_points],
        "model": subject.structure.name,
        "loss": loss,
        "precision": how.precision,
        "effort": how.effort,
        "rows": rows,
    }


class _Engine:
    """Computes the outputs at the breakpoints, and the bounds on their rounding.

    Args:
        x: some inputs, to try it on. rows: that there will be.

    Raises:
        ModeconnError: a plain pass of a few rows gives other outputs.
    """

    def __init__(self, subject: Subject, how: Measuring, x: Tensor, rows: int) -> None:
        path = subject.path
        self._forward = PlannedForward(
            subject.model, path, path.segments + 1, x, precision=how.precision
        )
        self._rounding = subject.structure.rounding(
            path.control_points, subject.evidence, rows, how.effort
        )
        x = x[:_PLAIN_ROWS]
        _check_engine(subject, x, self._outputs, how.precision, self._rounding)

    def run(self, x: Tensor) -> tuple[Tensor, Sequence[Sensitivity] | None]:
        """Returns outputs [S + 1, B, C], float64, and each breakpoint's rounding if it is known."""
        known = None if self._rounding is None else self._rounding.of_rows(x)
        return self._outputs(x).double(), known

    def _outputs(self, x: Tensor) -> Tensor:
        # The bounds of rounding are of sums of products, and Winograd adds up others.
        with without(*([] if self._rounding is None else ["winograd"])):
            return self._forward(x)


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
    forward: Callable[[Tensor], Tensor],
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
