"""Subnetwork stability: what subnetworks reach when they are trained on a random part of an entry layer's units."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.connection.chain import Chain
from modeconn.connection.features import compute_features
from modeconn.connection.subnetworks import Subnetwork, check_entry, initial, why_not_carried
from modeconn.connection.training import Recipe, measure, train_subnetworks
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.stability.table import Level, Row, StabilityTable

Log = Callable[[str], None]

METHODS = ("auto", "readout", "head", "trained")
# Hidden layers of a head: two reach what the theory needs where one makes the bound.
_HEAD_DEPTH = 2
_ROWS = 1024


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
    """Loss and error of subnetworks trained on random units of each entry layer (Nguyen et al. 2021, section 5).

    For entry layer l and each draw a subnetwork reads |I_l| = n_l - floor(n_l / F) units of layer
    l, drawn at random (all inputs where l = 0), has floor(n_p / F) units in each of its hidden
    layers p, and is trained from new weights. So two consecutive subnetworks always have room side
    by side. The network is connected to others at the level of the worst entry layer's best draw.
    All draws of an entry layer are trained together, as one batched network.

    Args:
        model: the architecture, a chain of layers.
        params: its weights: a module, state dict or checkpoint file.
        train: training data, as for `modeconn.evaluation.evaluator`; targets are class labels.
        test: other data that the same subnetworks are evaluated on.
        fraction: F, above 1: 2 for half of the units, 4 for subnetworks of a quarter of the width
            on three quarters.
        draws: subnetworks per entry layer.
        entries: the entry layers, 0 … L-1; all of them if None.
        method: "trained" for subnetworks of full depth, as in the paper; "head" for two hidden
            layers and "readout" for none, on fixed features, whose logits identity carries to the
            top (ReLU alone); "auto" for heads where all layers are linear with ReLU, and full depth
            elsewhere.
        recipe: how they are trained; AdamW for 20 epochs if None.
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
    run = _Run(
        model,
        params,
        train,
        test,
        fraction,
        draws,
        method,
        recipe or Recipe(schedule="onecycle"),
        seed,
    )
    wanted = range(run.chain.length) if entries is None else sorted(set(entries))
    for entry in wanted:
        check_entry(run.chain, entry)
    say = log or (lambda line: None)
    place = None if folder is None else Path(folder)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for entry in wanted:
        file = None if place is None else place / f"{run.name}-{entry:02}.json"
        if file is not None and file.exists():
            found = _resumed(file, run.original, entry, draws)
            say(f"entry layer {entry}: taken from {file}")
        else:
            found = run.entry(entry, file, say)
            if file is not None:
                StabilityTable(found, run.original).save(file)
        rows += found
    return StabilityTable(rows, run.original)


