"""Dropout stability: what is left of a network when random units of its later layers are removed and nothing is retrained."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.connection.chain import Chain
from modeconn.connection.subnetworks import check_entry
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.outputs import Forward
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain
from modeconn.stability.scale import Chunk, best_scales, losses_and_errors
from modeconn.stability.table import Level, Row, StabilityTable

# done, total: samples of all passes; total is None where the data do not say.
Progress = Callable[[int, "int | None"], None]
State = Mapping[str, Tensor]

# Bytes for the masked weights of the networks of one pass, and as much for their outputs before
# they go to a file.
MEMORY_BUDGET = 1 << 30
_ROWS = 1024


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
    """Loss and error of a network with units of all layers after an entry layer removed at random (Kuditipudi et al. 2019).

    For entry layer l every hidden layer p > l keeps n_p - floor(n_p / fraction) of its n_p units,
    drawn at random, with their weights and biases; the outputs are multiplied by the one scalar
    that makes the training loss smallest. So fraction=2 removes half of the units and fraction=4 a
    quarter: the room that the theory's |I_l| = n_l - floor(n_l / F) leaves to the kept units. Units
    of a convolution are its channels. At l = L-1 nothing is removed: every draw is the network
    itself with the best scale. Entry layer l here is layer l+1 in Kuditipudi et al., definition 1.

    The published code of Nguyen et al. 2021 leaves the random biases of a fresh network in place of
    the kept units' biases; they are kept here, which can only help.

    All draws are evaluated together in one pass over each data set, as breakpoints of one path:
    what the networks share is computed once, and removed units are not computed. More passes are
    made where the networks' weights outgrow the memory budget. The draws of an entry layer depend
    on the seed, the entry layer and the draw's number alone.

    Args:
        model: the architecture, a chain of layers.
        params: its weights: a module, state dict or checkpoint file.
        train: training data, as for `modeconn.evaluation.evaluator`; targets are class labels.
        test: other data that the same networks, scales included, are evaluated on.
        fraction: F, above 1.
        draws: networks per entry layer.
        entries: the entry layers, 0 … L-1; all of them if None.
        seed: of the draws.
        batch_size: rows per batch, 1024 by default.
        precision: "float32" or "float64", of the networks; sums over samples are in float64.
        progress: called with (samples done, samples in all passes or None).
        memory_budget: bytes for the networks' weights, and as much again for their outputs, 1 GiB
            by default.

    Returns:
        a table with a row per entry layer and draw, `scale` among its columns. There may be no best
            scale, where the
        network is right on every sample: then one is taken that makes the training loss at most
            1e-6.

    Raises:
        ModeconnError: the model is no chain; fraction, draws or entries out of range; data that are
            empty, do not fit or can be read only once.
    """
    budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    _check(fraction, draws, budget)
    state = states.load(params)
    sets = [as_batches(data, batch_size or _ROWS) for data in (train, test) if data is not None]
    sample = _first_rows(sets[0])
    chain = Chain.of(model, sample)
    wanted = range(chain.length) if entries is None else sorted(set(entries))
    for entry in wanted:
        check_entry(chain, entry)
    keys = [(entry, draw) for entry in wanted for draw in range(draws)]
    run = _Run(model, chain, state, sets, sample, fraction, seed, precision, budget, progress)
    original, rows = run.all(keys)
    return StabilityTable(rows, original)


def _check(fraction: float, draws: int, budget: int) -> None:
    if not (fraction > 1 and math.isfinite(fraction)):
        raise ModeconnError(
            f"fraction is {fraction}: expected a number above 1, as floor(n / fraction) of a layer's n units are removed"
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ModeconnError(f"draws is {draws!r}: expected a whole number, at least 1")
    if budget < 1:
        raise ModeconnError(f"memory_budget is {budget}: expected a number of bytes, at least 1")


def _first_rows(data: Batches) -> Tensor:
    for inputs, targets in data:
        if targets.is_floating_point() or targets.dim() != 1:
            raise ModeconnError(
                f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: class labels are integers [N]"
            )
        first: Tensor = inputs[:2].clone()
        return first
    raise ModeconnError("data: holds no samples; expected at least one")


# -- masks -----------------------------------------------------------------------------------------


def kept_after(
    chain: Chain, entry: int, draw: int, fraction: float, seed: int
) -> dict[int, Tensor]:
    """For every hidden layer p > entry the units that a draw keeps, rising, int64."""
    kept = {}
    for p in range(entry + 1, chain.length):
        words = np.random.SeedSequence([seed, entry, draw, p]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]) >> 1)
        units = chain.widths[p]
        order = torch.randperm(units, generator=generator)
        kept[p] = order[math.floor(units / fraction) :].sort().values
    return kept


def without_units(chain: Chain, state: State, kept: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The state with all outgoing weights of the units that are not kept set to 0; all other tensors are shared."""
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
        model: nn.Module,
        chain: Chain,
        state: State,
        sets: Sequence[Batches],
        sample: Tensor,
        fraction: float,
        seed: int,
        precision: str,
        budget: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.chain, self.state, self.sets, self.sample = (
            model,
            chain,
            state,
            sets,
            sample,
        )
        self.fraction, self.seed, self.precision, self.budget, self.progress = (
            fraction,
            seed,
            precision,
            budget,
            progress,
        )
        self.done, self.passes = 0, 1

    def all(self, keys: Sequence[tuple[int, int]]) -> tuple[Level, list[Row]]:
        """The network's own numbers, and the rows."""
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
        return kept_after(self.chain, entry, draw, self.fraction, self.seed)

    def _groups(self, keys: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        groups: list[list[tuple[int, int]]] = []
        size = 0
        for entry, draw in keys:
            names = {self.chain.layer(p + 1).weight for p in range(entry + 1, self.chain.length)}
            # The masked weights, and the part of them that is cut out of them.
            own = 2 * sum(
                self.state[name].numel() * self.state[name].element_size() for name in names
            )
            if not groups or size + own > self.budget:
                groups.append([])
                size = 0
            groups[-1].append((entry, draw))
            size += own
        return groups

    def _evaluate(self, networks: list[dict[str, Tensor]]) -> tuple[list[float], list[Level]]:
        # At breakpoint k of a chain one control point alone is active, so each network is planned
        # by itself and yet shares equal values with the others. The last control point is repeated,
        # or the last two would share a segment.
        path = PolyChain([*networks, networks[-1]])
        t = np.arange(len(networks)) / len(networks)
        forward = Forward(self.model, path, t, self.sample, precision=self.precision)
        numbers: list[tuple[Tensor, Tensor]] = []
        scales = torch.ones(len(networks), dtype=torch.float64)
        with tempfile.TemporaryDirectory(prefix="modeconn-outputs-") as folder:
            for index, data in enumerate(self.sets):
                chunks = _Outputs(
                    forward, data, self.chain.classes, Path(folder) / f"{index}.bin", self.budget
                )
                chunks.read(self._report)
                if index == 0:
                    scales[1:] = best_scales(chunks, skip=1)
                numbers.append(losses_and_errors(chunks, scales))
        columns = [column.tolist() for pair in numbers for column in pair]
        return scales.tolist(), [Level(*values) for values in zip(*columns)]

    def _report(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            totals = [data.samples for data in self.sets]
            known = [n for n in totals if n is not None]
            self.progress(
                self.done, self.passes * sum(known) if len(known) == len(totals) else None
            )


class _Outputs(Iterable[Chunk]):
    """The outputs [T, B, C] of all networks and the labels [B], batch by batch; on disk once they outgrow the budget."""

    def __init__(
        self, forward: Forward, data: Batches, classes: int, file: Path, budget: int
    ) -> None:
        self._forward, self._data, self._classes, self._file, self._budget = (
            forward,
            data,
            classes,
            file,
            budget,
        )
        self._parts: list[tuple[Tensor | tuple[int, tuple[int, ...]], Tensor]] = []
        self._dtype = np.dtype(np.float32)

    def read(self, report: Callable[[int], None]) -> None:
        """One pass over the data."""
        held = position = 0
        for inputs, targets in self._data:
            labels = self._labels(targets)
            outputs = self._forward(inputs).cpu()
            size = outputs.numel() * outputs.element_size()
            if held + size <= self._budget:
                held += size
                self._parts.append((outputs, labels))
            else:
                array = outputs.contiguous().numpy()
                self._dtype = array.dtype
                with self._file.open("ab") as stream:
                    array.tofile(stream)
                self._parts.append(((position, array.shape), labels))
                position += array.nbytes
            report(len(labels))

    def __iter__(self) -> Iterator[Chunk]:
        for part, labels in self._parts:
            if isinstance(part, Tensor):
                yield part, labels
            else:
                array = np.fromfile(self._file, self._dtype, math.prod(part[1]), offset=part[0])
                yield torch.from_numpy(array.reshape(part[1])), labels

    def _labels(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or targets.dim() != 1:
            raise ModeconnError(
                f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: class labels are integers [N]"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self._classes:
            raise ModeconnError(
                f"label {low if low < 0 else high} is out of range: the model has {self._classes} classes"
            )
        return targets.long().cpu()
