"""The order of a training's samples, and its random draws: each follows from seed and number alone.

So a training that is resumed draws as one that ran through.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_of(seed: int, number: int) -> int:
    """Derive the seed of an epoch or step from the training's, below 2**63 as generators need."""
    word = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return int(word) >> 1


def order_of_epoch(seed: int, count: int) -> torch.Tensor:
    """Return the order of so many samples in the epoch of a seed, int64 [count]."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def devices_that_draw(device: torch.device) -> list[torch.device]:
    """Return the devices, besides the CPU, whose random state has to be kept."""
    return [] if device.type == "cpu" else [device]
