"""Sources of data that the tests of batches share."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

N = 23
INPUTS = torch.arange(N * 6, dtype=torch.float32).reshape(N, 2, 3)
TARGETS = torch.arange(N)


class Samples(Dataset):
    """A map-style data set of (tensor, int) samples."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return INPUTS[index], int(TARGETS[index])


class Lists:
    """Neither a list nor an iterator: something of the user's own that can be iterated again."""

    def __init__(self, rows: int = N) -> None:
        self.rows = rows

    def __iter__(self):
        cuts = [slice(start, min(start + 9, self.rows)) for start in range(0, self.rows, 9)]
        return iter([[INPUTS[cut], TARGETS[cut]] for cut in cuts])
