"""Data and networks that the tests of mc.evaluate share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from naive import mlp

X = torch.randn(130, 20, generator=torch.Generator().manual_seed(0))
Y = torch.arange(130) % 10


@pytest.fixture(scope="module")
def nets() -> list[nn.Sequential]:
    return [mlp(20, 33, 17, 10, seed=k) for k in range(3)]
