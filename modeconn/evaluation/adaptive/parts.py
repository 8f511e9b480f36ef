"""Disjoint random parts of a data set, where rows can be read in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from modeconn.data.batches import TARGETS

# Samples of a part, the share of the data that it may be, and the fewest that say anything.
_SAMPLES, _SHARE, _FEWEST = 250, 10, 50


def parts_of(data: Any, count: int = 2, seed: int = 0) -> list[Any] | None:
    """Return disjoint random parts of a data set, in a form that `evaluate` takes.

    Args:
        data: as `evaluate` takes it.
        count: how many parts.
        seed: which rows they are.

    Returns:
        None for data that are read in their own order alone, and for few.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    total = _rows(data) or 0
    size = min(_SAMPLES, total // _SHARE)
    if size < _FEWEST:
        return None
    chosen = np.random.default_rng(seed).permutation(total)[: count * size]
    return [_taken(data, np.sort(part)) for part in np.split(chosen, count)]


def samples_of(part: Any) -> int:
    """Return the number of samples of a part that `parts_of` returned."""
    _, targets = part[0] if isinstance(part, list) else part
    return len(targets)


def _rows(data: Any) -> int | None:
    """Return the number of rows that can be read in any order, None where they cannot."""
    if isinstance(data, Mapping) and TARGETS in data:
        return len(data[TARGETS])
    if isinstance(data, (tuple, list)):
        pair = len(data) == 2 and isinstance(data[1], (Tensor, np.ndarray)) and data[1].ndim > 0
        return len(data[1]) if pair else None
    if isinstance(data, DataLoader):
        plain = type(data.sampler) in (SequentialSampler, RandomSampler)
        return _rows(data.dataset) if plain and data.batch_size is not None else None
    mapped = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    return len(data) if mapped and hasattr(data, "__len__") else None


def _taken(data: Any, rows: np.ndarray) -> Any:
    if isinstance(data, Mapping):
        inputs = {key: _indexed(value, rows) for key, value in data.items() if key != TARGETS}
        return inputs, _indexed(data[TARGETS], rows)
    if isinstance(data, (tuple, list)):
        return _indexed(data[0], rows), _indexed(data[1], rows)
    if isinstance(data, DataLoader):
        collate = data.collate_fn
        return [_pair(collate(_samples(data.dataset, rows)))]
    return [_pair(default_collate(_samples(data, rows)))]


def _samples(dataset: Any, rows: np.ndarray) -> list[Any]:
    return [dataset[int(row)] for row in rows]


def _pair(batch: Any) -> Any:
    """Split a batch that is one dict into inputs and targets."""
    if isinstance(batch, Mapping) and TARGETS in batch:
        return {key: value for key, value in batch.items() if key != TARGETS}, batch[TARGETS]
    return tuple(batch) if isinstance(batch, Sequence) else batch


def _indexed(value: Any, rows: np.ndarray) -> Any:
    if isinstance(value, Mapping):
        return {key: _indexed(each, rows) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_indexed(each, rows) for each in value)
    if isinstance(value, Tensor):
        return value[torch.from_numpy(rows).to(value.device)]
    return np.asarray(value[rows])
