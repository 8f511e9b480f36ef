"""Dropout stability: a network's loss without random units of its layers, not retrained."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.connection.labels import class_labels
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import check_entry
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.outputs import PlannedForward
from modeconn.parameters.fitting import load_for
from modeconn.parameters.paths import PolyChain
from modeconn.stability.outputs import Outputs
from modeconn.stability.scale import best_scales, losses_and_errors
from modeconn.stability.table import Level, Row, StabilityTable

# done, total: samples of all passes; total is None where the data do not say.
Progress = Callable[[int, "int | None"], None]
State = Mapping[str, Tensor]

# Bytes for the masked weights of the networks of one pass, and as much for their outputs before
# they go to a file.
MEMORY_BUDGET = 1 << 30
_BATCH = 1024


@dataclass(frozen=True)
class _Settings:
    """Settings of a run, as `dropout_stability` takes them."""

    fraction: float
    seed: int
    precision: str
    budget: int

    def check(self, draws: int) -> None:
        if not (self.fraction > 1 and math.isfinite(self.fraction)):
            raise ModeconnError(
                f"fraction is {self.fraction}: expected a number above 1, "
                "as floor(n / fraction) of a layer's n units are removed"
            )
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ModeconnError(f"draws is {draws!r}: expected a whole number, at least 1")
        if self.budget < 1:
            raise ModeconnError(
                f"memory_budget is {self.budget}: expected a number of bytes, at least 1"
            )


@dataclass(frozen=True, eq=False)
class _Network:
    """A network, its layers and a few rows of its input."""

    model: nn.Module
    chain: LayerChain
    state: State
    sample: Tensor


@without_autocast
def dropout_stability(
    model: nn.Module,
    params: Any,
    train: Any,
    test: Any = None,
    *,
    fraction: float = 2,
    draws: int = 20,
    entries: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    precision: str = "float32",
    progress: Progress | None = None,
    memory_budget: int | None = None,
) -> StabilityTable:
    """Evaluates a network with random units of a layer and of all later layers removed.

    This is the dropout stability of Kuditipudi et al. 2019, to compare with the subnetworks of
    Nguyen et al. 2021. For layer l every hidden layer p ≥ l keeps n_p - floor(n_p / fraction) of
    its n_p units, drawn at random, with their weights and biases; the outputs are multiplied by
    the one scalar that makes the training loss smallest. So fraction=2 removes half of the units
    and fraction=4 a quarter: the room that the theory's |I_l| = n_l - floor(n_l / F) leaves to the
    kept units, so the dropout network of layer l reads as many units of it as a subnetwork with
    entry layer l does. Units of a convolution are its channels. Layers run from 1 to L-1, as in
    Kuditipudi et al., definition 1: inputs are not removed.

    The published code of Nguyen et al. 2021 leaves the random biases of a fresh network in place of
    the kept units' biases; they are kept here, which can only help.

    All draws are evaluated together in one pass over each data set, as breakpoints of one path:
    what the networks share is computed once, and removed units are not computed. More passes are
    made where the networks' weights outgrow the memory budget. The draws of an entry layer depend
    on the seed, the entry layer and the draw's number alone.

    Args:
        model: the architecture, a chain of layers.
        params: its weights: a module, state dict or checkpoint file.
        train: training data, as for `modeconn.evaluate`; targets are class labels.
        test: other data that the same networks, scales included, are evaluated on.
        fraction: F, above 1.
        draws: networks per entry layer.
        entries: the layers l, 1 … L-1; all of them if None.
        seed: of the draws.
        batch_size: rows per batch, 1024 by default.
        precision: "float32" or "float64", of the networks; sums over samples are in float64.
        progress: called with (samples done, samples in all passes or None).
        memory_budget: bytes for the networks' weights, and as much again for their outputs, 1 GiB
            by default.

    Returns:
        a table with a row per entry layer and draw, `scale` among its columns. There may be no best
            scale, where the network is right on every sample: then one is taken that makes the
            training loss at most 1e-6.

    Raises:
        ModeconnError: the model is no chain; fraction, draws or entries out of range; data that are
            empty, do not fit or can be read only once.
    """
    budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    settings = _Settings(fraction, seed, precision, budget)
    settings.check(draws)
    state = load_for(model, params)
    sets = [as_batches(data, batch_size or _BATCH) for data in (train, test) if data is not None]
    sample = _first_rows(sets[0])
    chain = LayerChain.of(model, sample)
    requested = range(1, chain.length) if entries is None else sorted(set(entries))
    for entry in requested:
        check_entry(chain, entry)
        if entry == 0:
            raise ModeconnError(
                "entry layer 0: dropout networks keep all inputs; "
                f"expected layers from 1 to {chain.length - 1}"
            )
    keys = list(itertools.product(requested, range(draws)))
    run = _Run(_Network(model, chain, state, sample), sets, settings, progress)
    original, rows = run.all(keys)
    return StabilityTable(rows, original)


def _first_rows(data: Batches) -> Tensor:
    """Reads a few rows of input, and checks the labels beside them."""
    for inputs, targets in data:
        class_labels(targets)
        first: Tensor = inputs[:2].clone()
        return first
    raise ModeconnError("data: holds no samples; expected at least one")


# -- masks -----------------------------------------------------------------------------------------


def kept_from(
    chain: LayerChain, entry: int, draw: int, fraction: float, seed: int
) -> dict[int, Tensor]:
    """Draws the units that every hidden layer p ≥ entry keeps, rising, int64."""
    kept = {}
    for p in range(entry, chain.length):
        words = np.random.SeedSequence([seed, entry, draw, p]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]) >> 1)
        units = chain.widths[p]
        order = torch.randperm(units, generator=generator)
        kept[p] = order[math.floor(units / fraction) :].sort().values
    return kept


def without_units(chain: LayerChain, state: State, kept: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Sets the outgoing weights of the units that are not kept to 0; other tensors are shared."""
    masked = dict(state)
    for p, units in kept.items():
        layer = chain.layer(p + 1)
        removed = torch.ones(chain.widths[p], dtype=torch.bool)
        removed[units] = False
        if bool(removed.any()):
            weight = state[layer.weight].clone(memory_format=torch.contiguous_format)
            layer.by_unit(weight)[:, removed.to(weight.device)] = 0
            masked[layer.weight] = weight
    return masked


