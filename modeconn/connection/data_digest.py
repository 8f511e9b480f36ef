"""The digest by which a certificate knows its data."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor


class DataDigest:
    """SHA-256 of inputs and targets, row after row, whatever the batches."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256(), hashlib.sha256()]
        self._kinds = ["", ""]
        self.rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        self.rows += len(inputs)
        for i, tensor in enumerate((inputs, targets)):
            self._kinds[i] = f"{list(tensor.shape[1:])} {tensor.dtype}"
            self._parts[i].update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)

    def finish(self) -> str:
        """Returns the digest of all batches, in hexadecimal."""
        sums = [part.hexdigest() for part in self._parts]
        text = " ".join([str(self.rows), *self._kinds, *sums])
        return hashlib.sha256(text.encode()).hexdigest()
