"""Estimates the time of an experiment's training from a few steps of each kind."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from modeconn import models
from modeconn.connection.features import compute_features
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import initial
from modeconn.connection.training import train_subnetworks
from modeconn.data import datasets
from modeconn.experiments.settings import Experiment, Join, Sweep, settings
from modeconn.training.train import train

# Steps of a timed epoch, and epochs: the second one is timed, the first warms up, and the last
# measures the exact loss, too.
_STEPS, _EPOCHS = 2, 3
_SAMPLE = 16  # rows that show the shapes of a network's values
# Draws are timed together where their weights are no more numbers than this (80 MB), and one by
# itself where they are: a few steps of large subnetworks would take minutes.
_TOGETHER = 20_000_000
# Lengthens the schedule of a training that ends early, so that its last epochs are never reached.
_UNREACHED = 20


@dataclass(frozen=True)
class Estimate:
    """Seconds of training to the last epoch, an upper bound: training ends once no error is left.

    Attributes:
        solutions: of the networks that are trained first.
        subnetworks: of all draws at all entry layers; 0 for a path, whose search takes minutes.
    """

    solutions: float = 0.0
    subnetworks: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.solutions + other.solutions, self.subnetworks + other.subnetworks)


def estimate(
    name: str,
    root: Any = None,
    *,
    quick: bool = True,
    solutions: int | None = None,
    given: int = 0,
) -> Estimate:
    """Estimates how long the trainings of an experiment take at most on this machine.

    This is seconds to minutes of work itself, and holds for the machine as it is now.

    Args:
        name, root, quick: as for `reproduce`.
        solutions: how many networks there are, as many as the settings say if None.
        given: how many of them are trained already.
    """
    setting = settings(name, quick)
    base = setting if isinstance(setting, Experiment) else setting.base
    count = given or solutions or base.solutions
    if isinstance(setting, Sweep):
        total = Estimate()
        for width in setting.widths:
            one = _experiment(setting.at(width), root, 1)
            total += Estimate(count * one.solutions, count * one.subnetworks)
        return total
    if isinstance(setting, Join):
        return _experiment(setting.base, root, 2 - given, subnetworks=False)
    one = _experiment(setting, root, 0 if given else 1)
    return Estimate(count * one.solutions, count * one.subnetworks)


def _experiment(
    setting: Experiment, root: Any, solutions: int, *, subnetworks: bool = True
) -> Estimate:
    """Estimates the training of so many solutions and, if asked, of the subnetworks of one."""
    data = datasets.load(setting.data, root, "train", limit=setting.limit)
    model = models.build(setting.model)
    found = Estimate(solutions=solutions * _solution(setting, model, data) if solutions else 0.0)
    if not subnetworks:
        return found
    x, _ = data.slice(0, min(len(data), _SAMPLE))
    chain = LayerChain.of(model, x.float())
    for fraction, entry in itertools.product(setting.fractions, range(chain.length)):
        seconds = _draws(setting, model, chain, data, entry, fraction)
        found += Estimate(subnetworks=seconds)
    return found


def _solution(setting: Experiment, model: nn.Module, data: datasets.Images) -> float:
    """Times the training of one solution."""
    x, y = data.slice(0, min(len(data), _STEPS * setting.solution.batch_size))
    how = asdict(replace(setting.solution, epochs=_EPOCHS))
    epoch = _second_epoch(lambda tick: train(model, (x, y), **how, log=lambda _: tick()))
    return epoch * setting.solution.epochs * len(data) / len(x)


def _draws(
    setting: Experiment,
    model: nn.Module,
    chain: LayerChain,
    data: datasets.Images,
    entry: int,
    fraction: float,
) -> float:
    """Times the training of all draws of an entry layer."""
    recipe, draws = setting.recipe_of(fraction, entry), setting.draws_of(entry)
    x, y = data.slice(0, min(len(data), _STEPS * recipe.batch_size))
    h = compute_features(chain, model.state_dict(), (x, y), [entry]).entry(entry)
    units = chain.widths[entry]
    kept = torch.arange(units - math.floor(units / fraction) if entry else units)
    widths = [math.floor(chain.widths[p] / fraction) for p in range(entry + 1, chain.length)]
    start = initial(chain, entry, kept, widths, torch.Generator().manual_seed(0))
    together = draws if draws * start.parameters <= _TOGETHER else 1
    short = replace(recipe, epochs=_EPOCHS * _UNREACHED, stop_loss=None, stop_error=None)

    def run(tick: Callable[[], None]) -> None:
        def progress(done: int, _: int) -> None:
            tick()
            if done == _EPOCHS:
                raise _Enough

        starts, features = [start] * together, [h] * together
        with contextlib.suppress(_Enough):
            train_subnetworks(chain, starts, features, y.long(), short, progress=progress)

    epoch = _second_epoch(run) * draws / together
    return epoch * recipe.epochs * len(data) / len(x)


class _Enough(Exception):
    """Raised to end a training once its epochs are timed."""


def _second_epoch(run: Callable[[Callable[[], None]], object]) -> float:
    """Runs a training that calls back after each epoch; returns the seconds of its second."""
    ticks: list[float] = []
    run(lambda: ticks.append(time.perf_counter()))
    return ticks[1] - ticks[0]
