"""Sums of one pass over the data: part by part, or batch by batch where processes share them."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.base import Backend, Tick
from modeconn.capture.graph import Graph
from modeconn.capture.trial import Runner
from modeconn.data.batches import Batch
from modeconn.data.inputs import Inputs, rows, take
from modeconn.data.prefetch import on_device
from modeconn.errors import ModeconnError, naming_memory
from modeconn.evaluation.gathering import Gathering
from modeconn.evaluation.notices import LabelNotices
from modeconn.evaluation.progress import Meter
from modeconn.evaluation.ranks import Ranks
from modeconn.evaluation.request import Request
from modeconn.evaluation.resume import Unfinished
from modeconn.evaluation.statistics import Recomputed
from modeconn.plan.program import Program


@dataclass(frozen=True)
class Run:
    """An evaluation under way.

    Attributes:
        request: its arguments.
        model: in the dtype and on the device of the computation.
        meter: receives the progress.
        unfinished: keeps the sums, if that is requested.
        ranks: the processes that share it.
    """

    request: Request
    model: Runner
    meter: Meter
    unfinished: Unfinished
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True)
class Prepared:
    """A planned program, the engine that runs it, and its pass over the data, which has begun.

    Attributes:
        graph: the captured network that the program is for.
        network: digest of the network and its statistics, where sums are kept.
        samples: of the data, where that is known before the pass.
        most_rows: the most rows that the engine takes at a time.
        statistics: of the program's norms.
        numbers: of the batches that are under way, where processes share them.
    """

    program: Program
    engine: Backend
    batches: Iterator[Batch]
    graph: Graph
    network: str
    samples: int | None
    most_rows: int
    statistics: Recomputed
    numbers: deque[int] = field(default_factory=deque)

    @property
    def example(self) -> Any:
        """The shape of the model's output for a few rows, which targets are checked against."""
        return self.graph.example


@dataclass
class Sums:
    """Sums over the samples, with what turns them into means.

    Attributes:
        totals: at the distinct points, float64 [T, metrics].
        counts: samples, or tokens with a label, by metric.
        samples: of the data.
        whole: metrics of the whole data set at the distinct points, float64 [T], by name.
    """

    totals: Tensor
    counts: Tensor
    samples: int = 0
    whole: Mapping[str, np.ndarray] = field(default_factory=dict)


def computes_all(run: Run) -> bool:
    """Whether this process computes all batches: alone, or for metrics that see all outputs."""
    return not run.ranks.shared or bool(run.request.head.whole)


def sums_of(run: Run, prepared: Prepared, stage_name: str) -> Sums:
    """Sum the metrics over all data, at every point, part by part."""
    if not computes_all(run):
        return _shared_sums(run, prepared)
    request, program, engine = run.request, prepared.program, prepared.engine
    head, where = request.head, request.where
    # Nothing below waits for a device: what the host wants to know of the labels it asks before
    # they travel.
    fit, said = functools.partial(head.fit, prepared.example), LabelNotices()
    gathering = Gathering(engine, program, head, prepared.samples) if head.whole else None
    part_of = _Parts(run, prepared, gathering or engine)
    with run.unfinished.stage(stage_name, prepared.network) as stage:
        sums = part_of.nothing()
        if stage.sums:
            sums = Sums(stage.sums["sums"].to(where), stage.sums["counts"])
        for inputs, labels, given in on_device(_counted(run, prepared), fit, request.dtype, where):
            said.warn(head, prepared.example, inputs, given)
            for part in part_of.batch(rows(inputs)):
                x, y = take(inputs, part.start, part.stop), labels[part]
                if stage.has(x, y):
                    sums.samples += len(y)
                    run.meter.skip(len(y))
                    continue
                part_of.add(x, y, given[part], sums, run.meter.part(len(y), len(program.points)))
                stage.done({"sums": sums.totals, "counts": sums.counts})
        if gathering is not None:
            sums.whole = gathering.values()
    return sums


