"""The native statistics pass against PyTorch's: reset, momentum=None, a training-mode pass."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.backends.reference import ReferenceBackend
from modeconn.models import build
from modeconn.parameters.paths import Path
from native_cases import engine
from native_statistics_cases import DOUBLE, SINGLE, drawn, rows_net, statistics
from policy import assert_within_policy

T = [0.0, 0.4, 1.0]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the network may run in PyTorch at a point."""

    def refused(*args: object) -> None:
        raise AssertionError("the reference backend was asked for a point")

    monkeypatch.setattr(ReferenceBackend, "outputs", refused)


def re_estimated(
    model: nn.Module, path: Path, x: Tensor, t: object, dtype: torch.dtype, batch_size: int
) -> dict[str, Tensor]:
    """Each point's running statistics, as PyTorch estimates them."""
    rows = []
    for point in path.points(t):
        network = copy.deepcopy(model).to(dtype)
        network.load_state_dict(
            {
                k: v.to(dtype) if v.is_floating_point() else v
                for k, v in path.at(float(point)).items()
            }
        )
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None
        for module in network.train().modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        with torch.no_grad():
            for part in x.to(dtype).split(batch_size):
                network(part)
        rows.append({k: v.clone() for k, v in network.state_dict().items() if "running" in k})
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def agrees(
    make: object,
    x: Tensor,
    batch_size: int,
    points: object = T,
    dtypes: tuple[torch.dtype, ...] = (SINGLE, DOUBLE),
) -> None:
    nets = [drawn(make, seed) for seed in (1, 2)]
    path = mc.Line(*nets)
    exact = re_estimated(nets[0], path, x, points, DOUBLE, batch_size)
    got = statistics(nets[0], path, x, points, DOUBLE, batch_size)
    same(got, exact)
    got = statistics(nets[0], path, x, points, SINGLE, batch_size)
    plain = re_estimated(nets[0], path, x, points, SINGLE, batch_size)
    for name, want in exact.items():
        assert_within_policy(name, got[name], plain[name], want, SINGLE)


def same(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Two computations in float64, each with its own rounding errors from layer to layer."""
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        torch.testing.assert_close(
            got[name], want, rtol=1e-11, atol=1e-11 * float(want.abs().max()), msg=name
        )


def images(rows: int, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    return torch.randn(
        rows, channels, height, width, generator=torch.Generator().manual_seed(rows), dtype=DOUBLE
    )


class Residual(nn.Module):
    """Blocks that add before or behind their norms, with or without a convolved shortcut."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda before, after, size=3, stride=1: nn.Conv2d(
            before, after, size, stride, size // 2, bias=False
        )
        self.first, self.norm0 = conv(3, 5), nn.BatchNorm2d(5)
        self.a1, self.n1, self.a2, self.n2 = (
            conv(5, 5),
            nn.BatchNorm2d(5),
            conv(5, 5),
            nn.BatchNorm2d(5),
        )
        self.b1, self.m1, self.b2, self.m2 = (
            conv(5, 7, 3, 2),
            nn.BatchNorm2d(7),
            conv(7, 7),
            nn.BatchNorm2d(7),
        )
        self.short, self.norm1 = conv(5, 7, 1, 2), nn.BatchNorm2d(7)
        self.p1, self.p2, self.c1, self.c2 = (
            nn.BatchNorm2d(7),
            nn.BatchNorm2d(7),
            conv(7, 7),
            conv(7, 7),
        )
        self.last, self.out = nn.BatchNorm2d(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.first(x)))
        x = F.relu(x + self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = F.relu(self.m2(self.b2(F.relu(self.m1(self.b1(x))))) + self.norm1(self.short(x)))
        # pre-activation: a norm of a sum that is read again
        x = x + self.c2(F.relu(self.p2(self.c1(F.relu(self.p1(x))))))
        return self.out(F.relu(self.last(x)).mean((2, 3)))


class Twice(nn.Module):
    """Two norms of one value, a norm behind a norm, and one of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3)
        self.one, self.two, self.three = (nn.BatchNorm2d(6) for _ in range(3))
        self.rows, self.hidden, self.after, self.out = (
            nn.BatchNorm1d(6 * 80),
            nn.Linear(480, 9),
            nn.BatchNorm1d(9),
            nn.Linear(9, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.input(x))
        y = self.three(self.one(y) + torch.tanh(self.two(y)))
        return self.out(F.gelu(self.after(self.hidden(self.rows(y.flatten(1))))))


class Shared(nn.Module):
    """What is pooled is read elsewhere, too: behind the first norm, and before the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.MaxPool2d(2),
        )
        self.shrink, self.down = nn.Conv2d(5, 5, 2, 2), nn.Conv2d(5, 5, 2)
        self.next, self.last = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        z = self.down(self.pool(y) + self.shrink(y))
        return self.out(
            F.relu(self.last(self.pool(F.relu(self.next(z))) + self.pool(z))).mean((2, 3))
        )


