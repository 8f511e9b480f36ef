"""The passes of one evaluation: norms' statistics recomputed, then sums over each data set."""

from __future__ import annotations

import itertools
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from modeconn.backends import make_backend
from modeconn.capture.graph import Graph
from modeconn.capture.noise import Noise
from modeconn.data.batches import Batch, Batches
from modeconn.data.inputs import leaves, moved, rows
from modeconn.errors import ModeconnError
from modeconn.evaluation.data_notices import warn_of_pixels
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.notices import (
    warn_of_capture,
    warn_of_non_finite,
    warn_of_probabilities,
    warn_of_stale_statistics,
)
from modeconn.evaluation.ranks import Ranks
from modeconn.evaluation.request import Request
from modeconn.evaluation.result import PathResult
from modeconn.evaluation.resume import digest_of_network
from modeconn.evaluation.statistics import NormStatistics, Recomputed
from modeconn.evaluation.summing import Prepared, Run, Sums, computes_all, memory_named, sums_of
from modeconn.files.fingerprints import digest_of
from modeconn.plan.planner import make_program
from modeconn.plan.program import Program

# A part of an evaluation that can be resumed: some seconds of work, but not so few rows that
# kernels become slow, and not more than are read at a time.
_FLOPS_OF_A_PART, _FEWEST_ROWS, _MOST_ROWS = 1e11, 32, 1 << 16


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
    prepared: Prepared | None = None
    for number, (name, source) in enumerate(evaluated.items()):
        begun = time.perf_counter()
        prepared = _prepare(run, source, statistics, prepared)
        sums = sums_of(run, prepared, f"evaluation {number}" if name else "evaluation")
        seconds = before + time.perf_counter() - begun
        results[name] = _result(run, prepared, sums, name, seconds)
    return results


def _recomputed(run: Run, training: Batches | None) -> Recomputed:
    """Recompute the norms' statistics at the distinct points from the training data."""
    if training is None:
        return Recomputed({}, "")
    request = run.request
    first, batches = _begun(training)
    with memory_named("the network was captured", len(first[1])):
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
        memory_named(what, len(first[1])),
        run.unfinished.stage("statistics", _network(request, graph)) as stage,
    ):
        return norms.recompute(batches, stage, request.recompute_batches, run.meter.recomputed)


def _prepare(
    run: Run, source: Batches, statistics: Recomputed, before: Prepared | None
) -> Prepared:
    """Capture the model on the first batch, plan the path, and make the engine.

    What was prepared for the data set before serves again where it is for the same graph.
    """
    request = run.request
    # The pass begins here: the data themselves give the shape that the model is captured with.
    numbers: deque[int] = deque()
    first, batches = _begun(source if computes_all(run) else _shared(source, run.ranks, numbers))
    x = moved(first[0], request.dtype, request.where)
    with memory_named("the network was captured", rows(x)):
        graph = capture_for(request.path, run.model, x)
    if before is not None and graph is before.graph:
        return replace(before, batches=batches, numbers=numbers, samples=source.samples)
    size = request.batch_size or "chosen by the memory budget"
    warn_of_capture(graph, f"batch_size, here {size}", request.noise_seed)
    ending = ending_at(graph, request)
    warn_of_probabilities(ending, request.head)
    warn_of_pixels(graph, first[0])
    program = make_program(
        ending,
        request.path,
        request.t,
        dtype=request.dtype,
        device=request.where,
        frozen=request.frozen,
        tables=statistics.tables or None,
    ).drawing(Noise(request.noise_seed))
    if request.buffers == "interpolate":
        warn_of_stale_statistics(program)
    backend = request.backend_of(graph)
    needs = "outputs" if request.head.whole else "sums"
    engine = make_backend(backend, program, request.dtype, request.where, request.precision, needs)
    most_rows = engine.most_rows(request.budget)
    if request.resume is not None:
        most_rows = min(most_rows, _rows_of_a_part(program))
    network = _network(request, program.graph, statistics)
    if run.ranks.shared:
        facts = {"the network": digest_of_network(program.graph, statistics.tables)}
        run.ranks.agree(facts | {"the first batch of data": digest_of([*leaves(x), first[1]])})
    return Prepared(
        program, engine, batches, graph, network, source.samples, most_rows, statistics, numbers
    )


def _shared(source: Batches, ranks: Ranks, numbers: deque[int]) -> Iterator[Batch]:
    """Yield the first batch, and those of this rank; add their numbers to a list."""
    for number, batch in source.share(ranks.rank, ranks.size):
        numbers.append(number)
        yield batch


def _network(request: Request, graph: Graph, statistics: Recomputed | None = None) -> str:
    """Return the digest of what is computed, if its sums are kept."""
    if request.resume is None:
        return ""
    return digest_of_network(graph, None if statistics is None else statistics.tables)


def _result(run: Run, prepared: Prepared, sums: Sums, name: str, seconds: float) -> PathResult:
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
        **({"ranks": run.ranks.size} if run.ranks.size > 1 else {}),
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


def _begun(source: Iterable[Batch]) -> tuple[Batch, Iterator[Batch]]:
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
