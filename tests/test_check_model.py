"""check_model tells what modeconn relies on, of models that keep to it and of such that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modeconn.models import build
from modeconn.testing import check_model

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3


class Mixes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Draws(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(len(x), 1)


class Keeps(nn.Linear):
    """Computes with the weight that it had when it ran first."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = self.weight.detach() * 2
        return x @ self.kept.t()


class Looks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def failed(model: nn.Module) -> dict[str, str]:
    report = check_model(model, (X, Y))
    assert len(str(report).splitlines()) == len(report.checks)
    return {check.name: check.text for check in report.checks if not check.passed}


def test_an_ordinary_network_passes():
    report = check_model(build("mlp:6-8x2-3"), (X, Y))
    assert report.passed, str(report)
    assert "✓ rows           proved to be independent" in str(report)


@pytest.mark.parametrize(
    ("model", "name", "text"),
    [
        (Mixes(6, 3), "rows", "depends on the others"),
        (Keeps(6, 3), "pure", "its forward changes attributes of the module"),
        (Looks(6, 3), "captured", "not: test_check_model.py"),
    ],
)
def test_what_fails_is_named(model: nn.Module, name: str, text: str):
    assert text in failed(model)[name]


def test_random_networks_are_named():
    assert "draws random numbers" in failed(Draws(6, 3))["deterministic"]
