"""Networks and trainings on digits that the tests of training share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modeconn import models
from modeconn.data import datasets
from modeconn.training.train import TrainReport, train

SPEC = "mlp:64-32-10"


@pytest.fixture(scope="module")
def digits() -> datasets.Images:
    return datasets.load("digits", limit=300)


def network(seed: int = 1, spec: str = SPEC) -> nn.Module:
    model = models.build(spec)
    models.initialise(model, torch.Generator().manual_seed(seed))
    return model


def run(model: nn.Module, data, **settings) -> TrainReport:
    return train(model, data, **{"lr": 0.05, "epochs": 6, "batch_size": 64, "seed": 3} | settings)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


class Noisy(nn.Module):
    """Make a network whose buffers and random draws must survive a resume: batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return Noisy()
