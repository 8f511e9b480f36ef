"""`points="adaptive"`: passes over all data at few points, until the maxima are found.

The rule: two disjoint random parts of the data are evaluated at many points, which is nearly free;
all data only where the parts leave room for a value above the best one (searches.py). Data that
cannot be sampled take a guided search (guided.py); where the plan shows that the break points of a
path are enough, they are all (convex.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modeconn.capture.graph import Graph
from modeconn.capture.trial import Runner
from modeconn.data.inputs import moved
from modeconn.errors import ModeconnError
from modeconn.evaluation.adaptive.convex import break_points, metrics_at_breaks
from modeconn.evaluation.adaptive.guided import FIRST, GuidedSearch
from modeconn.evaluation.adaptive.parts import parts_of, samples_of
from modeconn.evaluation.adaptive.searches import (
    FURTHER,
    MOST,
    BreakPoints,
    Budget,
    Goal,
    Known,
    PartsSearch,
    Search,
    unit_of,
)
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.progress import Progress
from modeconn.evaluation.request import Request
from modeconn.evaluation.result import PathResult
from modeconn.parameters.paths import Mixture, Path, PolyChain

ADAPTIVE = "adaptive"
ENDS = (0.0, 1.0)
# Points of the parts on a path of few segments, and batches of training data that their norms'
# statistics are recomputed from.
_GRID, _BATCHES = 101, 2
# Points closer than this are one.
_SAME = 1e-12

# Evaluates a request, and reports the samples that are done.
Evaluate = Callable[[Request, Progress], dict[str, PathResult]]


def goal_of(points: Any, path: Path, tolerance: float, floor: float, resume: object) -> Goal | None:
    """Return what an adaptive evaluation is to reach, None where points are given.

    Raises:
        ModeconnError: a path with several coordinates; a number out of range; a file to resume.
    """
    for name, value in (("tolerance", tolerance), ("floor", floor)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ModeconnError(f"{name} is {value!r}: expected a number above 0")
    if not isinstance(points, str) or points != ADAPTIVE:
        return None
    if path.dim != 1 or isinstance(path, Mixture):
        raise ModeconnError(
            f'points is "adaptive", and t of a {type(path).__name__} has {path.dim} coordinates: '
            "expected a path in one parameter (Line, PolyChain, Bezier), or points that are given"
        )
    if resume is not None:
        raise ModeconnError(
            'resume goes with points that are known beforehand, and points is "adaptive": expected '
            "points=101, or no resume"
        )
    return Goal(float(tolerance), float(floor))


@dataclass
class _DataSet:
    """The values of one data set so far, and the rules that ask for more of them.

    Attributes:
        results: of the passes over all of it.
        searches: by metric; a second one for the rise above the straight line between the ends.
        parts: samples of each part.
    """

    searches: dict[str, list[Search]] = field(default_factory=dict)
    results: list[PathResult] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def known(self, metric: str) -> Known:
        """Return a metric's values so far, t rising."""
        if not self.results:
            return Known(np.zeros(0), np.zeros(0))
        t = np.concatenate([result.t for result in self.results])
        values = np.concatenate([result.values[metric] for result in self.results])
        order = np.argsort(t)
        return Known(t[order], values[order])

    def proposals(self) -> list[float]:
        """Return the points that some rule asks for."""
        asked: list[float] = []
        for metric, searches in self.searches.items():
            known = self.known(metric)
            for search in searches:
                asked += search.propose(known)
        return asked


def adaptive_results(
    request: Request, evaluate: Evaluate, goal: Goal, runner: Runner, report: Progress
) -> dict[str, PathResult]:
    """Find the largest values of all metrics on a path; return all that were evaluated on all data.

    Args:
        request: the arguments, with any points.
        evaluate: evaluates such a request.
        goal: how exact the maxima are to be.
        runner: of the model.
        report: receives the progress, without a total: how many points it takes is not known.
    """
    if not request.head.names:
        raise ModeconnError(
            f'points="{ADAPTIVE}" searches for the largest means over samples, and metrics has '
            'none: expected "loss", say, among them'
        )
    named = dict(request.data) if request.has_names else {"": request.data}
    segments = request.path.segments if isinstance(request.path, PolyChain) else 1
    graph = _graph(request, runner)
    exact = metrics_at_breaks(request, graph, segments)
    rest = [metric for metric in request.head.names if metric not in exact]
    more = FURTHER * max(len(named) * len(rest) - 1, 0) + (segments + 1 if exact else 0)
    case = _Case(request, evaluate, goal, graph, segments, Budget(MOST + more))
    sets = {}
    for name, data in named.items():
        sets[name] = _DataSet({m: [BreakPoints(break_points(segments))] for m in exact})
        if rest:
            _add_searches(sets[name], case, data, rest)
    _search(case, sets, report)
    return {name: _joined(found, goal) for name, found in sets.items()}


@dataclass(frozen=True, eq=False)
class _Case:
    """Holds what all data sets of an evaluation share."""

    request: Request
    evaluate: Evaluate
    goal: Goal
    graph: Graph
    segments: int
    budget: Budget