class _Run:
    """One network, its data and the settings."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        train: Any,
        test: Any,
        fraction: float,
        draws: int,
        method: str,
        recipe: Recipe,
        seed: int,
    ) -> None:
        if not (fraction > 1 and math.isfinite(fraction)):
            raise ModeconnError(
                f"fraction is {fraction}: expected a number above 1, as a subnetwork has floor(n / fraction) of n units"
            )
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ModeconnError(f"draws is {draws!r}: expected a whole number, at least 1")
        if method not in METHODS:
            raise ModeconnError(f"method is {method!r}: expected one of {', '.join(METHODS)}")
        recipe.check()
        self.sets = [data for data in (train, test) if data is not None]
        self.state = states.load(params)
        self.chain = Chain.of(model, next(iter(as_batches(train, 16)))[0].float())
        reason = why_not_carried(self.chain, 1)
        if method in ("head", "readout") and reason is not None:
            raise ModeconnError(
                f'method="{method}" needs identity to carry logits to the top: {reason}; use "trained"'
            )
        self.method = method if method != "auto" else "trained" if reason else "head"
        self.fraction, self.draws, self.recipe, self.seed = fraction, draws, recipe, seed
        for p in range(1, self.chain.length):
            if math.floor(self.chain.widths[p] / fraction) < 1:
                raise ModeconnError(
                    f"layer {p} has {self.chain.widths[p]} units: fraction {fraction} leaves none of them"
                )
        self.original = self._original()
        # A file of another kind of run is not taken for this one's.
        self.name = f"{self.method}-{fraction:g}-{draws}-{seed}"

    def _original(self) -> Level:
        numbers = [_level(self.chain, self.state, data) for data in self.sets]
        return Level(*(value for pair in numbers for value in pair))

    def entry(self, entry: int, file: Path | None, say: Log) -> list[Row]:
        """All draws of one entry layer."""
        chain = self.chain
        features = [compute_features(chain, self.state, data, [entry]) for data in self.sets]
        starts = [self._start(entry, draw) for draw in range(self.draws)]
        h, labels = features[0].entry(entry), features[0].labels

        def show(done: int, epochs: int) -> None:
            if done % max(1, epochs // 10) == 0:
                say(f"entry layer {entry}: epoch {done} of {epochs}")

        checkpoint = None if file is None else file.with_suffix(".training")
        trained = train_subnetworks(
            chain,
            starts,
            [h] * len(starts),
            labels,
            self.recipe,
            seed=self.seed,
            progress=show,
            checkpoint=checkpoint,
        )
        rows = []
        for draw, result in enumerate(trained):
            tested = (math.nan, math.nan)
            if len(features) > 1:
                tested = measure(
                    chain, result.subnetwork, features[1].entry(entry), features[1].labels
                )
            rows.append(
                Row(entry, draw, result.loss, result.error, *tested, self.method, result.seconds)
            )
        best = min(rows, key=lambda row: row.train_loss)
        say(
            f"entry layer {entry}: best of {self.draws} draws has training loss {best.train_loss:.4g}"
        )
        return rows

    def _start(self, entry: int, draw: int) -> Subnetwork:
        chain = self.chain
        word = np.random.SeedSequence([self.seed, entry, draw]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(word) >> 1)
        units = chain.widths[entry]
        kept = torch.arange(units)
        if entry:
            kept = (
                torch.randperm(units, generator=generator)[math.floor(units / self.fraction) :]
                .sort()
                .values
            )
        widths = [
            math.floor(chain.widths[p] / self.fraction) for p in range(entry + 1, chain.length)
        ]
        depth = {"trained": len(widths), "head": _HEAD_DEPTH, "readout": 0}[self.method]
        return initial(chain, entry, kept, widths[:depth], generator)


def _level(chain: Chain, state: dict[str, Tensor], data: Any) -> tuple[float, float]:
    """The network's own loss and error."""
    like = state[chain.layers[-1].weight]
    loss, wrong, samples = 0.0, 0, 0
    with torch.no_grad():
        for x, y in as_batches(data, _ROWS):
            if y.is_floating_point() or y.dim() != 1:
                raise ModeconnError(
                    f"targets have shape {list(y.shape)} and dtype {y.dtype}: class labels are integers [N]"
                )
            logits, labels = chain.run(state, x.to(like)), y.long().to(like.device)
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= chain.classes:
                raise ModeconnError(
                    f"labels run from {low} to {high}, but {chain.name} has {chain.classes} outputs"
                )
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            wrong += int((logits.argmax(1) != labels).sum())
            samples += len(labels)
    return loss / samples, wrong / samples


def _resumed(file: Path, original: Level, entry: int, draws: int) -> list[Row]:
    """The rows of a finished entry layer."""
    table = StabilityTable.load(file)
    same = all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(vars(table.original).values(), vars(original).values())
    )
    if not same or table.entries != [entry] or len(table) != draws:
        raise ModeconnError(
            f"{file} is of another network, data set or run: expected {draws} draws of entry layer {entry}"
        )
    return table.rows
