"""Chains of convolutions: in one dimension, and with averaged channels as outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn.connection import rounds as search
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.rounding import chain_rounding
from modeconn.connection.segment_kinds import Evidence


def in_one_dimension() -> nn.Sequential:
    layers = [nn.Conv1d(2, 10, 3, padding=1), nn.BatchNorm1d(10), nn.ReLU(), nn.MaxPool1d(2)]
    layers += [nn.Conv1d(10, 12, 3, padding=1), nn.GELU(), nn.AvgPool1d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))


def averaged() -> nn.Sequential:
    layers = [nn.Conv2d(2, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 12, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def averaged_in_one_dimension() -> nn.Sequential:
    layers = [nn.Conv1d(2, 10, 3), nn.ReLU(), nn.Conv1d(10, 12, 3), nn.ReLU(), nn.Conv1d(12, 3, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())


MAKE = {
    "1-d": (in_one_dimension, (2, 16)),
    "averaged": (averaged, (2, 8, 8)),
    "1-d averaged": (averaged_in_one_dimension, (2, 16)),
}


def data(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (90,), generator=generator)
    pattern = torch.randn(3, *shape, generator=generator)
    return pattern[y] + 0.5 * torch.randn(90, *shape, generator=generator), y


def fitted(make, shape: tuple[int, ...], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    x, y = data(shape)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", MAKE)
def test_connected_with_a_bound_that_holds(name: str, monkeypatch) -> None:
    monkeypatch.setattr(search, "_STEPS", 300)  # of a round: enough for so few samples
    make, shape = MAKE[name]
    a, b = (fitted(make, shape, seed) for seed in (1, 2))
    found = mc.connect(a, a, b, data(shape), target=0.8)
    assert found.certificate.bound <= 0.8
    t = np.random.default_rng(0).random(200)
    result = mc.evaluate(a, found.path, data(shape), points=t)
    assert result.loss.max() <= found.certificate.bound * (1 + 1e-5)
    assert result.error.max() <= found.certificate.error_bound + 1e-9
    assert mc.verify(a, found, data(shape), a=a, b=b).bound == found.certificate.bound


@pytest.mark.parametrize("budget", [0.0, 1e12])
@pytest.mark.parametrize("name", MAKE)
def test_rounding_of_float32_is_within_its_bound(name: str, budget: float) -> None:
    make, shape = MAKE[name]
    torch.manual_seed(1)
    model = make().eval()
    x = data(shape)[0]
    chain = LayerChain.of(model, x[:4])
    exact = model.double()(x.double())
    points = [model.state_dict()] * 2
    found = chain_rounding(chain, points, [Evidence("swing", (), "")], len(x), budget)
    assert found is not None
    bound = found.of_rows(x.double())[0].errors(torch.float32)
    plain = model.float()(x).double()
    assert bool(((plain - exact).abs() <= bound).all())


def test_outputs_that_are_not_linear_in_the_last_layer_are_refused() -> None:
    x = torch.randn(4, 2, 8, 8)
    first = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3)]
    with pytest.raises(mc.ModeconnError, match=r"last layer, 2\.weight, is followed by relu"):
        LayerChain.of(nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), x)
    with pytest.raises(mc.ModeconnError, match=r"last layer, 2\.weight, is followed by max_pool2d"):
        LayerChain.of(nn.Sequential(*first, nn.MaxPool2d(4), nn.Flatten()), x)
    with pytest.raises(mc.ModeconnError, match="convolution whose outputs have shape"):
        LayerChain.of(nn.Sequential(*first, nn.AdaptiveAvgPool2d(2), nn.Flatten()), x)
