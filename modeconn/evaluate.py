"""Loss and metrics at many points of a path, in one pass over the data."""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn import state as states
from modeconn.backends import check_name, make_backend
from modeconn.capture import capture, eval_mode, prepare
from modeconn.data import as_batches
from modeconn.errors import ModeconnError
from modeconn.graph import Graph
from modeconn.metrics import Head, PerSample
from modeconn.paths import Path, Points
from modeconn.plan.explain import Plan
from modeconn.plan.planner import make_program
from modeconn.result import PathResult

# done, total: in samples; total is None where the data does not say.
Progress = Callable[[int, "int | None"], None]

_PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
# Memory for a batch, and as much for its shared values, where the caller names no budget.
_MEMORY_BUDGET = 128 << 20
_MOST_ROWS = 1 << 16


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
) -> PathResult:
    """Evaluate a network along a path, in one pass over the data.

    Args:
        model: the architecture; its own weights do not matter, and it is left as it was, training mode included.
        path: `Line`, `PolyChain`, `Bezier`, `Plane` or `Mixture` of checkpoints that fit the model.
        data: (inputs, targets) as tensors, arrays or memory maps; a Dataset or DataLoader; an iterable of such batches.
        points: how many points, evenly spaced, or the t values, in any order, repeated if need be.
        loss: "cross_entropy" (integer labels), "mse", "bce" (logits), or a callable (outputs, targets) → losses [N].
        metrics: what to return: "loss", "error" (fraction of wrong classes), "top5_error", callables (outputs, targets)
            → [N]. By default the loss, and the error where the loss is one of classes.
        buffers: "interpolate" the norms' running statistics with the weights, or keep those of the path's "start".
        backend: "auto", or a backend by name, which then runs or raises.
        device: of the computation; by default where the path's control points are.
        batch_size: rows per batch; by default what fits `memory_budget`. Sums do not depend on it, up to rounding.
        progress: a bar on a terminal (None), always (True), never (False), or a callable (samples done, samples in all).
        precision: "float32" or "float64", of the computation; sums over samples are in float64 always.
        memory_budget: bytes for a batch and what is shared between points, 128 MiB by default.

    Returns:
        a `PathResult`: means over all samples at each point, in the order of `points`.

    Raises:
        ModeconnError: bad input, named in one line, before the pass starts where it can be known by then.
    """
    started = time.perf_counter()
    t = path.points(points)
    head = Head(loss, metrics)
    check_name(backend)
    dtype, where = _precision(precision), _device(device, path)
    frozen = _frozen(buffers, path)
    _check_fit(model, path)
    first_rows = _positive("batch_size", batch_size)
    budget = _positive("memory_budget", memory_budget) or _MEMORY_BUDGET

    runner = prepare(model, dtype, where)
    batches = as_batches(data, first_rows or _rows_within(budget, data))
    samples = 0
    with eval_mode(runner), torch.no_grad(), _reporter(progress) as report:
        stream = iter(batches)
        first = next(stream)  # the pass has begun: what is captured is shaped by the data itself
        x = _moved(first[0], dtype, where)
        graph, example = capture(runner, x), runner(x[:2])
        _warn(graph, first_rows)
        program = make_program(graph, path, t, dtype=dtype, device=where, frozen=frozen)
        engine = make_backend(backend, program, dtype, where)
        sums = head.zeros(len(program.points), where)
        for inputs, targets in itertools.chain([first], stream):
            most = len(inputs) if graph.mixes_rows else engine.most_rows(budget)
            batch, labels = _moved(inputs, dtype, where), head.fit(example, targets.to(where))
            for x, y in zip(batch.split(most), labels.split(most)):
                tick = _Tick(report, samples, len(x), len(program.points), batches.samples)
                values = engine.shared(x)
                for segment in program.segments:
                    sums[segment.rows] += engine.sums(segment, values, y, head, tick)
                samples += len(x)
    means = (sums / samples).cpu().numpy()[program.inverse]
    values_by_name = {name: means[:, i].copy() for i, name in enumerate(head.names)}
    _warn_non_finite(values_by_name, t)
    info: dict[str, str | int | float] = {
        "precision": precision, "device": str(where), "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "path": repr(path), "fallback": graph.fallback or "",
    }  # fmt: skip
    return PathResult(t, values_by_name, samples, batches.passes, engine.name, time.perf_counter() - started, info)


