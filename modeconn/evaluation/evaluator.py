"""Loss and metrics at many points of a path, in one pass over the data."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends import make_backend
from modeconn.backends.base import Backend
from modeconn.backends.precision import products, without_autocast
from modeconn.capture.export import capture, prepare
from modeconn.capture.graph import Graph
from modeconn.capture.trial import Runner
from modeconn.data.batches import Batch, Batches
from modeconn.data.inputs import moved, rows, take
from modeconn.data.prefetch import on_device
from modeconn.data.tensors import as_inputs
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import check_fit, device_of, dtype_of, frozen_entries
from modeconn.evaluation.notices import (
    LabelNotices,
    warn_of_capture,
    warn_of_non_finite,
    warn_of_stale_statistics,
)
from modeconn.evaluation.progress import Meter, Progress, reporting
from modeconn.evaluation.request import Request
from modeconn.evaluation.result import PathResult
from modeconn.evaluation.resume import Unfinished, digest_of_network, fingerprint
from modeconn.evaluation.statistics import NormStatistics, Recomputed, placeholders
from modeconn.files import locked
from modeconn.metrics import PerSample
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points
from modeconn.plan.planner import make_program
from modeconn.plan.program import Program
from modeconn.plan.report import Plan

# A part of an evaluation that can be resumed: some seconds of work, but not so few rows that
# kernels become slow, and not more than are read at a time.
_FLOPS_OF_A_PART, _FEWEST_ROWS, _MOST_ROWS = 1e11, 32, 1 << 16


@without_autocast
def evaluate(
    model: nn.Module,
    path: Path,
    data: Any,
    points: Points = 101,
    *,
    loss: str | PerSample = "cross_entropy",
    metrics: Sequence[str | PerSample] | None = None,
    buffers: str = "interpolate",
    backend: str = "auto",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | Progress | None = None,
    precision: str = "float32",
    memory_budget: int | None = None,
    recompute_data: Any = None,
    recompute_batches: int | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> PathResult:
    """Evaluate a network along a path, in one pass over the data.

    Norms' statistics are recomputed in a pass of their own, if that is requested.

    Args:
        model: the architecture. Its own weights do not matter, and it is left as it was, training
            mode included.
        path: `Line`, `PolyChain`, `Bezier`, `Plane` or `Mixture` of checkpoints that fit the model.
        data: (inputs, targets) as tensors, arrays or memory maps; a Dataset or DataLoader; an
            iterable of such batches. A model with several inputs takes them as a tuple or a dict,
            and a dict may hold the targets as "labels".
        points: how many points, evenly spaced, or the t values, in any order, repeated or not.
        loss: "cross_entropy" (integer labels of samples, tokens or pixels), "next_token" (texts
            that are their own labels), "mse", "bce" (logits), one of PyTorch's with the mean of its
            own (`nn.CrossEntropyLoss(weight=w)`), or a callable (outputs, targets) → losses [N],
            each of its row alone, which receives whatever the model returns.
        metrics: what to return: "loss", "error" (fraction of wrong classes), "top5_error",
            "perplexity", callables (outputs, targets) → [N]. By default the loss, and the error
            where the loss is one of classes.
        buffers: "interpolate" the norms' running statistics with the weights, keep those of the
            path's "start", or "recompute" them for all points: as PyTorch does at each point after
            `reset_running_stats()` with `momentum=None` and a pass in training mode, dropout off.
        backend: "auto", or a backend by name, which then runs or raises. Statistics are recomputed
            in the C++ engine by "auto" and "native", where it knows the network, and by PyTorch
            otherwise.
        device: of the computation; by default where the path's control points are.
        batch_size: rows per batch; by default what fits `memory_budget`. Sums do not depend on it,
            up to rounding. Recomputed statistics do: each batch, by default of 128 rows, gives one
            estimate.
        progress: True for a bar, False for none, None for a bar on a terminal, or a callable
            (samples done, samples in all).
        precision: "float32" or "float64"; on a GPU also "tf32" or "bf16", which products are
            computed in. Sums over samples are always in float64.
        memory_budget: bytes for a batch and what is shared between points, 128 MiB by default.
        recompute_data: data to recompute the statistics from, by default `data`: the training data,
            where others are evaluated.
        recompute_batches: the most batches of them to read.
        resume: a file that keeps the sums, written after every few seconds of work. The same call
            after an interruption continues from it, to the same sums. A finished evaluation leaves
            it, with the whole result; remove it.

    Returns:
        The means over all samples, or over all tokens with a label, at each of `points`, in their
        order.

    Raises:
        ModeconnError: bad input, named in one line, before the pass begins where that is known by
            then.
    """
    started = time.perf_counter()
    request = Request(
        model=model,
        path=path,
        data=data,
        points=points,
        loss=loss,
        metrics=metrics,
        buffers=buffers,
        backend=backend,
        device=device,
        batch_size=batch_size,
        precision=precision,
        memory_budget=memory_budget,
        recompute_data=recompute_data,
        recompute_batches=recompute_batches,
        resume=resume,
    )
    runner = prepare(model, request.dtype, request.where)
    evaluated, training = request.sources()
    identity = {} if resume is None else fingerprint(path, request.t)
    with (
        locked(resume),
        torch.no_grad(),
        products(precision, request.where),
        reporting(progress) as report,
    ):
        unfinished = Unfinished(resume, identity | request.settings())
        run = _Run(
            request, runner, Meter(report, evaluated, training, recompute_batches), unfinished
        )
        statistics = _recomputed(run, training)
        prepared = _prepare(run, evaluated, statistics)
        sums = _sums(run, prepared)
    return _result(run, prepared, sums, started)


@without_autocast
def explain(
    model: nn.Module,
    path: Path,
    sample: Any,
    points: Points = 101,
    *,
    buffers: str = "interpolate",
    precision: str = "float32",
    device: str | torch.device | None = None,
) -> Plan:
    """Explain how `evaluate` would run: what is dead, constant, a combination or varying.

    Args:
        model: the architecture, as for `evaluate`.
        path: of checkpoints that fit the model.
        sample: a few rows of input, [N, …]; only their shape and dtype count.
        points: how many points, or the t values.
        buffers: as for `evaluate`; with "recompute" it is the second pass that is explained, for
            statistics that differ at every point.
        precision: as for `evaluate`.
        device: as for `evaluate`.

    Returns:
        A `Plan` to print; the arithmetic is per sample.

    Raises:
        ModeconnError: bad input, named in one line.
    """
    t = path.points(points)
    dtype, where = dtype_of(precision), device_of(device, path)
    frozen = frozen_entries(buffers, path)
    check_fit(model, path)
    runner = prepare(model, dtype, where)
    graph = capture(runner, moved(as_inputs(sample, "sample"), dtype, where))
    tables = None
    if buffers == "recompute":
        tables = placeholders(graph, path, len(np.unique(t, axis=0)))
    return Plan(
        make_program(graph, path, t, dtype=dtype, device=where, frozen=frozen, tables=tables)
    )


@dataclass(frozen=True)
class _Run:
    """An evaluation under way.

    Attributes:
        model: in the dtype and on the device of the computation.
        meter: receives the progress.
        unfinished: keeps the sums, if that is requested.
    """

    request: Request
    model: Runner
    meter: Meter
    unfinished: Unfinished


@dataclass(frozen=True)
class _Prepared:
    """A planned program, the engine that runs it, and its pass over the data, which has begun.

    Attributes:
        network: digest of the network and its statistics, where sums are kept.
        example: the shape of the model's output for a few rows, which targets are checked against.
        most_rows: the most rows that the engine takes at a time.
        statistics: of the program's norms.
    """

    program: Program
    engine: Backend
    batches: Iterator[Batch]
    network: str
    example: Any
    most_rows: int
    statistics: Recomputed


@dataclass
class _Sums:
    """Sums over the samples, with what turns them into means.

    Attributes:
        totals: at the distinct points, float64 [T, metrics].
        counts: samples, or tokens with a label, by metric.
        samples: of the data.
    """

    totals: Tensor
    counts: Tensor
    samples: int = 0


def _recomputed(run: _Run, training: Batches | None) -> Recomputed:
    """Recompute the norms' statistics at the distinct points from the training data."""
    if training is None:
        return Recomputed({}, "")
    request = run.request
    first, batches = _begun(training)
    graph = capture(run.model, moved(first[0], request.dtype, request.where))
    norms = NormStatistics(
        graph, request.path, request.t, request.dtype, request.where, request.backend
    )
    with run.unfinished.stage("statistics", _network(request, graph)) as stage:
        return norms.recompute(batches, stage, request.recompute_batches, run.meter.recomputed)


