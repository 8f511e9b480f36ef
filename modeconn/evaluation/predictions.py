"""Outputs of every point, batch by batch, and what ensembles of the points make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.data.batches import Batch, as_batches
from modeconn.data.inputs import rows, take
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.evaluation.outputs import PlannedForward
from modeconn.evaluation.request import rows_within
from modeconn.metrics.classes import IGNORED
from modeconn.metrics.ensembles import Calibration, disagreements, mean_probabilities
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points


class Predictions(NamedTuple):
    """Outputs of a batch at all points.

    Attributes:
        outputs: [T, B, …], in the order of the points.
        targets: [B, …], as the data have them.
    """

    outputs: Tensor
    targets: Tensor


def predict(
    model: nn.Module,
    path: Path,
    data: Any,
    points: Points = 101,
    *,
    buffers: str = "interpolate",
    backend: str = "auto",
    precision: str = "float32",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    memory_budget: int | None = None,
) -> Iterator[Predictions]:
    """Iterate over the outputs of every point, batch by batch, in one pass over the data.

    The memory is that of a batch, whatever the number of samples.

    Args:
        model: the architecture, as for `evaluate`.
        path: of checkpoints that fit the model; `States` for networks that are unrelated.
        data: as for `evaluate`, one data set.
        points: a count of points, or the t values, in any order, repeated or not.
        buffers: "interpolate" the norms' running statistics with the weights, or keep those of the
            path's "start".
        backend: "auto", or a backend by name, which then runs or raises.
        precision: "float32" or "float64"; on a CUDA device also "tf32" or "bf16".
        device: of the computation; by default where the path's control points are.
        batch_size: rows of a batch; by default as many as `memory_budget` has room for.
        memory_budget: bytes for a batch, what is shared between points and the outputs, 128 MiB
            each by default.

    Returns:
        An iterator of (outputs [T, B, …], targets [B, …]).

    Raises:
        ModeconnError: bad input, named in one line, before the first batch is returned.
    """
    budget = positive("memory_budget", memory_budget) or MEMORY_BUDGET
    most = positive("batch_size", batch_size) or rows_within(budget, data)
    batches = iter(as_batches(data, most))
    first = next(batches)
    forward = PlannedForward(
        model,
        path,
        points,
        first[0],
        buffers=buffers,
        backend=backend,
        precision=precision,
        device=device,
        memory_budget=budget,
    )
    if batch_size is None:
        example = forward.plan.program.graph.example
        of_a_row = 8 * len(forward.t) * math.prod(example.shape[1:])
        most = max(1, min(most, budget // max(of_a_row, 1)))
    return _streamed(forward, itertools.chain([first], batches), most)


def _streamed(
    forward: PlannedForward, batches: Iterator[Batch], most: int
) -> Iterator[Predictions]:
    whole = forward.plan.program.graph.mixes_rows  # outputs depend on the batch, which stays one
    for inputs, targets in batches:
        count = rows(inputs)
        step = count if whole else most
        for start in range(0, count, step):
            part = take(inputs, start, min(start + step, count))
            with torch.no_grad():
                outputs = forward(part)
            yield Predictions(outputs, targets[start : start + step])


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The ensemble of the networks at some points: the mean of their softmax probabilities.

    Attributes:
        loss, error: of the ensemble: mean of -log p(label), fraction of wrong classes.
        ece: its expected calibration error (Guo et al. 2017).
        member_loss, member_error, member_ece: of each network alone, [T].
        disagreement: the fraction of samples on which two networks predict different classes,
            [T, T].
        samples: samples, or tokens with a label, that these are means over.
    """

    loss: float
    error: float
    ece: float
    member_loss: np.ndarray
    member_error: np.ndarray
    member_ece: np.ndarray
    disagreement: np.ndarray
    samples: int

    def __str__(self) -> str:
        count = len(self.member_loss)
        pairs = self.disagreement.sum() / max(count * (count - 1), 1)
        return (
            f"ensemble of {count}: loss {self.loss:.4g}, error {100 * self.error:.2f} %, "
            f"ECE {self.ece:.4f}\n"
            f"one network, on average: loss {self.member_loss.mean():.4g}, "
            f"error {100 * self.member_error.mean():.2f} %, ECE {self.member_ece.mean():.4f}; "
            f"two of them disagree on {100 * pairs:.2f} % of the samples"
        )