def _shared_sums(run: Run, prepared: Prepared) -> Sums:
    """Sum the metrics over this rank's batches, and add up those of all in the data's order."""
    request, ranks, head = run.request, run.ranks, run.request.head
    part_of = _Parts(run, prepared, prepared.engine)
    fit, said = functools.partial(head.fit, prepared.example), LabelNotices()

    def own() -> Iterator[tuple[int, Sums]]:
        batches = on_device(_counted(run, prepared), fit, request.dtype, request.where)
        for inputs, labels, given in batches:
            number = prepared.numbers.popleft()
            if not ranks.owns(number):  # the first, which all have seen
                continue
            said.warn(head, prepared.example, inputs, given)
            sums = part_of.nothing()
            for part in part_of.batch(rows(inputs)):
                x, y = take(inputs, part.start, part.stop), labels[part]
                part_of.add(x, y, given[part], sums, _no_tick)
            yield number, replace(sums, totals=sums.totals.cpu())

    total = part_of.nothing()
    total.totals = total.totals.cpu()
    for together in ranks.in_order(own()):
        for sums in together:
            total.totals += sums.totals
            total.counts += sums.counts
            total.samples += sums.samples
            run.meter.skip(sums.samples)
    return total


def _counted(run: Run, prepared: Prepared) -> Iterator[Batch]:
    """The batches of the pass, with the targets that count by their inputs."""
    return ((x, run.request.head.counted(x, y)) for x, y in prepared.batches)


def _no_tick(more: int = 1) -> None:
    """Take no notice of points that are done."""


class _Parts:
    """Sums over parts of batches, by an engine.

    Args:
        run: the evaluation.
        prepared: its program.
        summing: the engine, or what keeps its outputs on the way.
    """

    def __init__(self, run: Run, prepared: Prepared, summing: Backend | Gathering) -> None:
        self._prepared, self._summing = prepared, summing
        self._head, self._where = run.request.head, run.request.where
        self._places = [
            torch.from_numpy(segment.point_indices).to(self._where)
            for segment in prepared.program.segments
        ]

    def nothing(self) -> Sums:
        """Return sums over no samples."""
        points = len(self._prepared.program.points)
        cpu = torch.device("cpu")
        return Sums(self._head.zeros(points, self._where), self._head.zeros(1, cpu))

    def batch(self, count: int) -> Iterator[slice]:
        """Yield the parts of a batch of so many rows."""
        step = _step(self._prepared.program.graph, count, self._prepared.most_rows)
        yield from (slice(start, start + step) for start in range(0, count, step))

    def add(self, x: Inputs, y: Tensor, given: Tensor, sums: Sums, tick: Tick) -> None:
        """Add a part to sums.

        Args:
            x, y: its inputs and labels on the device.
            given: its labels as they came.
            sums: to add to.
            tick: called with points that are done.
        """
        program, engine = self._prepared.program, self._prepared.engine
        program.noise.row = sums.samples
        sums.samples += len(y)
        with memory_named(f"{len(program.points)} points were evaluated", len(y)):
            values = engine.shared(x)
            for segment, places in zip(program.segments, self._places):
                sums.totals[places] += self._summing.sums(segment, values, y, self._head, tick)
        sums.counts += self._head.counts(given).cpu()


def _step(graph: Graph, count: int, most: int) -> int:
    """Return the rows of a batch that are computed at a time."""
    if not graph.mixes_rows:
        return most
    if graph.takes and count % graph.takes:
        raise ModeconnError(
            f"a batch of {count} rows cannot be evaluated: the model takes {graph.takes} at a "
            "time, and its output for one depends on the others; expected a multiple"
        )
    return count


def memory_named(what: str, count: int) -> contextlib.AbstractContextManager[None]:
    """Within, used-up memory is an error that names what was done with how many rows."""
    return naming_memory(
        f"{what} with {count:,} rows",
        "expected a smaller batch_size (--batch-size) or memory_budget, or a larger machine",
    )
