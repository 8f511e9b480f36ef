"""The passes of one evaluation: norms' statistics recomputed, then sums over each data set."""

from __future__ import annotations

import contextlib
import functools
import itertools
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.backends import make_backend
from modeconn.backends.base import Backend
from modeconn.capture.graph import Graph
from modeconn.capture.noise import Noise
from modeconn.capture.trial import Runner
from modeconn.data.batches import Batch, Batches
from modeconn.data.inputs import moved, rows, take
from modeconn.data.prefetch import on_device
from modeconn.errors import ModeconnError, naming_memory
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.gathering import Gathering
from modeconn.evaluation.notices import (
    LabelNotices,
    warn_of_capture,
    warn_of_non_finite,
    warn_of_probabilities,
    warn_of_stale_statistics,
)
from modeconn.evaluation.progress import Meter
from modeconn.evaluation.request import Request
from modeconn.evaluation.result import PathResult
from modeconn.evaluation.resume import Unfinished, digest_of_network
from modeconn.evaluation.statistics import NormStatistics, Recomputed
from modeconn.plan.planner import make_program
from modeconn.plan.program import Program

# A part of an evaluation that can be resumed: some seconds of work, but not so few rows that
# kernels become slow, and not more than are read at a time.
_FLOPS_OF_A_PART, _FEWEST_ROWS, _MOST_ROWS = 1e11, 32, 1 << 16


@dataclass(frozen=True)
class Run:
    """An evaluation under way.

    Attributes:
        request: its arguments.
        model: in the dtype and on the device of the computation.
        meter: receives the progress.
        unfinished: keeps the sums, if that is requested.
    """

    request: Request
    model: Runner
    meter: Meter
    unfinished: Unfinished


def results_of(
    run: Run, evaluated: Mapping[str, Batches], training: Batches | None, started: float
) -> dict[str, PathResult]:
    """Return the result of each data set; norms' statistics are recomputed once for all.

    Args:
        run: the evaluation.
        evaluated: data sets by name, "" for one that has none.
        training: data to recompute the statistics from, if that is requested.
        started: when the evaluation began, of `time.perf_counter`.
    """
    statistics = _recomputed(run, training)
    before = time.perf_counter() - started
    results: dict[str, PathResult] = {}
    prepared: _Prepared | None = None
    for number, (name, source) in enumerate(evaluated.items()):
        begun = time.perf_counter()
        prepared = _prepare(run, source, statistics, prepared)
        sums = _sums(run, prepared, f"evaluation {number}" if name else "evaluation")
        seconds = before + time.perf_counter() - begun
        results[name] = _result(run, prepared, sums, name, seconds)
    return results


@dataclass(frozen=True)
class _Prepared:
    """A planned program, the engine that runs it, and its pass over the data, which has begun.

    Attributes:
        graph: the captured network that the program is for.
        network: digest of the network and its statistics, where sums are kept.
        samples: of the data, where that is known before the pass.
        most_rows: the most rows that the engine takes at a time.
        statistics: of the program's norms.
    """

    program: Program
    engine: Backend
    batches: Iterator[Batch]
    graph: Graph
    network: str
    samples: int | None
    most_rows: int
    statistics: Recomputed

    @property
    def example(self) -> Any:
        """The shape of the model's output for a few rows, which targets are checked against."""
        return self.graph.example


@dataclass
class _Sums:
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


def _recomputed(run: Run, training: Batches | None) -> Recomputed:
    """Recompute the norms' statistics at the distinct points from the training data."""
    if training is None:
        return Recomputed({}, "")
    request = run.request
    first, batches = _begun(training)
    with _naming_memory("the network was captured", len(first[1])):
        graph = capture_for(request.path, run.model, moved(first[0], request.dtype, request.where))
    norms = NormStatistics(
        graph,
        request.path,
        request.t,
        request.dtype,
        request.where,
        request.backend,
        request.noise_seed,
    )
    norms.by_samples = request.recompute_average == "samples"
    what = "norms' statistics were recomputed"
    with (
        _naming_memory(what, len(first[1])),
        run.unfinished.stage("statistics", _network(request, graph)) as stage,
    ):
        return norms.recompute(batches, stage, request.recompute_batches, run.meter.recomputed)


def _prepare(
    run: Run, source: Batches, statistics: Recomputed, before: _Prepared | None
) -> _Prepared:
    """Capture the model on the first batch, plan the path, and make the engine.

    What was prepared for the data set before serves again where it is for the same graph.
    """
    request = run.request
    # The pass begins here: the data themselves give the shape that the model is captured with.
    first, batches = _begun(source)
    x = moved(first[0], request.dtype, request.where)
    with _naming_memory("the network was captured", rows(x)):
        graph = capture_for(request.path, run.model, x)
    if before is not None and graph is before.graph:
        return replace(before, batches=batches, samples=source.samples)
    size = request.batch_size or "chosen by the memory budget"
    warn_of_capture(graph, f"batch_size, here {size}", request.noise_seed)
    ending = ending_at(graph, request)
    warn_of_probabilities(ending, request.head)
    program = make_program(
        ending,
        request.path,
        request.t,
        dtype=request.dtype,
        device=request.where,
        frozen=request.frozen,
        tables=statistics.tables or None,
        noise=Noise(request.noise_seed),
    )
    if request.buffers == "interpolate":
        warn_of_stale_statistics(program)
    backend = request.backend_of(graph)
    needs = "outputs" if request.head.whole else "sums"
    engine = make_backend(backend, program, request.dtype, request.where, request.precision, needs)
    most_rows = engine.most_rows(request.budget)
    if request.resume is not None:
        most_rows = min(most_rows, _rows_of_a_part(program))
    network = _network(request, program.graph, statistics)
    samples = source.samples
    return _Prepared(program, engine, batches, graph, network, samples, most_rows, statistics)


