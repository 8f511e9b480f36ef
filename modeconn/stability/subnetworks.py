"""Subnetwork stability: the losses of subnetworks trained on random units of an entry layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.backends.precision import without_autocast
from modeconn.connection.features import Features, compute_features
from modeconn.connection.labels import check_range, class_labels
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.recipe import Recipe
from modeconn.connection.subnetworks import Subnetwork, check_entry, initial, why_not_carried
from modeconn.connection.trained_subnetwork import TrainedSubnetwork
from modeconn.connection.training import measure, train_subnetworks
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.parameters import ranking
from modeconn.parameters.fitting import load_for
from modeconn.stability.table import Level, Row, StabilityTable, same_level

Log = Callable[[str], None]

METHODS = ("auto", "readout", "head", "trained")
# Hidden layers of shallow subnetworks: two reach the losses of full depth where one does not.
_SHALLOW_DEPTH = 2
_BATCH = 1024
# Lines of the log for each training.
_LINES = 10


@without_autocast
def subnetwork_stability(
    model: nn.Module,
    params: Any,
    train: Any,
    test: Any = None,
    *,
    fraction: float = 2,
    draws: int = 20,
    entries: Sequence[int] | None = None,
    method: str = "auto",
    recipe: Recipe | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    log: Log | None = None,
) -> StabilityTable:
    """Trains subnetworks on random units of each entry layer and measures their loss and error.

    This is the experiment of Nguyen et al. 2021, section 5. For entry layer l and each draw a
    subnetwork reads |I_l| = n_l - floor(n_l / F) units of layer l, drawn at random (all inputs
    where l = 0), has floor(n_p / F) units in each of its hidden layers p, and is trained from new
    weights. So two consecutive subnetworks always have room side by side. By Theorem 4.1 the
    network is connected to others at the level of the worst entry layer's best draw. All draws of
    an entry layer are trained together, as one batched network.

    Args:
        model: the architecture, a chain of layers.
        params: its weights: a module, state dict or checkpoint file.
        train: training data, as for `modeconn.evaluate`; targets are class labels.
        test: other data that the same subnetworks are evaluated on.
        fraction: F, above 1: 2 for half of the units, 4 for subnetworks of a quarter of the width
            on three quarters.
        draws: subnetworks per entry layer.
        entries: the entry layers, 0 … L-1; all of them if None.
        method: "trained" for subnetworks of full depth, as in the paper; "head" for two hidden
            layers and "readout" for none, on fixed features, whose logits identity carries to the
            top (ReLU alone); "auto" for "head" where all layers are linear with ReLU, and "trained"
            elsewhere.
        recipe: settings of their training; AdamW for 20 epochs if None.
        seed: of the units, the weights and the order of the samples.
        folder: keeps the finished entry layers and the unfinished training: the same call goes on
            from there, to the same table.
        log: called with a line of text now and then.

    Returns:
        a table with a row per entry layer and draw.

    Raises:
        ModeconnError: the model is no chain; settings out of range; identity carrying asked of a
            network without ReLU; bad data; a folder that belongs to another run.
    """
    settings = _Settings(fraction, draws, method, recipe or Recipe(schedule="onecycle"), seed)
    settings.check()
    sets = [data for data in (train, test) if data is not None]
    run = _Run(model, load_for(model, params), sets, settings, log or _silent)
    requested = range(run.chain.length) if entries is None else sorted(set(entries))
    for entry in requested:
        check_entry(run.chain, entry)
    place = None if folder is None else Path(folder)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for entry in requested:
        rows += run.entry(entry, None if place is None else place / f"{run.name}-{entry:02}.json")
    return StabilityTable(rows, run.original)


def _silent(line: str) -> None:
    """Ignores a line of the log."""


@dataclass(frozen=True)
class _Settings:
    """Settings of a run, as `subnetwork_stability` takes them."""

    fraction: float
    draws: int
    method: str
    recipe: Recipe
    seed: int

    def check(self) -> None:
        draws = self.draws
        if not (self.fraction > 1 and math.isfinite(self.fraction)):
            raise ModeconnError(
                f"fraction is {self.fraction}: expected a number above 1, "
                "as a subnetwork has floor(n / fraction) of n units"
            )
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ModeconnError(f"draws is {draws!r}: expected a whole number, at least 1")
        if self.method not in METHODS:
            raise ModeconnError(f"method is {self.method!r}: expected one of {', '.join(METHODS)}")
        self.recipe.check()

    def width(self, units: int) -> int:
        """Returns the number of units that a subnetwork has in a layer of so many."""
        return math.floor(units / self.fraction)


class _Run:
    """Trains the draws of one network's entry layers.

    Args:
        model: the architecture.
        state: its weights.
        sets: training data and, if given, test data.
        settings: checked already.
        say: called with a line of text now and then.
    """

    def __init__(
        self,
        model: nn.Module,
        state: dict[str, Tensor],
        sets: Sequence[Any],
        settings: _Settings,
        say: Log,
    ) -> None:
        self.state, self.sets, self.settings, self.say = state, sets, settings, say
        self.chain = LayerChain.of(model, next(iter(as_batches(sets[0], 16)))[0].float())
        self.method = _resolved(settings.method, self.chain)
        for p in range(1, self.chain.length):
            units = self.chain.widths[p]
            if settings.width(units) < 1:
                raise ModeconnError(
                    f"layer {p} has {units} units: fraction {settings.fraction} leaves none of them"
                )
        self.original = self._original()
        # A file of another kind of run is not taken for this one's.
        self.name = f"{self.method}-{settings.fraction:g}-{settings.draws}-{settings.seed}"

    def _original(self) -> Level:
        """Measures the network itself on all data sets."""
        numbers: list[float] = []
        for data in self.sets:
            numbers += _loss_and_error(self.chain, self.state, data)
        return Level(*numbers)

    def entry(self, entry: int, file: Path | None) -> list[Row]:
        """Returns the rows of an entry layer: those of a finished file, else of a training."""
        if file is not None and file.exists():
            rows = _resumed(file, self.original, entry, self.settings.draws)
            self.say(f"entry layer {entry}: taken from {file}")
            return rows
        rows = self._trained_rows(entry, file)
        if file is not None:
            StabilityTable(rows, self.original).save(file)
        return rows

    def _trained_rows(self, entry: int, file: Path | None) -> list[Row]:
        """Trains all draws of one entry layer."""
        chain, draws = self.chain, self.settings.draws
        features = [compute_features(chain, self.state, data, [entry]) for data in self.sets]
        starts = [self._start(entry, draw) for draw in range(draws)]
        trained = train_subnetworks(
            chain,
            starts,
            [features[0].entry(entry)] * len(starts),
            features[0].labels,
            self.settings.recipe,
            seed=self.settings.seed,
            progress=self._progress(entry),
            checkpoint=None if file is None else file.with_suffix(".training"),
        )
        rows = []
        for draw, result in enumerate(trained):
            tested = self._tested(result, features[1:])
            rows.append(
                Row(entry, draw, result.loss, result.error, *tested, self.method, result.seconds)
            )
        best = rows[ranking.order([row.train_loss for row in rows])[0]]
        self.say(
            f"entry layer {entry}: best of {draws} draws has training loss {best.train_loss:.4g}"
        )
        return rows

    def _progress(self, entry: int) -> Callable[[int, int], None]:
        def show(done: int, epochs: int) -> None:
            if done % max(1, epochs // _LINES) == 0:
                self.say(f"entry layer {entry}: epoch {done} of {epochs}")

        return show

    def _tested(
        self, result: TrainedSubnetwork, features: Sequence[Features]
    ) -> tuple[float, float]:
        """Measures a subnetwork on the test data, if there are any."""
        if not features:
            return math.nan, math.nan
        sub = result.subnetwork
        return measure(self.chain, sub, features[0].entry(sub.entry), features[0].labels)

    def _start(self, entry: int, draw: int) -> Subnetwork:
        """Draws the kept units and the initial weights, from seed, entry layer and draw alone."""
        chain, settings = self.chain, self.settings
        word = np.random.SeedSequence([settings.seed, entry, draw]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(word) >> 1)
        units = chain.widths[entry]
        kept = torch.arange(units)
        if entry:
            order = torch.randperm(units, generator=generator)
            kept = order[settings.width(units) :].sort().values
        widths = [settings.width(chain.widths[p]) for p in range(entry + 1, chain.length)]
        depth = {"trained": len(widths), "head": _SHALLOW_DEPTH, "readout": 0}[self.method]
        return initial(chain, entry, kept, widths[:depth], generator)


def _resolved(method: str, chain: LayerChain) -> str:
    """Returns the method that "auto" stands for, and any other that the chain bears."""
    reason = why_not_carried(chain, 1)
    if method == "auto":
        return "trained" if reason else "head"
    if method != "trained" and reason is not None:
        raise ModeconnError(
            f'method="{method}" needs identity to carry logits to the top: {reason}; use "trained"'
        )
    return method


def _loss_and_error(chain: LayerChain, state: dict[str, Tensor], data: Any) -> tuple[float, float]:
    """Measures the network's own loss and error, summed in float64."""
    loss, wrong, samples = 0.0, 0, 0
    with torch.no_grad():
        for logits, labels in _logits(chain, state, data):
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            wrong += int((logits.argmax(1) != labels).sum())
            samples += len(labels)
    return loss / samples, wrong / samples


def _logits(
    chain: LayerChain, state: dict[str, Tensor], data: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Computes logits batch by batch, and checks the labels beside them."""
    like = state[chain.layers[-1].weight]
    for x, y in as_batches(data, _BATCH):
        logits, labels = chain.run(state, x.to(like)), class_labels(y).to(like.device)
        check_range(labels, chain.classes, chain.name)
        yield logits, labels


def _resumed(file: Path, original: Level, entry: int, draws: int) -> list[Row]:
    """Reads the rows of a finished entry layer."""
    table = StabilityTable.load(file)
    same = same_level(table.original, original)
    if not same or table.entries != [entry] or len(table) != draws:
        raise ModeconnError(
            f"{file} is of another network, data set or run: "
            f"expected {draws} draws of entry layer {entry}"
        )
    return table.rows
