"""Computes the features of entry layers: h_l of a network for a whole data set, in one pass."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.connection.labels import class_labels
from modeconn.connection.layer_chain import LayerChain, block_rows
from modeconn.connection.subnetworks import check_entry, restrict
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError, out_of_memory

# Features that are larger than this go to files: a quarter of a small machine's memory.
_MEMORY_BUDGET = 2 << 30
# Bytes of a block's widest value: small enough to stay in a core's cache from layer to layer.
_CACHE_BUDGET = 1 << 21
_BATCH = 1024


class Features:
    """h_l of several entry layers for one data set.

    Attributes:
        labels: int64 [N], or other targets [N, …].
        on_disk: whether they are memory-mapped files; they are removed when the object is.
    """

    def __init__(self, values: dict[int, Tensor], labels: Tensor, folder: str | None) -> None:
        self._values, self.labels, self.on_disk = values, labels, folder is not None
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def entry(self, entry: int) -> Tensor:
        """Returns h_l [N, n_l, …], of the kept units alone where `compute_features` was told so."""
        if entry not in self._values:
            raise ModeconnError(
                f"entry layer is {entry}: expected one whose features were computed, "
                f"of {sorted(self._values)}"
            )
        return self._values[entry]

    def __len__(self) -> int:
        return len(self.labels)


def compute_features(
    chain: LayerChain,
    state: Mapping[str, Tensor],
    data: Any,
    entries: Sequence[int] | None = None,
    *,
    kept: Mapping[int, Tensor] | None = None,
    folder: str | Path | None = None,
    memory_budget: int = _MEMORY_BUDGET,
    of_classes: bool = True,
) -> Features:
    """Passes the data through one network once, keeping the value that enters each of some layers.

    Args:
        state: the network's weights.
        data: as for `evaluate`; targets are class labels.
        entries: the entry layers, 0 … L-1; all of them if None.
        kept: for some entry layers the units to keep; all units where it says nothing.
        folder: where files go if the features are larger than `memory_budget` bytes; a temporary
            folder if None.
        of_classes: whether targets must be class labels; others are kept as they are.

    Raises:
        ModeconnError: the data is empty, labels are not integers [N], or the inputs do not fit the
            chain.
    """
    requested = list(range(chain.length)) if entries is None else sorted(set(entries))
    for entry in requested:
        check_entry(chain, entry)
    like = next(iter(state.values()))
    source = as_batches(data, _BATCH)
    labels: list[Tensor] = []
    store: _Memory | _Files | None = None
    with torch.no_grad():
        for x, y in source:
            labels.append((class_labels(y) if of_classes else y).to(like.device))
            values = _values(chain, state, x.to(like), requested, kept or {})
            if store is None:
                store = _Memory(values)
                if source.samples and _bytes(values, source.samples) > memory_budget:
                    store = _Files(values, source.samples, folder)
            store.add(values)
    if store is None:
        raise ModeconnError("data: holds no samples; expected at least one")
    return Features(store.tensors(), torch.cat(labels), store.folder)


def _bytes(values: Mapping[int, Tensor], samples: int) -> int:
    """Estimates the bytes of the features of all samples from those of a batch."""
    of_a_sample = sum(
        value.numel() * value.element_size() // len(value) for value in values.values()
    )
    return of_a_sample * samples


def _values(
    chain: LayerChain,
    state: Mapping[str, Tensor],
    x: Tensor,
    requested: Sequence[int],
    kept: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """Computes the features of one batch, block by block of rows so that values stay in cache."""
    blocks: dict[int, list[Tensor]] = {entry: [] for entry in requested}
    for rows in x.split(block_rows(chain, x, _CACHE_BUDGET)):
        h, at = rows, 0
        try:
            for entry in requested:
                if entry:
                    h, at = chain.run(state, h, at, entry), entry
                value = h if entry else chain.input(h, state)
                own = restrict(chain, entry, value, kept[entry]) if entry in kept else value
                blocks[entry].append(own)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            shape = ["N", *x.shape[1:]]
            raise ModeconnError(
                f"{chain.name} does not run on inputs of shape {shape}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return {entry: torch.cat(chunks) for entry, chunks in blocks.items()}


class _Memory:
    """Features in memory, batch by batch."""

    folder = None

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        self._parts: dict[int, list[Tensor]] = {entry: [] for entry in values}

    def add(self, values: Mapping[int, Tensor]) -> None:
        for entry, value in values.items():
            self._parts[entry].append(value)

    def tensors(self) -> dict[int, Tensor]:
        return {entry: torch.cat(chunks) for entry, chunks in self._parts.items()}


class _Files:
    """Features in memory-mapped files, one for each entry layer."""

    def __init__(self, values: Mapping[int, Tensor], rows: int, folder: str | Path | None) -> None:
        self.folder = tempfile.mkdtemp(prefix="modeconn-features-", dir=folder)
        self._done = 0
        self._maps: dict[int, np.memmap] = {}
        for entry, value in values.items():
            kind = torch.empty(0, dtype=value.dtype).numpy().dtype
            name = Path(self.folder) / f"entry-{entry}.bin"
            self._maps[entry] = np.memmap(name, kind, "w+", shape=(rows, *value.shape[1:]))

    def add(self, values: Mapping[int, Tensor]) -> None:
        start, rows = self._done, 0
        for entry, value in values.items():
            rows = len(value)
            self._maps[entry][start : start + rows] = value.cpu().numpy()
        self._done += rows

    def tensors(self) -> dict[int, Tensor]:
        return {entry: torch.from_numpy(array) for entry, array in self._maps.items()}
