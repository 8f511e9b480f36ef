"""Loss and metrics at many points of a path, in one pass over the data."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from modeconn.backends import check_name, make_backend
from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.backends.precision import products
from modeconn.capture.export import capture, prepare
from modeconn.capture.opaque import Opaque, eval_mode
from modeconn.data.batches import Batches, as_batches, as_inputs
from modeconn.data.inputs import call, moved, rows, take
from modeconn.data.prefetch import on_device, resident
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import (
    check_fit,
    device_of,
    dtype_of,
    frozen_entries,
    positive,
    warn_of,
)
from modeconn.evaluation.result import PathResult
from modeconn.evaluation.resume import Unfinished, fingerprint
from modeconn.evaluation.statistics import BATCH_SIZE, Recomputed, placeholders, recompute
from modeconn.metrics import Head, PerSample
from modeconn.parameters.paths import Path, Plane, Points
from modeconn.plan.planner import make_program
from modeconn.plan.program import Program
from modeconn.plan.report import Plan

# done, total: in samples; total is None where the data does not say.
Progress = Callable[[int, "int | None"], None]

_MOST_ROWS = 1 << 16
# A part of an evaluation that can be resumed: some seconds of work, but not so few rows that
# kernels become slow.
_FLOPS_OF_A_PART, _FEWEST_ROWS = 1e11, 32


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
    """Evaluate a network along a path, in one pass over the data, or two where norms' statistics are recomputed.

    Args:
        model: the architecture; its own weights do not matter, and it is left as it was, training
            mode included.
        path: `Line`, `PolyChain`, `Bezier`, `Plane` or `Mixture` of checkpoints that fit the model.
        data: (inputs, targets) as tensors, arrays or memory maps; a Dataset or DataLoader; an
            iterable of such batches. A model that takes several inputs gets a tuple or a dict; a
            dict may have the targets in it, as "labels".
        points: how many points, evenly spaced, or the t values, in any order, repeated if need be.
        loss: "cross_entropy" (integer labels, of samples or of tokens), "next_token" (of texts that
            are their own labels), "mse", "bce" (logits), or a callable (outputs, targets) → losses
            [N], which gets whatever the model returns.
        metrics: what to return: "loss", "error" (fraction of wrong classes), "top5_error",
            "perplexity", callables (outputs, targets) → [N]. By default the loss, and the error
            where the loss is one of classes.
        buffers: "interpolate" the norms' running statistics with the weights, keep those of the
            path's "start", or "recompute" them for all points in a pass of its own: what PyTorch
            gives at each point after `reset_running_stats()` with `momentum=None` and a pass in
            training mode, dropout off.
        backend: "auto", or a backend by name, which then runs or raises. What is recomputed runs in
            the C++ engine by "auto" and "native", where it knows the network, and by plain PyTorch
            otherwise.
        device: of the computation; by default where the path's control points are.
        batch_size: rows per batch; by default what fits `memory_budget`. Sums do not depend on it,
            up to rounding. What is recomputed does: a batch gives one estimate of the statistics,
            and by default has 128 rows.
        progress: a bar on a terminal (None), always (True), never (False), or a callable (samples
            done, samples in all).
        precision: "float32" or "float64", of the computation; on a GPU also "tf32" or "bf16", of
            what products are made of. Sums over samples are in float64 always.
        memory_budget: bytes for a batch and what is shared between points, 128 MiB by default.
        recompute_data: what to recompute the statistics from, by default `data`; give the training
            data when you evaluate on others.
        recompute_batches: only so many of its batches.
        resume: a file to keep what is done in, written after every few seconds of work: the same
            call after an interruption reads on from there, to the same sums. It stays when all is
            done, and is then the whole result; remove it.

    Returns:
        a `PathResult`: means over all samples at each point, or over all tokens with a label, in
            the order of `points`.

    Raises:
        ModeconnError: bad input, named in one line, before the pass starts where it can be known by
            then.
    """
    started = time.perf_counter()
    t = path.points(points)
    head = Head(loss, metrics)
    dtype, where = dtype_of(precision), device_of(device, path)
    check_name(backend, precision, where)
    frozen = frozen_entries(buffers, path)
    check_fit(model, path)
    first_rows = positive("batch_size", batch_size)
    budget = positive("memory_budget", memory_budget) or MEMORY_BUDGET

    if buffers != "recompute" and (recompute_data is not None or recompute_batches is not None):
        raise ModeconnError(
            f'recompute_data and recompute_batches are for buffers="recompute", and buffers is {buffers!r}'
        )
    limit = positive("recompute_batches", recompute_batches)

    if buffers == "recompute" and recompute_data is None:
        data = resident(data, where)
    runner = prepare(model, dtype, where)
    batches = as_batches(data, first_rows or _rows_within(budget, data))
    samples, statistics = 0, Recomputed({}, "")
    settings = {
        **(fingerprint(path, t) if resume is not None else {}),
        "model": type(model).__name__,
        "loss": _name_of(loss),
        "metrics": head.names,
        "buffers": buffers,
        "backend": backend,
        "precision": precision,
        "batch_size": batch_size,
        "memory_budget": budget,
        "recompute_batches": limit,
    }
    unfinished = Unfinished(resume, settings)
    with (
        eval_mode(runner),
        torch.no_grad(),
        products(precision, where),
        _reporter(progress) as report,
    ):
        if buffers == "recompute":
            source = as_batches(
                data if recompute_data is None else recompute_data, first_rows or BATCH_SIZE
            )
            report = _Passes(report, source, batches, limit)
            statistics = _statistics(
                runner, path, t, source, dtype, where, backend, limit, report, unfinished
            )
        stream = iter(batches)
        first = next(stream)  # the pass has begun: what is captured is shaped by the data itself
        x = moved(first[0], dtype, where)
        graph, example = capture(runner, x), call(runner, take(x, 0, 2))
        warn_of(graph, f"batch_size, here {first_rows or 'chosen by the memory budget'}")
        graph = graph.only_logits() if head.takes_logits else graph
        graph = graph.before_log_softmax() if head.builtin else graph
        program = make_program(
            graph,
            path,
            t,
            dtype=dtype,
            device=where,
            frozen=frozen,
            tables=statistics.tables or None,
        )
        if buffers == "interpolate":
            _warn_stale(program)
        engine = make_backend(backend, program, dtype, where, precision)
        most = (
            engine.most_rows(budget)
            if resume is None
            else min(engine.most_rows(budget), _rows_of_a_part(program))
        )
        # Nothing below waits for a device: what the host wants to know of the labels it asks before
        # they travel.
        places = [torch.from_numpy(segment.point_indices).to(where) for segment in program.segments]
        host = torch.device("cpu")
        with unfinished.stage("evaluation") as stage:
            zeros = {"sums": head.zeros(len(program.points), where), "counts": head.zeros(1, host)}
            sums, counts = (
                (stage.sums or zeros)[name].to(zero.device) for name, zero in zeros.items()
            )
            every = itertools.chain([first], stream)
            for batch, labels, given in on_device(
                every, functools.partial(head.fit, example), dtype, where
            ):
                step = rows(batch) if graph.mixes_rows else most
                for start in range(0, rows(batch), step):
                    x, y = take(batch, start, start + step), labels[start : start + step]
                    tick = _Tick(report, samples, len(y), len(program.points), batches.samples)
                    samples += len(y)
                    if stage.has(x, y):
                        tick(len(program.points))
                        continue
                    values = engine.shared(x)
                    for segment, place in zip(program.segments, places):
                        sums[place] += engine.sums(segment, values, y, head, tick)
                    counts += head.counts(given[start : start + step]).cpu()
                    stage.done({"sums": sums, "counts": counts})
    if not bool(counts.all()):
        raise ModeconnError("no token of the data has a label: all are -100")
    values_by_name = head.finish((sums.cpu() / counts).numpy()[program.inverse])
    _warn_non_finite(values_by_name, t)
    info: dict[str, str | int | float] = {
        "precision": precision,
        "device": str(where),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "statistics": statistics.backend,
        "path": repr(path),
        "fallback": graph.fallback or "; ".join(graph.closed),
    }
    if isinstance(path, Plane):
        info["control_points"] = json.dumps(path.marks.tolist())
        if path.explained is not None:
            info["trajectory"] = (
                f"{path.explained[0]:.4f} and {path.explained[1]:.4f} of the squared distances explained"
            )
    return PathResult(
        t,
        values_by_name,
        samples,
        2 if statistics.tables else 1,
        engine.name,
        time.perf_counter() - started,
        info,
    )


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
    """How `evaluate` would go about it: what is dead, constant, a combination or varying, and what that saves.

    Args:
        sample: a few rows of input, [N, …]; only their shape and dtype count.
        points, buffers, precision, device: as for `evaluate`; with "recompute" it is the second
            pass that is explained, for statistics that differ at every point.

    Returns:
        a `Plan` to print; the arithmetic is per sample.

    Raises:
        ModeconnError: as `evaluate`.
    """
    t = path.points(points)
    dtype, where = dtype_of(precision), device_of(device, path)
    frozen = frozen_entries(buffers, path)
    check_fit(model, path)
    runner = prepare(model, dtype, where)
    graph = capture(runner, moved(as_inputs(sample, "sample"), dtype, where))
    tables = (
        placeholders(graph, path, len(np.unique(t, axis=0))) if buffers == "recompute" else None
    )
    return Plan(
        make_program(graph, path, t, dtype=dtype, device=where, frozen=frozen, tables=tables)
    )


def _statistics(
    model: nn.Module,
    path: Path,
    t: np.ndarray,
    source: Batches,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    limit: int | None,
    report: _Passes,
    unfinished: Unfinished,
) -> Recomputed:
    """The norms' statistics at the distinct points, from a pass over the data; empty where there are no norms."""
    stream = iter(source)
    first = next(stream)
    graph = capture(model, moved(first[0], dtype, device))
    with unfinished.stage("statistics") as stage:
        return recompute(
            graph,
            path,
            t,
            itertools.chain([first], stream),
            dtype=dtype,
            device=device,
            stage=stage,
            backend=backend,
            limit=limit,
            seen=report.first,
        )