class Dense(nn.Module):
    """Norms of values side by side, and of some of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.inner = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        self.two, self.out = nn.BatchNorm2d(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv(x)], 1)
        x = torch.cat((x, self.inner(F.relu(self.one(x)))), dim=-3)
        return self.out(F.relu(self.two(x)).mean((2, 3)))


def pooled(pool: nn.Module, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        act or nn.ReLU(),
        pool,
        nn.Conv2d(7, 5, 3, 1, 2, dilation=2, bias=False),
        nn.BatchNorm2d(5, affine=False),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(5, eps=0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


NETS = {
    "residual": Residual,
    "twice": Twice,
    "shared": Shared,
    "dense": Dense,
    "pool": lambda: pooled(nn.MaxPool2d(2)),
    "rows left over": lambda: pooled(nn.MaxPool2d(3, 5)),
    "overlapping": lambda: pooled(nn.MaxPool2d(3, 2, 1)),
    "leaky": lambda: pooled(nn.MaxPool2d((4, 2)), nn.LeakyReLU(0.2)),
    "not rising": lambda: pooled(nn.MaxPool2d(2), nn.GELU()),
    "pool, then norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(24, 4),
    ),
    "activation, then norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.LeakyReLU(0.1),
        nn.BatchNorm2d(6),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 4),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_images(alone, name):
    agrees(NETS[name], images(40), 33)


@pytest.mark.parametrize("rows, batch_size", [(7, 7), (129, 129), (40, 17)])
@pytest.mark.parametrize("name", ["residual", "pool"])
def test_batches(alone, name, rows, batch_size):
    agrees(NETS[name], images(rows), batch_size)


@pytest.mark.parametrize("isa", engine.isas())
@pytest.mark.parametrize("name", ["residual", "twice", "pool"])
def test_every_instruction_set(alone, monkeypatch, name, isa):
    monkeypatch.setenv("MODECONN_ISA", isa)
    agrees(NETS[name], images(37), 20)


@pytest.mark.parametrize("rows, batch_size", [(5, 5), (63, 63), (129, 129), (300, 129)])
def test_rows(alone, rows, batch_size):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    agrees(rows_net, x, batch_size, np.linspace(0, 1, 9))


@pytest.mark.parametrize("spec", ["vgg11_bn:width=4", "resnet20:width=4"])
def test_networks(alone, spec):
    agrees(lambda: build(spec), images(50, 3, 32, 32), 33, [0.25, 1.0])


def test_the_variance_keeps_its_digits(alone):
    """A mean a thousand times the deviation, an odd image out, and channels that are constant."""
    x = images(40) + 1000
    x[7] -= 900
    make = lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(320, 4)
    )
    agrees(make, x, 40)
    constant = torch.full((30, 3, 12, 10), 0.1, dtype=DOUBLE)
    nets = [drawn(make, seed) for seed in (1, 2)]
    got = statistics(nets[0], mc.Line(*nets), constant, T, SINGLE, 30)
    assert (got["0.running_var"] == 0).all() and torch.isfinite(got["2.running_var"]).all()


def test_the_result_does_not_depend_on_threads():
    nets = [drawn(Residual, seed) for seed in (1, 2)]
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(
            statistics(nets[0], mc.Line(*nets), images(70), np.linspace(0, 1, 11), SINGLE, 35)
        )
    torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_nan_stays():
    x = images(20)
    x[3, 0, 0, 0] = torch.nan
    nets = [drawn(NETS["pool"], seed) for seed in (1, 2)]
    got = statistics(nets[0], mc.Line(*nets), x, T, SINGLE, 20)
    assert all(torch.isnan(value).all() for value in got.values())


def test_what_does_not_move_is_computed_once(alone):
    """Segments move different layers: norms below are shared, a chain's later ones the engine's."""
    first = drawn(Residual, 1)
    points = [first.state_dict()]
    for key in ("b1.weight", "first.weight"):
        points.append(
            {**points[-1], key: points[-1][key] + 0.1 * torch.randn_like(points[-1][key])}
        )
    path = mc.PolyChain(points)
    t = np.linspace(0, 1, 5) * path.points(2).max()
    exact = re_estimated(first, path, images(24), t, DOUBLE, 24)
    got = statistics(first, path, images(24), t, DOUBLE, 24)
    same(got, exact)
