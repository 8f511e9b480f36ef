"""The arguments of one evaluation, checked, with their defaults filled in."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from modeconn.backends import check_name
from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.capture.graph import Graph
from modeconn.capture.noise import is_random
from modeconn.data.batches import TARGETS, Batches, as_batches, is_batch, without_targets
from modeconn.data.prefetch import resident
from modeconn.errors import ModeconnError, listed
from modeconn.evaluation.arguments import (
    check_forwards,
    device_of,
    dtype_of,
    fitted,
    frozen_entries,
    positive,
)
from modeconn.evaluation.data_notices import watch_draws
from modeconn.evaluation.statistics import BATCH_SIZE
from modeconn.files.fingerprints import digest_of
from modeconn.metrics import DatasetMetric, Head, Metric, PerSample
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points

# Rows read at a time at most: more make nothing faster.
_MOST_ROWS = 1 << 16
# Data that processes share come in at least so many batches, within these numbers of rows: enough
# for equal shares, and not so few rows that kernels become slow. They are the same for any number
# of processes.
_SHARES, _FEWEST_OF_A_SHARE, _MOST_OF_A_SHARE = 64, 128, 1024
# Bytes of a row whose shape is unknown before it is read, and the fewest that are reckoned with: a
# row of a few numbers costs as much as one of 16 in all that is computed from it.
_UNKNOWN_ROW, _SMALLEST_ROW = 4096, 64
AVERAGES = ("batches", "samples")


@dataclass(kw_only=True)
class Request:
    """The arguments of one call of `evaluate`, under their names there, and what follows from them.

    Attributes:
        shared: whether processes share it (evaluation/ranks.py).
        t: the points, float64 [T] for a curve, [T, dim] otherwise.
        head: the sums that the loss and the metrics ask for.
        dtype, where: of the computation.
        frozen: names of tensors that do not move along the path.
        budget: bytes for a batch and for what is shared between points.

    Raises:
        ModeconnError: an argument is out of range, or the path does not fit the model.
    """

    model: nn.Module
    path: Path
    data: Any
    points: Points
    loss: str | PerSample
    metrics: Sequence[Metric] | None
    buffers: str
    backend: str
    device: str | torch.device | None
    batch_size: int | None
    precision: str
    memory_budget: int | None
    recompute_data: Any
    recompute_batches: int | None
    recompute_average: str
    resume: str | os.PathLike[str] | None
    noise_seed: int | None
    ignore: Collection[str]
    shared: bool = False
    t: np.ndarray = field(init=False)
    head: Head = field(init=False)
    dtype: torch.dtype = field(init=False)
    where: torch.device = field(init=False)
    frozen: frozenset[str] = field(init=False)
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        self.t = self.path.points(self.points)
        self.head = Head(self.loss, self.metrics)
        self.dtype = dtype_of(self.precision)
        self.where = device_of(self.device, self.path)
        check_name(self.backend, self.precision, self.where)
        check_forwards(self.model, self.path, self.ignore)
        self.model = fitted(self.model, self.path)
        self.frozen = frozen_entries(self.buffers, self.path)
        positive("batch_size", self.batch_size)
        self.budget = positive("memory_budget", self.memory_budget) or MEMORY_BUDGET
        self._check_recompute()
        if self.head.whole and self.resume is not None:
            raise ModeconnError(
                f"resume keeps sums, and metric {next(iter(self.head.whole))!r} needs all outputs: "
                "expected resume=None, or such metrics in a call of their own"
            )
        if self.shared and self.resume is not None:
            raise ModeconnError(
                "resume is for an evaluation in one process, and the ranks of torch.distributed "
                "share this one: expected resume=None, or distributed=False"
            )
        if self.noise_seed is not None and type(self.noise_seed) is not int:
            raise ModeconnError(f"noise_seed is {self.noise_seed!r}: expected a whole number")

    def _check_recompute(self) -> None:
        """Check the arguments that are for recomputed statistics alone."""
        if self.recompute_average not in AVERAGES:
            raise ModeconnError(
                f'recompute_average is {self.recompute_average!r}: expected "batches" or "samples"'
            )
        given = {
            "recompute_data": self.recompute_data is not None,
            "recompute_batches": self.recompute_batches is not None,
            "recompute_average": self.recompute_average != AVERAGES[0],
        }
        for name, there in given.items():
            if there and not self.recomputes:
                raise ModeconnError(
                    f'{name} is for buffers="recompute", and buffers is {self.buffers!r}'
                )
        positive("recompute_batches", self.recompute_batches)

    @property
    def recomputes(self) -> bool:
        """Whether norms' statistics are recomputed in a pass of their own."""
        return self.buffers == "recompute"

    @property
    def has_names(self) -> bool:
        """Whether the data are several data sets by name, and no batch with its labels."""
        return isinstance(self.data, Mapping) and not is_batch(self.data)

    def sources(self) -> tuple[dict[str, Batches], Batches | None]:
        """Return the data sets to evaluate on, and the one to recompute statistics from, if any.

        Data that have no name stand under "".
        """
        given = dict(self.data) if self.has_names else {"": self.data}
        arrays = [isinstance(part, (torch.Tensor, np.ndarray)) for part in given.values()]
        if self.has_names and arrays and all(arrays):
            raise without_targets(given, "data")
        if not given or (self.has_names and not all(isinstance(n, str) and n for n in given)):
            raise ModeconnError(
                f"data: a dict with the keys {[*given]}; expected data sets by name, such as "
                f'{{"train": …, "test": …}}, or one batch with its targets as {TARGETS!r}'
            )
        training = self._training(given) if self.recomputes else None
        evaluated = {name: self._batches(name, data) for name, data in given.items()}
        if not self.recomputes:
            return evaluated, None
        return evaluated, as_batches(training, self.batch_size or BATCH_SIZE)

    def _training(self, given: dict[str, Any]) -> Any:
        """Return the data to recompute statistics from; on the device where they are read twice."""
        chosen = self.recompute_data
        if self.has_names and chosen is None and len(given) > 1:
            raise ModeconnError(
                'buffers="recompute" needs recompute_data beside several data sets: expected '
                f"one of their names, {listed([repr(name) for name in given])}, or data"
            )
        name = next(iter(given)) if chosen is None else chosen
        if not isinstance(name, str):
            return chosen
        if name not in given:
            raise ModeconnError(
                f"recompute_data is {name!r}: expected data, or the name of one of several data "
                f"sets in a dict ({listed([repr(each) for each in given if each]) or 'here none'})"
            )
        given[name] = resident(given[name], self.where)
        return given[name]

    def _batches(self, name: str, data: Any) -> Batches:
        try:
            if self.shared:
                check_splits(data)
            rows = rows_within(self.budget, data)
            made = as_batches(data, self.batch_size or rows)
            if self.batch_size or not self.shared:
                watch_draws(made, data)
                return made
            share = max(_FEWEST_OF_A_SHARE, -(-(made.samples or 1 << 30) // _SHARES))
            return as_batches(data, min(rows, share, _MOST_OF_A_SHARE))
        except ModeconnError as error:
            if not name:
                raise
            raise ModeconnError(f"data {name!r}: {str(error).removeprefix('data: ')}") from error

    def backend_of(self, graph: Graph) -> str:
        """Return the backend to make, by name: kernels of many points draw for each of them.

        Raises:
            ModeconnError: such a backend is named, and noise is to be the same at all points.
        """
        if self.noise_seed is None or not is_random(graph):
            return self.backend
        if self.backend not in ("auto", "reference", "native"):
            raise ModeconnError(
                f'noise_seed goes with backend "reference" or "native", got {self.backend!r}: '
                "kernels of many points at once draw anew for each"
            )
        return "reference" if self.backend == "auto" else self.backend

    def settings(self) -> dict[str, Any]:
        """Return the plain values that decide the sums, besides path, points and data."""
        loss = self.loss
        if not isinstance(loss, str):
            loss = getattr(loss, "__qualname__", type(loss).__qualname__)
        metrics: Any = self.metrics
        if isinstance(metrics, (str, DatasetMetric)) or callable(metrics):
            metrics = [metrics]
        more: dict[str, Any] = {}  # files of before say nothing of these
        if self.recompute_average != AVERAGES[0]:
            more["recompute_average"] = self.recompute_average
        if self.noise_seed is not None:
            more["noise_seed"] = self.noise_seed
        if self.has_names:
            more["data sets"] = [*self.data]
        return {
            "model": type(self.model).__name__,
            "loss": loss,
            "metrics": self.head.names,
            # as a reader of messages knows them, in lists: digests say nothing to one
            "definition of the loss": self._digest([self.loss]),
            "definition of the metrics": self._digest(None if metrics is None else [*metrics]),
            "buffers": self.buffers,
            "backend": self.backend,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "memory_budget": self.budget,
            "recompute_batches": self.recompute_batches,
            **more,
        }

    def _digest(self, value: Any) -> list[str]:
        return [] if self.resume is None else [digest_of(value)]


def check_splits(data: Any) -> None:
    """Raise a ModeconnError for data that differ from process to process."""
    sampler = getattr(data, "sampler", None) if isinstance(data, DataLoader) else None
    if isinstance(sampler, (RandomSampler, DistributedSampler)):
        raise ModeconnError(
            f"data: the DataLoader has a {type(sampler).__name__}, and ranks share its batches: "
            "expected shuffle=False and no sampler of its own, so that all ranks see one order; "
            "each reads its share, whatever the sampler"
        )


def rows_within(budget: int, data: Any) -> int:
    """Return the rows to read at a time, so that inputs of float32 take up half of the budget."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        inputs = data[0]
    else:
        inputs = getattr(data, "inputs", data)
    if isinstance(inputs, Mapping):
        parts = list(inputs.values())
    else:
        parts = list(inputs) if isinstance(inputs, tuple) else [inputs]
    shapes = [getattr(part, "shape", ()) for part in parts]
    per_row = _UNKNOWN_ROW
    if all(shapes):
        per_row = sum(4 * math.prod(shape[1:]) for shape in shapes)
    return max(1, min(_MOST_ROWS, budget // (2 * max(per_row, _SMALLEST_ROW))))
