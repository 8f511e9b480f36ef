"""The features of entry layers: h_l of a network for a whole data set, all layers in one pass."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.connection.chain import Chain, block_rows
from modeconn.connection.subnetworks import check_entry, restrict
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError

Progress = Callable[[int, "int | None"], None]
# Features that are larger than this go to files.
_MEMORY_BUDGET = 2 << 30


class Features:
    """h_l of several entry layers for one data set.

    Attributes:
        labels: int64 [N].
        on_disk: whether they are memory-mapped files; they are removed when the object is.
    """

    def __init__(self, values: dict[int, Tensor], labels: Tensor, folder: str | None) -> None:
        self._values, self.labels, self.on_disk = values, labels, folder is not None
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def entry(self, entry: int) -> Tensor:
        """h_l [N, n_l, …] (of the kept units alone where `compute_features` was told so)."""
        if entry not in self._values:
            raise ModeconnError(
                f"features of entry layer {entry} were not computed, only of {sorted(self._values)}"
            )
        return self._values[entry]

    def __len__(self) -> int:
        return len(self.labels)


def compute_features(
    chain: Chain,
    state: Mapping[str, Tensor],
    data: Any,
    entries: Sequence[int] | None = None,
    *,
    kept: Mapping[int, Tensor] | None = None,
    folder: str | Path | None = None,
    memory_budget: int = _MEMORY_BUDGET,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Features:
    """One pass over the data through one network, keeping the value that enters each of some layers.

    Args:
        state: the network's weights.
        data: as for `modeconn.evaluation.evaluator`; targets are class labels.
        entries: the entry layers, 0 … L-1; all of them if None.
        kept: for some entry layers the units to keep; all units where it says nothing.
        folder: where files go if the features are larger than `memory_budget` bytes; a temporary
            folder if None.
        progress: called with (samples done, samples or None).

    Raises:
        ModeconnError: the data is empty, labels are not integers [N], or the inputs do not fit the
            chain.
    """
    wanted = list(range(chain.length)) if entries is None else sorted(set(entries))
    for entry in wanted:
        check_entry(chain, entry)
    like = next(iter(state.values()))
    source = as_batches(data, batch_size or 1024)
    parts: dict[int, list[Tensor]] = {entry: [] for entry in wanted}
    labels: list[Tensor] = []
    store: _Store | None = None
    done = 0
    with torch.no_grad():
        for x, y in source:
            if y.is_floating_point() or y.dim() != 1:
                raise ModeconnError(
                    f"targets have shape {list(y.shape)} and dtype {y.dtype}: class labels are integers [N]"
                )
            labels.append(y.long().to(like.device))
            values = _values(chain, state, x.to(like), wanted, kept or {})
            if store is None and source.samples:
                size = (
                    sum(v.numel() for v in values.values())
                    * like.element_size()
                    // len(x)
                    * source.samples
                )
                if size > memory_budget:
                    store = _Store(values, source.samples, folder)
            for entry, value in values.items():
                if store is None:
                    parts[entry].append(value)
                else:
                    store.write(entry, done, value)
            done += len(x)
            if progress is not None:
                progress(done, source.samples)
    if store is not None:
        return Features(store.tensors(), torch.cat(labels), store.folder)
    return Features(
        {entry: torch.cat(chunks) for entry, chunks in parts.items()}, torch.cat(labels), None
    )


def _values(
    chain: Chain,
    state: Mapping[str, Tensor],
    x: Tensor,
    wanted: Sequence[int],
    kept: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """The values of one batch, small blocks of rows at a time so that they stay in the cache."""
    blocks: dict[int, list[Tensor]] = {entry: [] for entry in wanted}
    for rows in x.split(block_rows(chain, x, 1 << 21)):
        h, at = rows, 0
        try:
            for entry in wanted:
                h = chain.input(h) if entry == 0 else chain.run(state, h, at, entry)
                at = entry
                blocks[entry].append(restrict(chain, entry, h, kept[entry]) if entry in kept else h)
        except RuntimeError as error:
            shape = ["N", *x.shape[1:]]
            raise ModeconnError(
                f"{chain.name} does not run on inputs of shape {shape}: {str(error).splitlines()[0]}"
            ) from error
    return {entry: torch.cat(chunks) for entry, chunks in blocks.items()}


class _Store:
    """Memory-mapped files, one for each entry layer."""

    def __init__(self, values: Mapping[int, Tensor], rows: int, folder: str | Path | None) -> None:
        self.folder = tempfile.mkdtemp(prefix="modeconn-features-", dir=folder)
        self._maps: dict[int, np.memmap] = {}
        for entry, value in values.items():
            kind = torch.empty(0, dtype=value.dtype).numpy().dtype
            name = Path(self.folder) / f"entry-{entry}.bin"
            self._maps[entry] = np.memmap(name, kind, "w+", shape=(rows, *value.shape[1:]))

    def write(self, entry: int, start: int, value: Tensor) -> None:
        self._maps[entry][start : start + len(value)] = value.cpu().numpy()

    def tensors(self) -> dict[int, Tensor]:
        return {entry: torch.from_numpy(array) for entry, array in self._maps.items()}