# -- the passes ------------------------------------------------------------------------------------


class _Run:
    """Evaluates masked networks, as many at a time as the budget holds."""

    def __init__(
        self,
        network: _Network,
        sets: Sequence[Batches],
        settings: _Settings,
        progress: Progress | None,
    ) -> None:
        self.network, self.chain, self.state = network, network.chain, network.state
        self.sets, self.settings, self.progress = sets, settings, progress
        self.done, self.passes = 0, 1

    def all(self, keys: Sequence[tuple[int, int]]) -> tuple[Level, list[Row]]:
        """Returns the network's own level, and a row for each entry layer and draw."""
        groups = self._groups(keys)
        self.passes = len(groups)
        original: Level | None = None
        rows: list[Row] = []
        for group in groups:
            began = time.perf_counter()
            networks = [without_units(self.chain, self.state, self._kept(*key)) for key in group]
            # The network itself comes first, with its own scale of 1.
            scales, levels = self._evaluate([dict(self.state), *networks])
            original = original or levels[0]
            seconds = (time.perf_counter() - began) / max(1, len(group))
            for (entry, draw), scale, level in zip(group, scales[1:], levels[1:]):
                numbers = (level.train_loss, level.train_error, level.test_loss, level.test_error)
                rows.append(Row(entry, draw, *numbers, "dropout", seconds, scale))
        if original is None:
            raise ModeconnError("entries is empty: expected at least one entry layer")
        return original, rows

    def _kept(self, entry: int, draw: int) -> dict[int, Tensor]:
        settings = self.settings
        return kept_from(self.chain, entry, draw, settings.fraction, settings.seed)

    def _bytes(self, entry: int) -> int:
        """Bytes of one network's masked weights, and of the part that is cut out of them."""
        weights = [self.state[layer.weight] for layer in self.chain.layers[entry + 1 :]]
        return 2 * sum(weight.numel() * weight.element_size() for weight in weights)

    def _groups(self, keys: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Splits the networks into groups whose weights fit the budget together."""
        groups: list[list[tuple[int, int]]] = []
        size = 0
        for entry, draw in keys:
            own = self._bytes(entry)
            if not groups or size + own > self.settings.budget:
                groups.append([])
                size = 0
            groups[-1].append((entry, draw))
            size += own
        return groups

    def _evaluate(self, networks: list[dict[str, Tensor]]) -> tuple[list[float], list[Level]]:
        """Returns scale and level of each network, by one pass over each data set.

        The first one's scale is 1.
        """
        # At breakpoint k of a chain one control point alone is active, so each network is planned
        # by itself and yet shares equal values with the others. The last control point is repeated,
        # or the last two would share a segment.
        path = PolyChain([*networks, networks[-1]])
        t = np.arange(len(networks)) / len(networks)
        model, sample = self.network.model, self.network.sample
        forward = PlannedForward(model, path, t, sample, precision=self.settings.precision)
        measures: list[Tensor] = []
        scales = torch.ones(len(networks), dtype=torch.float64)
        with tempfile.TemporaryDirectory(prefix="modeconn-outputs-") as folder:
            for index, data in enumerate(self.sets):
                file = Path(folder) / f"{index}.bin"
                outputs = Outputs(forward, data, self.chain.classes, file, self.settings.budget)
                outputs.read(self._report)
                if index == 0:
                    scales[1:] = best_scales(outputs, skip=1)
                measures += losses_and_errors(outputs, scales)
        columns = [measure.tolist() for measure in measures]
        return scales.tolist(), [Level(*values) for values in zip(*columns)]

    def _report(self, rows: int) -> None:
        """Reports samples done and samples of all passes, None where a data set does not say."""
        self.done += rows
        if self.progress is None:
            return
        known = [data.samples for data in self.sets if data.samples is not None]
        complete = len(known) == len(self.sets)
        self.progress(self.done, self.passes * sum(known) if complete else None)