def _network(request: Request, graph: Graph, statistics: Recomputed | None = None) -> str:
    """Return the digest of what is computed, if its sums are kept."""
    if request.resume is None:
        return ""
    return digest_of_network(graph, None if statistics is None else statistics.tables)


def _sums(run: Run, prepared: _Prepared, stage_name: str) -> _Sums:
    """Sum the metrics over all data, at every point, part by part."""
    request, program, engine = run.request, prepared.program, prepared.engine
    head, where = request.head, request.where
    # Nothing below waits for a device: what the host wants to know of the labels it asks before
    # they travel.
    indices = [torch.from_numpy(segment.point_indices).to(where) for segment in program.segments]
    fit, said = functools.partial(head.fit, prepared.example), LabelNotices()
    gathering = Gathering(engine, program, head, prepared.samples) if head.whole else None
    summing = gathering or engine
    with run.unfinished.stage(stage_name, prepared.network) as stage:
        sums = _Sums(head.zeros(len(program.points), where), head.zeros(1, torch.device("cpu")))
        if stage.sums:
            sums = _Sums(stage.sums["sums"].to(where), stage.sums["counts"])
        batches = ((x, head.counted(x, y)) for x, y in prepared.batches)
        for inputs, labels, given in on_device(batches, fit, request.dtype, where):
            said.warn(head, prepared.example, inputs, given)
            step = _step(program.graph, rows(inputs), prepared.most_rows)
            for start in range(0, rows(inputs), step):
                part = slice(start, start + step)
                x, y = take(inputs, part.start, part.stop), labels[part]
                sums.samples += len(y)
                if stage.has(x, y):
                    run.meter.skip(len(y))
                    continue
                tick = run.meter.part(len(y), len(program.points))
                program.noise.row = sums.samples - len(y)
                with _naming_memory(f"{len(program.points)} points were evaluated", len(y)):
                    values = engine.shared(x)
                    for segment, places in zip(program.segments, indices):
                        sums.totals[places] += summing.sums(segment, values, y, head, tick)
                sums.counts += head.counts(given[part]).cpu()
                stage.done({"sums": sums.totals, "counts": sums.counts})
        if gathering is not None:
            sums.whole = gathering.values()
    return sums


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


def _result(run: Run, prepared: _Prepared, sums: _Sums, name: str, seconds: float) -> PathResult:
    """Turn sums into means at the requested points, and describe the run."""
    if not bool(sums.counts.all()):
        which = f"the data {name!r}" if name else "the data"
        raise ModeconnError(
            f"no token of {which} has a label, or none of positive weight: expected classes, "
            "other than -100, for some of them"
        )
    request, program, statistics = run.request, prepared.program, prepared.statistics
    means = (sums.totals.cpu() / sums.counts).numpy()[program.inverse]
    whole = {metric: column[program.inverse] for metric, column in sums.whole.items()}
    values = request.head.finish(means, whole)
    of = f" of {name!r}" if name else ""
    warn_of_non_finite({metric + of: value for metric, value in values.items()}, request.t)
    info: dict[str, str | int | float] = {
        "precision": request.precision,
        "device": str(request.where),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "statistics": statistics.backend,
        "fallback": program.graph.fallback or "; ".join(program.graph.closed),
        **request.path.info(),
        **({"data": name} if name else {}),
    }
    return PathResult(
        t=request.t,
        values=values,
        samples=sums.samples,
        passes=2 if statistics.tables else 1,
        backend=prepared.engine.name,
        seconds=seconds,
        info=info,
    )


def _naming_memory(what: str, count: int) -> contextlib.AbstractContextManager[None]:
    """Within, used-up memory is an error that names what was done with how many rows."""
    return naming_memory(
        f"{what} with {count:,} rows",
        "expected a smaller batch_size (--batch-size) or memory_budget, or a larger machine",
    )


def _begun(source: Batches) -> tuple[Batch, Iterator[Batch]]:
    """Begin a pass; return its first batch, and all of its batches."""
    batches = iter(source)
    first = next(batches)
    return first, itertools.chain([first], batches)


def ending_at(graph: Graph, request: Request) -> Graph:
    """Cut a graph after the values that the sums are made of."""
    if request.head.takes_logits:
        graph = graph.only_logits()
    return graph.before_log_softmax() if request.head.ignores_log_softmax else graph


def _rows_of_a_part(program: Program) -> int:
    """Return the rows after which it is worth writing the sums: some seconds of work."""
    per_row = program.shared_flops + program.varying_flops
    return int(min(_MOST_ROWS, max(_FEWEST_ROWS, _FLOPS_OF_A_PART // max(per_row, 1.0))))
