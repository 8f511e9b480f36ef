"""Networks that draw random numbers: with a seed, every point sees the same noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


class Drops(nn.Module):
    """Dropout that is always on, twice: behind a layer that may be constant, and one that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.first(x)), 0.5, training=True)
        return self.last(F.dropout(torch.relu(self.second(x)), 0.5, training=True))


class Opaque(Drops):
    """The same, where the data decide what is called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x[:, :3]


def networks(kind: type[Drops]) -> list[nn.Module]:
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        made.append(kind())
    return made


@pytest.mark.filterwarnings("ignore:the model runs as it is")
@pytest.mark.parametrize("kind", [Drops, Opaque])
def test_points_with_equal_weights_have_equal_values(kind: type[Drops]):
    """Of a chain that comes back, t = 0 and t = 1 are one network with one noise."""
    a, b, c = networks(kind)
    c.first.load_state_dict(b.first.state_dict())  # constant on one segment, moving on the others
    path = mc.PolyChain([a, b, c, a])
    options = {"batch_size": 16, "progress": False}
    first, again, other = (
        mc.evaluate(a, path, (X, Y), 7, noise_seed=seed, **options) for seed in (5, 5, 6)
    )
    assert first.loss[0] == pytest.approx(first.loss[-1], rel=1e-6)
    np.testing.assert_array_equal(first.loss, again.loss)
    assert (first.loss != other.loss).all()
    with pytest.warns(UserWarning, match=r"draws random numbers.*noise_seed=0"):
        anew = mc.evaluate(a, path, (X, Y), 7, **options)
    if kind is Opaque:  # a graph's constant parts are drawn once for all points anyway
        assert abs(anew.loss[0] - anew.loss[-1]) > 1e-4


def test_batches_have_noise_of_their_own():
    a, *_ = networks(Drops)
    x, y = X[:1].expand(32, -1).contiguous(), Y[:1].expand(32).contiguous()
    path = mc.Mixture([a])
    losses = [
        mc.evaluate(a, path, (x[:n], y[:n]), [[1.0]], noise_seed=1, batch_size=16).loss[0]
        for n in (16, 32)
    ]
    assert losses[0] != losses[1]  # else the second batch had the noise of the first


def test_the_random_state_stays_and_other_networks_are_the_same():
    a, b, _ = networks(Drops)
    before = torch.get_rng_state()
    mc.evaluate(a, mc.Line(a, b), (X, Y), 3, noise_seed=1)
    assert torch.equal(before, torch.get_rng_state())
    plain = [nn.Linear(6, 3), nn.Linear(6, 3)]
    line = mc.Line(*plain)
    one, other = (mc.evaluate(plain[0], line, (X, Y), 5, noise_seed=seed) for seed in (None, 3))
    np.testing.assert_array_equal(one.loss, other.loss)
    assert one.backend == other.backend


def test_refusals():
    a, b, _ = networks(Drops)
    with pytest.raises(mc.ModeconnError, match=r"noise_seed is 1\.5: expected a whole number"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, noise_seed=1.5)
    pytest.importorskip("triton")
    with pytest.raises(mc.ModeconnError, match="noise_seed goes with backend"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, noise_seed=1, backend="triton")