def _graph(request: Request, runner: Runner) -> Graph:
    """Capture the model on the first batch of the data."""
    evaluated, _ = request.sources()
    inputs, _ = next(iter(next(iter(evaluated.values()))))
    return capture_for(request.path, runner, moved(inputs, request.dtype, request.where))


def _add_searches(found: _DataSet, case: _Case, data: Any, metrics: Iterable[str]) -> None:
    """Evaluate two parts of a data set, if it has any, and make a rule for each metric."""
    request, goal = case.request, case.goal
    breaks, unit = break_points(case.segments), unit_of(case.segments)
    parts = None if case.graph.mixes_rows else parts_of(data)
    if parts is None:
        found.searches |= {metric: [GuidedSearch(breaks, goal)] for metric in metrics}
        return
    grid = np.linspace(0.0, 1.0, round((_GRID - 1) / unit) + 1)
    between = np.abs(grid[:, None] - breaks[None]).min(1) > _SAME
    t = np.sort(np.concatenate([grid[between], breaks]))
    more = _statistics(request, data)
    curves = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is said of all data
        for part in parts:
            asked = replace(request, data=part, points=t, **more)
            curves.append(case.evaluate(asked, lambda done, total: None)[""])
    found.parts = [samples_of(part) for part in parts]
    for metric in metrics:
        one, other = (curve.values[metric] for curve in curves)
        found.searches[metric] = [PartsSearch(t, one, other, goal, case.budget, unit)]


def _statistics(request: Request, data: Any) -> dict[str, Any]:
    """Return the arguments by which the parts' norms are recomputed from a part of their data."""
    if not request.recomputes:
        return {}
    training = request.recompute_data
    if isinstance(training, str):
        training = request.data[training]
    training = data if training is None else training
    parts = parts_of(training, count=1, seed=1)
    if parts is not None:
        return {"recompute_data": parts[0], "recompute_batches": None}
    return {"recompute_data": training, "recompute_batches": _BATCHES}


def _search(case: _Case, sets: Mapping[str, _DataSet], report: Progress) -> None:
    """Evaluate what the rules ask for, pass by pass, until none asks for more."""
    done = 0
    while True:
        asked: list[float] = []
        for found in sets.values():
            asked += found.proposals()
        known = next(iter(sets.values())).known(case.request.head.names[0]).t
        new = _new(np.array(asked), known)
        if not len(new):
            return
        before = done
        case.budget.asked += len(new)

        def passed(more: int, total: int | None, before: int = before) -> None:
            report(before + more, None)

        results = case.evaluate(replace(case.request, points=new), passed)
        for name, result in results.items():
            sets[name].results.append(result)
            done += result.samples
            if not len(known):
                _add_rises(sets[name], case.goal)


def _new(asked: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the points that are not known yet, each once, rising."""
    asked = np.unique(asked)
    if not len(asked):
        return asked
    apart = np.diff(asked, prepend=-np.inf) > _SAME
    if len(known):
        apart &= np.abs(asked[:, None] - known[None]).min(1) > _SAME
    return asked[apart]


def _add_rises(found: _DataSet, goal: Goal) -> None:
    """Search for the rise above the straight line between ends as well, where that is not level."""
    for metric, searches in found.searches.items():
        known, search = found.known(metric), searches[0]
        slope = abs(float(known.values[-1] - known.values[0]))
        if isinstance(search, BreakPoints) or not slope > goal.least(known.height):
            continue
        searches.append(replace(search, chord=True, stopped=""))  # type: ignore[type-var]


def _joined(found: _DataSet, goal: Goal) -> PathResult:
    """Join the passes over a data set to one result, and describe how its maxima were found."""
    results = found.results
    metrics = list(results[0].values)
    known = {metric: found.known(metric) for metric in metrics}
    stops = []
    for metric, searches in found.searches.items():
        texts = dict.fromkeys(search.stopped for search in searches)
        stops.append(f"{metric}: {', '.join(texts)}")
    t = next(iter(known.values())).t
    info = results[-1].info | {
        "points": ADAPTIVE,
        "rule": f"{_rule(found)}, {len(t)} points on all samples in {len(results)} passes",
        "tolerance": goal.tolerance,
        "floor": goal.floor,
        "samples of the parts": ", ".join(map(str, found.parts)),
        "stopped": "; ".join(stops),
    }
    return PathResult(
        t=t,
        values={metric: each.values for metric, each in known.items()},
        samples=results[0].samples,
        passes=sum(result.passes for result in results),
        backend=results[-1].backend,
        seconds=sum(result.seconds for result in results),
        info=info,
    )


def _rule(found: _DataSet) -> str:
    kinds = [type(searches[0]) for searches in found.searches.values()]
    if PartsSearch in kinds:
        return f"two parts of {found.parts[0]} samples"
    if GuidedSearch in kinds:
        return f"guided search from {FIRST} points"
    return "break points"
