"""Measures a path for its certificate: one pass over the data, at the breakpoints alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.connection.certificate import Certificate, Segment
from modeconn.connection.layer_chain import LayerChain, block_rows
from modeconn.connection.segment_kinds import SWING, Evidence
from modeconn.connection.swing import StepFunction, SwingError, correct
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.evaluation.outputs import Forward
from modeconn.evaluation.progress import Progress
from modeconn.metrics import Head
from modeconn.parameters.paths import PolyChain

# Rows that go through every breakpoint by a plain pass, too: enough to show an overflow, and few
# beside the data.
_PLAIN_ROWS = 16
# Relative difference of a plain pass from the engine that counts as rounding in float32.
_PLAIN_TOLERANCE = 1e-3
# Bytes for the logits of all breakpoints: two float64 copies of one batch.
_LOGITS_BUDGET = 64 << 20
_BYTES_PER_LOGIT = 16
# A batch smaller than this leaves vector units idle.
_SMALLEST_BATCH = 16


@dataclass(frozen=True, eq=False)
class Subject:
    """A path to be measured, with the kinds of its segments found in the weights."""

    model: nn.Module
    chain: LayerChain
    path: PolyChain
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class MeasuredPath:
    """Losses and errors of a path on one data set."""

    segments: tuple[Segment, ...]
    samples: int
    digest: str

    def certificate(self, labels: Sequence[str] | None, target: float | None) -> Certificate:
        """Returns the certificate that the segments make."""
        return Certificate.of(self.segments, labels, self.samples, self.digest, target)


def measure_path(
    subject: Subject, data: Any, batch_size: int | None, progress: Progress | None
) -> MeasuredPath:
    """Measures losses and errors at the breakpoints, the exact errors of the swings, the digest.

    Logits come from the engine in the path's own precision; losses are summed in float64.
    """
    path, count = subject.path, subject.path.segments
    swings = {k: SwingError() for k, found in enumerate(subject.evidence) if found.kind == SWING}
    cross_entropy, digest = Head("cross_entropy", ("loss",)), _Digest()
    sums = np.zeros((count + 1, 2))  # loss and error of each breakpoint
    batches = as_batches(data, positive("batch_size", batch_size) or _default_rows(subject, data))
    forward: Forward | None = None
    samples = 0
    for inputs, targets in batches:
        x = computed_with(inputs, path)
        if forward is None:
            forward = Forward(subject.model, path, count + 1, x, precision=_precision(path)[0])
            _check_engine(subject, x[:_PLAIN_ROWS], forward(x[:_PLAIN_ROWS]))
        logits = forward(x).double()
        y = cross_entropy.fit(logits[0], targets.to(logits.device))
        if cross_entropy.leaves_out:
            raise ModeconnError(
                "a label is -100: a certificate needs a class for every sample; leave such "
                "samples out"
            )
        digest.add(x, y)
        right = torch.stack([correct(row, y) for row in logits])
        sums[:, 0] += [float(cross_entropy.sums(row, y)[0]) for row in logits]
        sums[:, 1] += (~right).sum(1).cpu().numpy()
        for k, swing in swings.items():
            swing.add(logits[k], logits[k + 1], y)
        samples += len(x)
        if progress is not None:
            progress(samples, batches.samples)
    losses, errors = (sums / samples).T.tolist()
    curves = {k: swing.finish() for k, swing in swings.items()}
    segments = [
        _segment(k, found, losses, errors, curves.get(k))
        for k, found in enumerate(subject.evidence)
    ]
    return MeasuredPath(tuple(segments), samples, digest.finish())


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
    path, chain = subject.path, subject.chain
    first = next(iter(as_batches(data, 2)))[0]
    of_plain_pass = block_rows(chain, computed_with(first, path))
    of_logits = _LOGITS_BUDGET // (_BYTES_PER_LOGIT * (path.segments + 1) * chain.classes)
    return max(_SMALLEST_BATCH, min(of_plain_pass, of_logits))


def _check_engine(subject: Subject, x: Tensor, outputs: Tensor) -> None:
    """Raises where a plain pass of a few rows gives other outputs than the engine.

    The engine leaves out dead units; it cannot see that one of them overflows, which in a plain
    pass makes NaN of a weight of zero.
    """
    for k, (state, own) in enumerate(zip(subject.path.control_points, outputs)):
        plain = subject.chain.run(state, x)
        finite = own.isfinite().all(1)
        scale = float(own[finite].abs().max()) if bool(finite.any()) else 0.0
        rtol, atol = _PLAIN_TOLERANCE, _PLAIN_TOLERANCE * scale
        if not torch.allclose(plain[finite], own[finite], rtol=rtol, atol=atol):
            raise ModeconnError(
                f"breakpoint {k}: a plain pass gives other outputs than the engine, "
                "which leaves out units that are not read: "
                "look for weights so large that such units overflow"
            )


def _segment(
    k: int,
    found: Evidence,
    losses: Sequence[float],
    errors: Sequence[float],
    curve: StepFunction | None,
) -> Segment:
    """Puts together segment k from the losses and errors at all breakpoints.

    Args:
        curve: the error along a swing; None elsewhere, where it is that of both ends.
    """
    count = len(losses) - 1
    start, end = k / count, (k + 1) / count
    highest = max(errors[k], errors[k + 1])
    where = start if errors[k] >= errors[k + 1] else end
    if curve is not None and curve.maximum > highest:
        highest, where = curve.maximum, start + curve.argmax / count
    ends = (losses[k], losses[k + 1]), (errors[k], errors[k + 1])
    return Segment(found.kind, start, end, found.moved, *ends, highest, where, found.text)


class _Digest:
    """SHA-256 of inputs and targets, row after row, whatever the batches."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256(), hashlib.sha256()]
        self._kinds = ["", ""]
        self._rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        self._rows += len(inputs)
        for i, tensor in enumerate((inputs, targets)):
            self._kinds[i] = f"{list(tensor.shape[1:])} {tensor.dtype}"
            self._parts[i].update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)

    def finish(self) -> str:
        sums = [part.hexdigest() for part in self._parts]
        text = " ".join([str(self._rows), *self._kinds, *sums])
        return hashlib.sha256(text.encode()).hexdigest()
