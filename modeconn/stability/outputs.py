"""Keeps the outputs of many networks on a data set, in memory or, beyond a budget, in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeconn.connection.labels import class_labels
from modeconn.data.batches import Batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.outputs import PlannedForward
from modeconn.stability.scale import Chunk


@dataclass(frozen=True)
class _Stored:
    """The outputs of one batch in the file: where they begin, in bytes, and their shape."""

    position: int
    shape: tuple[int, ...]


class Outputs(Iterable[Chunk]):
    """The outputs [T, B, C] of T networks and the labels [B], batch by batch.

    Args:
        forward: computes the outputs.
        data: one data set.
        classes: C.
        file: where outputs go once they outgrow the budget.
        budget: bytes of memory.
    """

    def __init__(
        self, forward: PlannedForward, data: Batches, classes: int, file: Path, budget: int
    ) -> None:
        self._forward, self._data, self._classes = forward, data, classes
        self._file, self._budget = file, budget
        self._parts: list[tuple[Tensor | _Stored, Tensor]] = []
        self._dtype = np.dtype(np.float32)

    def read(self, report: Callable[[int], None]) -> None:
        """Passes the data through the networks once.

        Args:
            report: called with the number of samples of each batch.
        """
        held = position = 0
        for inputs, targets in self._data:
            labels = self._labels(targets)
            outputs = self._forward(inputs).cpu()
            size = outputs.numel() * outputs.element_size()
            if held + size <= self._budget:
                held += size
                self._parts.append((outputs, labels))
            else:
                self._parts.append((self._write(outputs, position), labels))
                position += size
            report(len(labels))

    def _write(self, outputs: Tensor, position: int) -> _Stored:
        array = outputs.contiguous().numpy()
        self._dtype = array.dtype
        with self._file.open("ab") as stream:
            array.tofile(stream)
        return _Stored(position, array.shape)

    def __iter__(self) -> Iterator[Chunk]:
        for part, labels in self._parts:
            if isinstance(part, Tensor):
                yield part, labels
            else:
                count = math.prod(part.shape)
                array = np.fromfile(self._file, self._dtype, count, offset=part.position)
                yield torch.from_numpy(array.reshape(part.shape)), labels

    def _labels(self, targets: Tensor) -> Tensor:
        labels = class_labels(targets).cpu()
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self._classes:
            raise ModeconnError(
                f"label {low if low < 0 else high} is out of range: "
                f"the model has {self._classes} classes"
            )
        return labels