def _prepare(run: _Run, source: Batches, statistics: Recomputed) -> _Prepared:
    """Capture the model on the first batch, plan the path, and make the engine."""
    request = run.request
    # The pass begins here: the data themselves give the shape that the model is captured with.
    first, batches = _begun(source)
    x = moved(first[0], request.dtype, request.where)
    graph = capture(run.model, x)
    warn_of_capture(
        graph, f"batch_size, here {request.batch_size or 'chosen by the memory budget'}"
    )
    program = make_program(
        _ending_at(graph, request),
        request.path,
        request.t,
        dtype=request.dtype,
        device=request.where,
        frozen=request.frozen,
        tables=statistics.tables or None,
    )
    if request.buffers == "interpolate":
        warn_of_stale_statistics(program)
    engine = make_backend(request.backend, program, request.dtype, request.where, request.precision)
    most_rows = engine.most_rows(request.budget)
    if request.resume is not None:
        most_rows = min(most_rows, _rows_of_a_part(program))
    network = _network(request, program.graph, statistics)
    return _Prepared(program, engine, batches, network, graph.example, most_rows, statistics)


def _network(request: Request, graph: Graph, statistics: Recomputed | None = None) -> str:
    """Return the digest of what is computed, if its sums are kept."""
    if request.resume is None:
        return ""
    return digest_of_network(graph, None if statistics is None else statistics.tables)