def _warn_stale(program: Program) -> None:
    """Warn where norms have blended statistics that are not those of their inputs."""
    nodes = sorted(
        {node for segment in program.segments if segment.between.any() for node in segment.stale}
    )
    closed = [node.function for node in program.graph.nodes if isinstance(node.function, Opaque)]
    stale = [part.path or "the model" for part in closed if part.statistics()]
    stale += [program.graph.nodes[node].source for node in nodes]
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        warnings.warn(
            f"batch norms ({stale[0]}{more}) have interpolated running statistics, which are not those of the networks between "
            'the control points; buffers="recompute" estimates them from the training data for all points, in one more pass',
            stacklevel=3,
        )


def _rows_within(budget: int, data: Any) -> int:
    """Rows to read at a time, so that inputs of float32 take up half of the budget."""
    inputs = (
        data[0]
        if isinstance(data, (tuple, list)) and len(data) == 2
        else getattr(data, "inputs", data)
    )
    several = (
        list(inputs.values())
        if isinstance(inputs, Mapping)
        else inputs
        if isinstance(inputs, tuple)
        else [inputs]
    )
    shapes = [getattr(part, "shape", ()) for part in several]
    per_row = sum(4 * math.prod(shape[1:]) for shape in shapes) if all(shapes) else 4096
    return max(1, min(_MOST_ROWS, budget // (2 * max(per_row, 64))))


def _rows_of_a_part(program: Program) -> int:
    """Rows after which it is worth writing down what is done: some seconds of work."""
    per_row = program.shared_flops + program.varying_flops
    return int(min(_MOST_ROWS, max(_FEWEST_ROWS, _FLOPS_OF_A_PART // max(per_row, 1.0))))


def _name_of(loss: str | PerSample) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__qualname__)


def _warn_non_finite(values: dict[str, np.ndarray], t: np.ndarray) -> None:
    for name, array in values.items():
        bad = ~np.isfinite(array)
        if bad.any():
            first = ", ".join(str(v) for v in t[bad][:5].tolist())
            more = f" and {int(bad.sum()) - 5} more" if bad.sum() > 5 else ""
            warnings.warn(
                f"{name} is not finite at t = {first}{more}", RuntimeWarning, stacklevel=3
            )


class _Tick:
    """Called after each point of a batch: the share of its points that are done counts as that share of its rows."""

    def __init__(
        self, report: Progress, seen: int, rows: int, points: int, total: int | None
    ) -> None:
        self._report, self._seen, self._rows, self._points, self._total = (
            report,
            seen,
            rows,
            points,
            total,
        )
        self._done = 0

    def __call__(self, points: int = 1) -> None:
        self._done += points
        self._report(self._seen + self._rows * self._done // self._points, self._total)


class _Passes:
    """Progress over two passes: samples of the first and of the second count alike."""

    def __init__(
        self, report: Progress, first: Batches, second: Batches, limit: int | None
    ) -> None:
        self._report, self._sources, self._limit = report, (first, second), limit
        self._before = 0

    def first(self, rows: int) -> None:
        """Some rows of the first pass are done."""
        self._before += rows
        self._report(self._before, self._total())

    def __call__(self, done: int, total: int | None) -> None:
        """So many samples of the second pass are done."""
        self._report(self._before + done, None if total is None else self._before + total)

    def _total(self) -> int | None:
        first, second = (source.samples for source in self._sources)
        if first is None or second is None:
            return None
        return second + (
            first if self._limit is None else min(first, self._limit * self._sources[0].batch_size)
        )


@contextlib.contextmanager
def _reporter(progress: bool | Progress | None) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(unit=" samples", unit_scale=True, leave=False, delay=0.5, desc="evaluate") as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
