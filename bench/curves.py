"""The step of a curve's training: `fit_curve` against Garipov's as plain PyTorch writes it.

Garipov's step makes the network at t out of the control points under autograd and calls the model
with it (`functional_call`). A step of the network alone, without a curve, is the least that any of
them takes. All have batches of the same size, Adam, one bend and t drawn uniformly; the last
contender is `fit_curve` as it is by default, aligned and with t by importance.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from alignment import named
from table import machine
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import modeconn as mc
import workloads
from modeconn.parameters.paths import Path
from modeconn.parameters.state import State

LR, SIZE = 1e-3, 128
# Seconds of a step, and the curve that came out.
Taken = tuple[float, Path | None]


@dataclass(frozen=True)
class Pair:
    """Two networks to train a curve between, and the data."""

    model: nn.Module
    a: State
    b: State
    x: Tensor
    y: Tensor
    steps: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches, drawn as an epoch is."""
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(self.y), generator=generator)
            for rows in order[: len(order) // SIZE * SIZE].split(SIZE):
                yield self.x[rows], self.y[rows]


def compare(work: workloads.Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Times steps of all contenders, which take turns, and evaluates the curves that they make."""
    a, b = (named(work.model, dict(point)) for point in work.path.control_points)
    pair = Pair(work.model, a, b, work.x, work.y, options.steps)
    contenders: dict[str, Callable[[Pair], Taken]] = {
        "modeconn, t uniform": lambda pair: ours(pair, align=False, t="uniform"),
        "Garipov's step": garipov,
        "a step of the network alone": alone,
        "modeconn, aligned, by importance": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    curves: dict[str, Path | None] = {}
    for _, (name, run) in itertools.product(range(options.repeats), contenders.items()):
        taken, curves[name] = run(pair)
        seconds[name].append(taken)
    report = {
        "workload": f"{work.name}: curve of {pair.steps} steps",
        "source": work.source,
        "machine": machine(),
        "seconds_per_step": seconds,
        "highest": {n: highest(pair, curve) for n, curve in curves.items() if curve is not None},
    }
    show(report)
    return report


def ours(pair: Pair, **more: Any) -> Taken:
    """Trains by `fit_curve`."""
    fit = mc.fit_curve(
        *(pair.model, pair.a, pair.b, (pair.x, pair.y)),
        **{"steps": pair.steps, "lr": LR, "batch_size": SIZE, "points": 2, **more},
    )
    return fit.seconds / pair.steps, fit.path


def garipov(pair: Pair) -> Taken:
    """Trains the bend with autograd through the control points."""
    model = copy.deepcopy(pair.model).train()
    keys = [key for key, _ in model.named_parameters()]
    bend = {k: ((pair.a[k] + pair.b[k]) / 2).requires_grad_(True) for k in keys}
    adam = torch.optim.Adam(bend.values(), LR)
    batches, draws = pair.batches(), torch.Generator().manual_seed(0)
    begun = time.perf_counter()
    for _ in range(pair.steps):
        t = float(torch.rand((), generator=draws))
        c = (1 - t) ** 2, 2 * t * (1 - t), t**2
        theta = {k: c[0] * pair.a[k] + c[1] * bend[k] + c[2] * pair.b[k] for k in keys}
        x, y = next(batches)
        adam.zero_grad()
        F.cross_entropy(functional_call(model, theta, (x,)), y).backward()
        adam.step()
    taken = (time.perf_counter() - begun) / pair.steps
    point = pair.a | {k: value.detach() for k, value in bend.items()}
    return taken, mc.Bezier([pair.a, point, pair.b])


def alone(pair: Pair) -> Taken:
    """Trains the network itself, from its first end."""
    model = copy.deepcopy(pair.model).train()
    model.load_state_dict(pair.a)
    adam, batches = torch.optim.Adam(model.parameters(), LR), pair.batches()
    begun = time.perf_counter()
    for _ in range(pair.steps):
        x, y = next(batches)
        adam.zero_grad()
        F.cross_entropy(model(x), y).backward()
        adam.step()
    return (time.perf_counter() - begun) / pair.steps, None


def highest(pair: Pair, curve: Path) -> dict[str, float]:
    """Returns the largest loss and error along a curve, norms' statistics recomputed."""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in pair.model.modules())
    buffers = "recompute" if norms else "interpolate"
    result = mc.evaluate(pair.model, curve, (pair.x, pair.y), 21, buffers=buffers)
    return {metric: float(result.metric(metric).max()) for metric in ("loss", "error")}


def show(report: dict[str, Any]) -> None:
    """Prints the table of a report."""
    best = {name: min(times) for name, times in report["seconds_per_step"].items()}
    first = next(iter(best))
    print(f"\n{report['workload']} ({report['source']})")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"\n{'':<34}{'ms per step':>12}{'spread':>8}{'ratio to ours':>15}{'max loss, error':>18}")
    for name, value in best.items():
        spread = max(report["seconds_per_step"][name]) / value - 1
        line = f"{name:<34}{1e3 * value:>12.2f}{spread:>8.0%}{value / best[first]:>14.2f}x"
        found = report["highest"].get(name)
        print(line + (f"{found['loss']:>10.3f} {100 * found['error']:>5.1f} %" if found else ""))