def _sums(run: _Run, prepared: _Prepared) -> _Sums:
    """Sum the metrics over all data, at every point, part by part."""
    request, program, engine = run.request, prepared.program, prepared.engine
    head, where = request.head, request.where
    # Nothing below waits for a device: what the host wants to know of the labels it asks before
    # they travel.
    indices = [torch.from_numpy(segment.point_indices).to(where) for segment in program.segments]
    fit, said = functools.partial(head.fit, prepared.example), LabelNotices()
    with run.unfinished.stage("evaluation", prepared.network) as stage:
        sums = _Sums(head.zeros(len(program.points), where), head.zeros(1, torch.device("cpu")))
        if stage.sums:
            sums = _Sums(stage.sums["sums"].to(where), stage.sums["counts"])
        for inputs, labels, given in on_device(prepared.batches, fit, request.dtype, where):
            said.warn(head, prepared.example, inputs, given)
            step = rows(inputs) if program.graph.mixes_rows else prepared.most_rows
            for start in range(0, rows(inputs), step):
                part = slice(start, start + step)
                x, y = take(inputs, part.start, part.stop), labels[part]
                sums.samples += len(y)
                if stage.has(x, y):
                    run.meter.skip(len(y))
                    continue
                tick = run.meter.part(len(y), len(program.points))
                values = engine.shared(x)
                for segment, places in zip(program.segments, indices):
                    sums.totals[places] += engine.sums(segment, values, y, head, tick)
                sums.counts += head.counts(given[part]).cpu()
                stage.done({"sums": sums.totals, "counts": sums.counts})
    return sums


def _result(run: _Run, prepared: _Prepared, sums: _Sums, started: float) -> PathResult:
    """Turn sums into means at the requested points, and describe the run."""
    if not bool(sums.counts.all()):
        raise ModeconnError(
            "no token of the data has a label, or none of positive weight: expected classes, other "
            "than -100, for some of them"
        )
    request, program, statistics = run.request, prepared.program, prepared.statistics
    means = (sums.totals.cpu() / sums.counts).numpy()[program.inverse]
    values = request.head.finish(means)
    warn_of_non_finite(values, request.t)
    info: dict[str, str | int | float] = {
        "precision": request.precision,
        "device": str(request.where),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "statistics": statistics.backend,
        "fallback": program.graph.fallback or "; ".join(program.graph.closed),
        **request.path.info(),
    }
    return PathResult(
        t=request.t,
        values=values,
        samples=sums.samples,
        passes=2 if statistics.tables else 1,
        backend=prepared.engine.name,
        seconds=time.perf_counter() - started,
        info=info,
    )


def _begun(source: Batches) -> tuple[Batch, Iterator[Batch]]:
    """Begin a pass; return its first batch, and all of its batches."""
    batches = iter(source)
    first = next(batches)
    return first, itertools.chain([first], batches)


def _ending_at(graph: Graph, request: Request) -> Graph:
    """Cut a graph after the values that the sums are made of."""
    if request.head.takes_logits:
        graph = graph.only_logits()
    return graph.before_log_softmax() if request.head.ignores_log_softmax else graph


def _rows_of_a_part(program: Program) -> int:
    """Return the rows after which it is worth writing the sums: some seconds of work."""
    per_row = program.shared_flops + program.varying_flops
    return int(min(_MOST_ROWS, max(_FEWEST_ROWS, _FLOPS_OF_A_PART // max(per_row, 1.0))))
