"""Loss and metrics at many points of a path, in one pass over the data."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from modeconn.backends.precision import products, without_autocast
from modeconn.capture.export import prepare
from modeconn.capture.trial import Runner
from modeconn.data.inputs import moved
from modeconn.data.tensors import as_inputs
from modeconn.evaluation.adaptive.evaluation import ENDS, Evaluate, adaptive_results, goal_of
from modeconn.evaluation.adaptive.searches import Goal
from modeconn.evaluation.arguments import device_of, dtype_of, fitted, frozen_entries
from modeconn.evaluation.data_notices import warn_of_data
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.passes import results_of
from modeconn.evaluation.progress import Meter, Progress, reporting
from modeconn.evaluation.ranks import Ranks, installed, present_ranks
from modeconn.evaluation.request import Request
from modeconn.evaluation.result import PathResult
from modeconn.evaluation.resume import Unfinished, fingerprint
from modeconn.evaluation.statistics import placeholders
from modeconn.evaluation.summing import Run
from modeconn.files.writing import locked
from modeconn.metrics import Metric, PerSample
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points
from modeconn.plan.planner import make_program
from modeconn.plan.report import Plan


@overload
def evaluate(
    model: nn.Module,
    path: Path,
    data: Mapping[str, Any],
    points: Points = 101,
    *,
    loss: str | PerSample = "cross_entropy",
    metrics: Sequence[Metric] | None = None,
    buffers: str = "interpolate",
    backend: str = "auto",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | Progress | None = None,
    precision: str = "float32",
    memory_budget: int | None = None,
    recompute_data: Any = None,
    recompute_batches: int | None = None,
    recompute_average: str = "batches",
    resume: str | os.PathLike[str] | None = None,
    noise_seed: int | None = None,
    tolerance: float = 0.01,
    floor: float = 1e-4,
    ignore: Collection[str] = (),
    distributed: bool = True,
) -> Any: ...


@overload
def evaluate(
    model: nn.Module,
    path: Path,
    data: Any,
    points: Points = 101,
    *,
    loss: str | PerSample = "cross_entropy",
    metrics: Sequence[Metric] | None = None,
    buffers: str = "interpolate",
    backend: str = "auto",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | Progress | None = None,
    precision: str = "float32",
    memory_budget: int | None = None,
    recompute_data: Any = None,
    recompute_batches: int | None = None,
    recompute_average: str = "batches",
    resume: str | os.PathLike[str] | None = None,
    noise_seed: int | None = None,
    tolerance: float = 0.01,
    floor: float = 1e-4,
    ignore: Collection[str] = (),
    distributed: bool = True,
) -> PathResult: ...


@without_autocast
def evaluate(
    model: nn.Module,
    path: Path,
    data: Any,
    points: Points = 101,
    *,
    loss: str | PerSample = "cross_entropy",
    metrics: Sequence[Metric] | None = None,
    buffers: str = "interpolate",
    backend: str = "auto",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | Progress | None = None,
    precision: str = "float32",
    memory_budget: int | None = None,
    recompute_data: Any = None,
    recompute_batches: int | None = None,
    recompute_average: str = "batches",
    resume: str | os.PathLike[str] | None = None,
    noise_seed: int | None = None,
    tolerance: float = 0.01,
    floor: float = 1e-4,
    ignore: Collection[str] = (),
    distributed: bool = True,
) -> PathResult | dict[str, PathResult]:
    """Evaluate a network along a path, in one pass over the data.

    Norms' statistics are recomputed in a pass of their own, if that is requested.

    Args:
        model: the architecture. Its own weights do not matter, and it is left as it was, training
            mode included.
        path: `Line`, `PolyChain`, `Bezier`, `Plane` or `Mixture` of checkpoints that fit the model.
        data: (inputs, targets) as tensors, arrays or memory maps; a Dataset or DataLoader; an
            iterable of such batches. A model with several inputs takes them as a tuple or a dict,
            and a dict may hold the targets as "labels". Any other dict holds several data sets, by
            name: {"train": …, "test": …}.
        points: how many points, evenly spaced, or the t values, in any order, repeated or not; or
            "adaptive", for a path in one parameter: as few as find the largest value of every
            mean over samples, and of its rise above the straight line between the ends.
        loss: "cross_entropy" (integer labels of samples, tokens or pixels), "next_token" (texts
            that are their own labels), "mse", "bce" (logits), one of PyTorch's with the mean of its
            own (`nn.CrossEntropyLoss(weight=w)`), or a callable (outputs, targets) → losses [N],
            each of its row alone, which receives whatever the model returns.
        metrics: what to return: "loss", "error" (fraction of wrong classes), "top5_error",
            "perplexity", callables (outputs, targets) → [N], and `DatasetMetric` for numbers of all
            samples together (calibration errors, F1). By default the loss, and the error where the
            loss is one of classes.
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
            where others are evaluated. Of several data sets it is the name of one; one pass over it
            serves them all.
        recompute_batches: the most batches of them to read.
        recompute_average: what recomputed statistics are the means over: "batches", which count
            alike, as in PyTorch with `momentum=None`, or their "samples", as in Garipov et al. 2018
            (`update_bn`). They differ where the last batch is smaller.
        resume: a file that keeps the sums, written after every few seconds of work. The same call
            after an interruption continues from it, to the same sums. A finished evaluation leaves
            it, with the whole result; remove it.
        noise_seed: for a network that draws random numbers in eval mode (masks, dropout that is
            always on): it draws the same at every point, and again in the next call with the same
            data, batches and threads. By default it draws anew at each point.
        tolerance: of adaptive points: what a value that they miss may be above the largest that
            they find, as a share of its height above the lower end.
        floor: the least such miss that counts, whatever the height.
        ignore: entries in which the config.json of folders may differ, though they change the
            forward; the whole path has the model's.
        distributed: whether the processes of torch.distributed's default group share the batches,
            where it is initialised: each calls this with the same arguments, and has the result.

    Returns:
        The means over all samples, or over all tokens with a label, at each of `points`, in their
        order. Of several data sets a dict with the result of each. With adaptive points, their t is
        irregular and rising, and `info` has the "rule", the "samples of the parts" and why each
        metric's search "stopped"; what they find is a lower bound of the maximum, and no proof,
        but for "exact" ones.

    Raises:
        ModeconnError: bad input, named in one line, before the pass begins where that is known by
            then.
    """
    ranks = present_ranks(distributed)
    if ranks.size == 1 and resume is not None:
        ranks = Ranks()
    with ranks.together():
        goal = goal_of(points, path, tolerance, floor, resume)
        request = Request(
            model=model,
            path=path,
            data=data,
            points=ENDS if goal else points,
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
            recompute_average=recompute_average,
            resume=resume,
            noise_seed=noise_seed,
            ignore=ignore,
            shared=ranks.shared,
        )
        warn_of_data(data, recompute_data, request.recomputes)
        runner = prepare(request.model, request.dtype, request.where)
        evaluation = functools.partial(_evaluation, runner, ranks)
        shown = progress if ranks.rank == 0 or callable(progress) else False
        with reporting(shown) as report:
            results = _at_points(request, evaluation, goal, runner, report)
    return results if request.has_names else results[""]


def _at_points(
    request: Request,
    evaluation: Evaluate,
    goal: Goal | None,
    runner: Runner,
    report: Progress,
) -> dict[str, PathResult]:
    """Evaluate at the points that were given, or at those that find the goal."""
    if goal is None:
        return evaluation(request, report)
    with torch.no_grad():
        return adaptive_results(request, evaluation, goal, runner, report)


def _evaluation(
    runner: Runner, ranks: Ranks, request: Request, report: Progress
) -> dict[str, PathResult]:
    """Evaluate at points that are given; return the result of each data set."""
    started = time.perf_counter()
    evaluated, training = request.sources()
    kept = request.resume is not None or ranks.shared
    identity = fingerprint(request.path, request.t) if kept else {}
    ranks.agree({"version": installed()} | identity | request.settings())
    with (
        locked(request.resume),
        torch.no_grad(),
        products(request.precision, request.where),
    ):
        unfinished = Unfinished(request.resume, identity | request.settings())
        meter = Meter(report, [*evaluated.values()], training, request.recompute_batches)
        run = Run(request, runner, meter, unfinished, ranks)
        return results_of(run, evaluated, training, started)


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
    model = fitted(model, path)
    frozen = frozen_entries(buffers, path)
    runner = prepare(model, dtype, where)
    graph = capture_for(path, runner, moved(as_inputs(sample, "sample"), dtype, where))
    tables = None
    if buffers == "recompute":
        tables = placeholders(graph, path, len(np.unique(t, axis=0)))
    return Plan(
        make_program(graph, path, t, dtype=dtype, device=where, frozen=frozen, tables=tables)
    )