def explain(
    model: nn.Module, path: Path, sample: Any, points: Points = 101, *, buffers: str = "interpolate",
    precision: str = "float32", device: str | torch.device | None = None,
) -> Plan:  # fmt: skip
    """How `evaluate` would go about it: what is dead, constant, a combination or varying, and what that saves.

    Args:
        sample: a few rows of input, [N, …]; only their shape and dtype count.
        points, buffers, precision, device: as for `evaluate`.

    Returns:
        a `Plan` to print; the arithmetic is per sample.

    Raises:
        ModeconnError: as `evaluate`.
    """
    t = path.points(points)
    dtype, where = _precision(precision), _device(device, path)
    frozen = _frozen(buffers, path)
    _check_fit(model, path)
    graph = capture(prepare(model, dtype, where), _moved(torch.as_tensor(sample), dtype, where))
    return Plan(make_program(graph, path, t, dtype=dtype, device=where, frozen=frozen))


def _check_fit(model: nn.Module, path: Path) -> None:
    """Raise a ModeconnError that lists what differs between the model's entries and the path's."""
    own = model.state_dict()
    states.match(
        [own, path.control_points[0]], [f"the model {type(model).__name__}", path.names[0]], devices=False, dtypes=False
    )


def _precision(precision: str) -> torch.dtype:
    if precision not in _PRECISIONS:
        raise ModeconnError(f"precision is {precision!r}: expected one of {', '.join(_PRECISIONS)}")
    return _PRECISIONS[precision]


def _device(device: str | torch.device | None, path: Path) -> torch.device:
    if device is None:
        return next(iter(path.control_points[0].values())).device
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ModeconnError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return where


def _moved(inputs: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inputs as they are computed with; integers (tokens) stay integers."""
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def _frozen(buffers: str, path: Path) -> frozenset[str]:
    """Entries that do not move: norms' running statistics, where they are to stay those of the start."""
    if buffers not in ("interpolate", "start"):
        raise ModeconnError(f'buffers is {buffers!r}: expected "interpolate" or "start"')
    statistics = ("running_mean", "running_var")
    return frozenset(key for key in path.control_points[0] if buffers == "start" and key.endswith(statistics))


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ModeconnError(f"{name} is {value!r}: expected a whole number, at least 1")
    return value


def _rows_within(budget: int, data: Any) -> int:
    """Rows to read at a time, so that inputs of float32 take up half of the budget."""
    inputs = data[0] if isinstance(data, (tuple, list)) and len(data) == 2 else getattr(data, "inputs", None)
    shape = getattr(inputs, "shape", None)
    per_row = 4 * math.prod(shape[1:]) if shape is not None and len(shape) > 1 else 4096
    return max(1, min(_MOST_ROWS, budget // (2 * max(per_row, 64))))


def _warn(graph: Graph, batch_size: int | None) -> None:
    if graph.fallback:
        warnings.warn(
            f"the model runs as it is, once per point, since it could not be captured: {graph.fallback}", stacklevel=3
        )
    if graph.mixes_rows:
        warnings.warn(
            "the model's output for a sample depends on the other samples of its batch: results depend on batch_size, "
            f"here {batch_size or 'chosen by the memory budget'}",
            stacklevel=3,
        )
    if any(node.random for node in graph.nodes):
        warnings.warn("the model draws random numbers in eval mode: results differ from run to run", stacklevel=3)


def _warn_non_finite(values: dict[str, np.ndarray], t: np.ndarray) -> None:
    for name, array in values.items():
        bad = ~np.isfinite(array)
        if bad.any():
            first = ", ".join(str(v) for v in t[bad][:5].tolist())
            more = f" and {int(bad.sum()) - 5} more" if bad.sum() > 5 else ""
            warnings.warn(f"{name} is not finite at t = {first}{more}", RuntimeWarning, stacklevel=3)


class _Tick:
    """Called after each point of a batch: the share of its points that are done counts as that share of its rows."""

    def __init__(self, report: Progress, seen: int, rows: int, points: int, total: int | None) -> None:
        self._report, self._seen, self._rows, self._points, self._total = report, seen, rows, points, total
        self._done = 0

    def __call__(self, points: int = 1) -> None:
        self._done += points
        self._report(self._seen + self._rows * self._done // self._points, self._total)


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
