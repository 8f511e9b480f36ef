"""How long an experiment's training takes at most: a few steps of each kind, timed on this machine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modeconn import models
from modeconn.connection.features import compute_features
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import initial
from modeconn.connection.training import train_subnetworks
from modeconn.data import datasets
from modeconn.experiments.settings import Experiment, Join, Sweep, settings
from modeconn.training.train import train

# Steps of an epoch that is timed, the second of three: the first warms up, and the last measures.
_STEPS, _EPOCHS = 2, 3
# Draws are timed together where they are no more than so many numbers, and one by itself where they
# are.
_TOGETHER = 20_000_000


@dataclass(frozen=True)
class Estimate:
    """Seconds of training to the last epoch; a training ends before it once no error is left.

    Attributes:
        solutions: of the networks that are trained first.
        subnetworks: of all draws at all entry layers; 0 for a path, whose search takes minutes.
    """

    solutions: float = 0.0
    subnetworks: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.solutions + other.solutions, self.subnetworks + other.subnetworks)


def estimate(name: str, root: Any = None, *, quick: bool = True, solutions: int = 0) -> Estimate:
    """How long the trainings of an experiment take at most on this machine, as it is now; seconds to minutes of work.

    Args:
        name, root, quick: as for `reproduce`.
        solutions: how many trained networks are given.
    """
    setting = settings(name, quick)
    if isinstance(setting, Sweep):
        return sum(
            (_experiment(setting.at(width), root, 1) for width in setting.widths), Estimate()
        )
    if isinstance(setting, Join):
        return _experiment(setting.base, root, 2 - solutions, subnetworks=False)
    return _experiment(setting, root, 1 - solutions)


def _experiment(
    setting: Experiment, root: Any, solutions: int, *, subnetworks: bool = True
) -> Estimate:
    data = datasets.load(setting.data, root, "train", limit=setting.limit)
    model = models.build(setting.model)
    x, y = data.slice(0, min(len(data), _STEPS * setting.solution.batch_size))
    how = replace(setting.solution, epochs=_EPOCHS)
    seconds = 0.0
    if solutions:
        seconds = _epoch(lambda tick: train(model, (x, y), **asdict(how), log=lambda _: tick()))
        seconds *= solutions * setting.solution.epochs * len(data) / len(x)
    found = Estimate(solutions=seconds)
    if not subnetworks:
        return found
    chain = LayerChain.of(model, x.float())
    state = dict(model.state_dict())
    for fraction in setting.fractions:
        for entry in range(chain.length):
            recipe = setting.recipes.get(entry, setting.recipe)
            rows = slice(0, min(len(data), _STEPS * recipe.batch_size))
            x, y = data.slice(rows.start, rows.stop)
            h = compute_features(chain, state, (x, y), [entry]).entry(entry)
            epoch = _draws(chain, entry, fraction, setting.draws, h, y.long(), recipe)
            found += Estimate(subnetworks=epoch * recipe.epochs * len(data) / len(x))
    return found


def _draws(
    chain: LayerChain,
    entry: int,
    fraction: float,
    draws: int,
    h: Tensor,
    labels: Tensor,
    recipe: Any,
) -> float:
    """Seconds of an epoch on a few rows, for all draws of an entry layer."""
    units = chain.widths[entry]
    kept = torch.arange(units - math.floor(units / fraction) if entry else units)
    widths = [math.floor(chain.widths[p] / fraction) for p in range(entry + 1, chain.length)]
    start = initial(chain, entry, kept, widths, torch.Generator().manual_seed(0))
    together = draws if draws * start.parameters <= _TOGETHER else 1
    short = replace(recipe, epochs=_EPOCHS * 20, stop_loss=None, stop_error=None)

    class Enough(Exception):
        pass

    def run(tick: Callable[[], None]) -> None:
        def progress(done: int, _: int) -> None:
            tick()
            if done == _EPOCHS:
                raise Enough

        with contextlib.suppress(Enough):
            train_subnetworks(
                chain, [start] * together, [h] * together, labels, short, progress=progress
            )

    return _epoch(run) * draws / together


def _epoch(run: Callable[[Callable[[], None]], object]) -> float:
    """Seconds between the first two calls back."""
    ticks: list[float] = []
    run(lambda: ticks.append(time.perf_counter()))
    return ticks[1] - ticks[0]
