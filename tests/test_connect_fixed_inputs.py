"""Networks that begin with fixed arithmetic or a norm: connected, verified, bounded."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.connection import rounds
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.rounding import chain_rounding
from modeconn.connection.segment_kinds import Evidence
from modeconn.connection.value_ranges import largest
from modeconn.errors import ModeconnError
from naive import pass_per_point

SHIFT, SCALE = torch.tensor([5.0, -3.0]).view(2, 1, 1), torch.tensor([0.25, 4.0]).view(2, 1, 1)


class Normalised(nn.Module):
    """(x / 2 - mean) / deviation of each channel: buffers, in the state dict or not."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", SHIFT.clone(), persistent=persistent)
        self.register_buffer("deviation", SCALE.clone(), persistent=persistent)
        layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x / 2 - self.mean) / self.deviation)


class BeginsWithNorm(nn.Module):
    """A batch norm of flattened inputs, with statistics that are not those of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.norm.running_mean.copy_(torch.linspace(-2, 2, 32))
        self.norm.running_var.copy_(torch.linspace(0.5, 3, 32))
        nn.init.uniform_(self.norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(5))
        layers = [nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x.flatten(1)))


MAKE = {
    "buffers": Normalised,
    "constants": functools.partial(Normalised, False),
    "norm": BeginsWithNorm,
}


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (90,), generator=generator)
    pattern = torch.randn(3, 2, 4, 4, generator=generator)
    noise = 0.5 * torch.randn(90, 2, 4, 4, generator=generator)
    return 2 * ((pattern[y] + noise) * SCALE + SHIFT), y


@functools.cache
def fitted(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    (x, y), model = data(), MAKE[name]().eval()
    optimizer = torch.optim.Adam(model.body.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@functools.cache
def connected(name: str) -> mc.Connection:
    pair = fitted(name, 1), fitted(name, 2)
    with mock.patch.object(rounds, "_STEPS", 300):  # of a round: enough for so few samples
        return mc.connect(pair[0], *pair, data(), target=0.3)


@pytest.mark.parametrize("name", MAKE)
def test_connected_with_a_bound_that_holds(name):
    connection, model = connected(name), fitted(name, 1)
    certificate = mc.verify(model, connection, data(), a=model, b=fitted(name, 2))
    assert certificate.bound < 0.3
    t = np.linspace(0, 1, 97)
    exact, single = (
        pass_per_point(model, connection.path, *data(), t, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert exact["loss"].max() <= certificate.bound + certificate.rounding.loss_float64
    assert single["loss"].max() <= certificate.bound + certificate.rounding.loss_float32
    assert certificate.rounding.loss_float32 < 0.01


@pytest.mark.parametrize("name", MAKE)
def test_values_and_rounding_are_bounded_from_the_raw_inputs_on(name):
    model, (x, _) = fitted(name, 1), data()
    chain = LayerChain.of(model, x[:4])
    state = {key: value.detach() for key, value in model.state_dict().items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    h = chain.input(x.double(), exact)
    bound = chain.fixed.largest(state, state, x.double().abs().amax(0, keepdim=True))
    assert bool((h.abs() <= bound * (1 + 1e-12)).all())
    assert bool((bound < 60).all())
    assert largest(chain, state, state, x.abs().amax(0, keepdim=True))[0] < 1e6
    off = (chain.input(x, state).double() - h).abs()
    error = chain.fixed.error(x, state).double() * 2**-24
    assert bool((off <= error).all())
    assert float(error.max()) < 1e-3
    rewrite = [Evidence("rewrite", (), "")]
    z = model.double()(x.double())
    model.float()
    for effort in (0.0, 1e9):
        bounds = chain_rounding(chain, [state, state], rewrite, len(x), effort).of_rows(x)
        moved = (model(x).double() - z).abs()
        assert bool((moved <= bounds[0].errors(torch.float32)).all())


def test_what_comes_first_may_not_move_on_the_path():
    connection, model = connected("buffers"), fitted("buffers", 1)
    points = [dict(point) for point in connection.path.control_points]
    for point in points[3:]:
        point["mean"] = point["mean"] + 1
    forged = mc.Connection(mc.PolyChain(points), connection.kinds, connection.certificate)
    with pytest.raises(mc.FalseCertificate, match="mean changes, and is no parameter or buffer of"):
        mc.verify(model, forged, data())


def test_networks_that_begin_in_different_ways_are_refused():
    a, b = fitted("norm", 1), fitted("norm", 2).state_dict()
    other = {**b, "norm.running_mean": b["norm.running_mean"] + 0.1}
    with pytest.raises(ModeconnError, match=r"norm\.running_mean comes before the first layer and"):
        mc.connect(a, a, other, data())


def test_a_step_that_is_not_fixed_is_refused():
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.relu(x).flatten(1))

    odd = Odd(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ModeconnError, match=r"relu .* comes before the first layer, and is no"):
        mc.connect(odd, odd, odd, data())