def ensemble(
    model: nn.Module,
    path: Path,
    data: Any,
    points: Points = 101,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    bins: int = 15,
    **options: Any,
) -> Ensemble:
    """Evaluate the ensemble of the networks at some points of a path, in one pass over the data.

    Args:
        model, path, data, points: as for `predict`; targets are class labels [N], or of tokens
            [N, length], of which those that are -100 do not count.
        weights: of the networks, [T], not negative; they are divided by their sum. By default all
            count alike.
        bins: of the calibration error.
        **options: of `predict`.

    Raises:
        ModeconnError: bad input, or outputs that are no logits [N, classes] for labels [N].
    """
    given = None if weights is None else _normalised(weights)
    calibrations: list[Calibration] = []
    totals = np.zeros((2, 0))
    pairs: np.ndarray | None = None
    together, samples = np.zeros(2), 0
    for outputs, targets in predict(model, path, data, points, **options):
        logits, labels = _of_labels(outputs, targets)
        count = len(logits)
        if pairs is None:
            if given is not None and len(given) != count:
                raise ModeconnError(f"weights has {len(given)} values: expected one for each point")
            calibrations = [Calibration(bins) for _ in range(count + 1)]
            totals, pairs = np.zeros((2, count)), np.zeros((count, count))
        mean = mean_probabilities(logits, given)
        members = F.log_softmax(logits.double(), -1)
        wanted = labels.expand(count, -1)[..., None]
        totals[0] -= members.gather(-1, wanted).sum((1, 2)).cpu().numpy()
        totals[1] += (logits.argmax(-1) != labels).sum(-1).cpu().numpy()
        together[0] -= float(mean.gather(-1, labels[:, None]).log().sum())
        together[1] += int((mean.argmax(-1) != labels).sum())
        pairs += disagreements(logits).cpu().numpy()
        for calibration, each in zip(calibrations, [mean, *members.exp()]):
            calibration.add(each, labels)
        samples += len(labels)
    if not samples or pairs is None:
        raise ModeconnError("no sample has a label that counts: expected some other than -100")
    return Ensemble(
        loss=together[0] / samples,
        error=together[1] / samples,
        ece=calibrations[0].error,
        member_loss=totals[0] / samples,
        member_error=totals[1] / samples,
        member_ece=np.array([each.error for each in calibrations[1:]]),
        disagreement=pairs / samples,
        samples=samples,
    )


def _normalised(weights: Sequence[float] | np.ndarray) -> Tensor:
    given = torch.as_tensor(np.asarray(weights, np.float64))
    if given.dim() != 1 or not bool((given >= 0).all()) or not 0 < float(given.sum()) < math.inf:
        raise ModeconnError(
            f"weights is {weights!r:.60}: expected a number for each point, none below 0"
        )
    return given / given.sum()


def _of_labels(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [T, M, classes] and labels [M] of the samples or tokens that have a label."""
    if targets.is_floating_point() or outputs.shape[1:-1] != targets.shape:
        raise ModeconnError(
            f"outputs have shape {['T', *outputs.shape[1:]]} and targets {list(targets.shape)}: "
            "an ensemble needs logits [N, classes] and class labels [N], or [N, length, classes] "
            "and [N, length]"
        )
    labels = targets.to(outputs.device).long().reshape(-1)
    logits = outputs.flatten(1, -2)
    kept = labels != IGNORED
    if bool(kept.all()):
        return logits, labels
    return logits[:, kept], labels[kept]
