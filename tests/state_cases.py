"""Networks and states that the tests of checkpoints share."""

from __future__ import annotations

import torch
from torch import nn

from modeconn.parameters import state


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def weights(seed: int = 0) -> state.State:
    return {key: value.clone() for key, value in network(seed).state_dict().items()}


def assert_same(found: state.State, expected: state.State) -> None:
    """The same names and the same bits."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].numpy().tobytes() == value.numpy().tobytes(), key
