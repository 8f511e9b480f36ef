"""Numbers that are none of the state dict have coefficient 1 everywhere, and their own dtype."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.errors import CannotRun

WIDTH = 6
KINDS = (
    "literal factor",
    "literal bias",
    "attribute",
    "not saved",
    "whole numbers",
    "mask",
    "norm's shift",
    "weight of its own",
    "closed part",
)
BACKENDS = ["reference", *(["native"] if native.available() else [])]


class Net(nn.Module):
    """Two layers with a constant of some kind between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.constant = torch.linspace(0.5, 1.5, WIDTH)
        self.register_buffer("hidden", torch.linspace(-1.0, 1.0, WIDTH), persistent=False)
        self.register_buffer("whole", torch.arange(WIDTH) % 3)
        self.register_buffer("mask", torch.arange(WIDTH) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.between(self.first(x))))

    def between(self, h: Tensor) -> Tensor:
        factor = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.25, 3.0], dtype=h.dtype)
        match self.kind:
            case "literal factor":
                return h * factor
            case "literal bias":
                return F.linear(h, self.last.weight.T @ self.last.weight, factor) + factor
            case "attribute":
                return h * self.constant.to(h.dtype)
            case "not saved":
                return h + self.hidden
            case "whole numbers":
                return h * self.whole
            case "mask":
                return torch.where(self.mask, h, -h)
            case "norm's shift":
                return F.layer_norm(h, (WIDTH,), self.scale, self.hidden)
            case "weight of its own":
                return F.linear(h, torch.diag(factor), factor)
            case _:
                return h * self.hidden if float(h.detach().sum()) < 1e9 else h


def made(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net(kind).eval()


def plain(model: nn.Module, path: mc.Path, t: object, x: Tensor) -> Tensor:
    """The outputs of a float64 network for each point, with the path's parameters alone."""
    outputs = []
    points = path.points(t)
    for row in path.coefficients(points).tolist():
        network = copy.deepcopy(model).double()
        state = {}
        for key, value in path.control_points[0].items():
            tensors = [point[key] for point in path.control_points]
            moved = sum(c * tensor.double() for c, tensor in zip(row, tensors))
            state[key] = moved if value.is_floating_point() else value
        network.load_state_dict(state)
        with torch.no_grad():
            outputs.append(network(x.double()))
    return torch.stack(outputs)


def paths(a: nn.Module, b: nn.Module, c: nn.Module) -> dict[str, tuple[mc.Path, object]]:
    """Paths of every class, with points whose coefficients sum to many things."""
    networks = [each.state_dict() for each in (a, b, c)]
    plane = [(0.0, 0.0), (0.5, 0.5), (-0.5, -0.75), (1.0, 1.0)]
    mixed = [(0.25, 0.0, 0.0), (0.5, 0.5, 0.0), (1.0, 0.5, 0.5), (-2.0, 0.5, 0.5), (0.0, 0.0, 0.0)]
    return {
        "line": (mc.Line(*networks[:2]), [0.0, 0.3, 1.0, 1.7, 5.0]),
        "chain": (mc.PolyChain(networks), [0.0, 0.2, 0.5, 0.9, 3.0]),
        "bezier": (mc.Bezier(networks), [0.0, 0.4, 1.0, -2.0]),
        "through": (mc.Plane.through(*networks), plane),
        "random": (mc.Plane.random(a, biases=True), plane),
        "trajectory": (mc.Plane.trajectory(networks), plane),
        "mixture": (mc.Mixture(networks), mixed),
    }


def close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert float((got.double() - exact).abs().max()) <= tolerance * max(
        1.0, float(exact.abs().max())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_constants_are_not_scaled(kind):
    a, b, c = (made(kind, seed) for seed in range(3))
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(10) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a closed part is told of
        for path, t in paths(a, b, c).values():
            exact = plain(a, path, t, x)
            close(mc.forward(a, path, t, x, precision="float64"), exact, 1e-12)
            losses = [float(F.cross_entropy(each, y)) for each in exact]
            for backend in BACKENDS:
                try:
                    result = mc.evaluate(a, path, (x, y), t, backend=backend, progress=False)
                except CannotRun:  # there is nothing that the engine has
                    continue
                np.testing.assert_allclose(result.loss, losses, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sums", [0.25, 1.0, 2.0, -1.0])
def test_statistics_of_the_start_are_not_scaled(sums):
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        model[1].running_var.uniform_(0.5, 2.0)
        model[1].running_mean.normal_()
        return model.eval()

    a, b = network(0), network(1)
    x = torch.randn(7, 4)
    path = mc.Mixture([a, b])
    held = mc.Mixture([a, b.state_dict() | {k: v for k, v in a.state_dict().items() if "run" in k}])
    got = mc.forward(a, path, [(0.75 * sums, 0.25 * sums)], x, buffers="start")
    network = copy.deepcopy(a).double()
    state = held.at([(0.75 * sums, 0.25 * sums)])
    state |= {key: value for key, value in a.state_dict().items() if "running" in key}
    network.load_state_dict(state)
    with torch.no_grad():
        close(got[0], network(x.double()), 2e-6)


@pytest.mark.parametrize("kind", ["literal bias", "norm's shift"])
def test_gradients_go_past_constants(kind):
    a, b = made(kind, 0).double(), made(kind, 1).double()
    path = mc.Mixture([a.state_dict(), b.state_dict()])
    for point in path.control_points:
        for value in point.values():
            value.requires_grad_(value.is_floating_point())
    x, t = torch.randn(5, 4, dtype=torch.float64), (0.5, 1.0)
    mc.forward(a, path, [t], x, precision="float64").square().sum().backward()
    got = path.control_points[1]["first.weight"].grad
    moved = {
        key: t[0] * path.control_points[0][key].detach() + t[1] * value.detach()
        if value.is_floating_point()
        else value
        for key, value in path.control_points[1].items()
    }
    moved["first.weight"].requires_grad_()
    torch.func.functional_call(copy.deepcopy(a), moved, (x,)).square().sum().backward()
    close(got, t[1] * moved["first.weight"].grad, 1e-12)


class Narrow(nn.Module):
    """A float32 constant in a network of any dtype: its root is rounded before it is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        root = torch.sqrt(torch.tensor([24.0, 25.0, 26.0], dtype=torch.float32))
        return self.layer(x) / root.to(x.dtype)


class Wide(nn.Module):
    """A float64 constant that float32 does not have, in the middle of a float32 network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tiny = torch.full((3,), 1e-60, dtype=torch.float64)
        return self.last((self.layer(x) * tiny * 1e60).to(x.dtype))


class Threshold(nn.Module):
    """A float64 number that float32 rounds to 1, compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.where(
            (h > 0).double() < torch.tensor(1 + 1e-9, dtype=torch.float64), h, -h.abs()
        )


@pytest.mark.parametrize("network", [Narrow, Wide, Threshold])
@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_keep_their_dtype(network, backend):
    torch.manual_seed(0)
    a, b = network().eval(), network().eval()
    path, t, x = mc.Mixture([a, b]), [(1.0, 0.0), (0.5, 0.5), (0.5, 1.0)], torch.randn(6, 4)
    exact = plain(a, path, t, x)
    for precision, tolerance in (("float64", 1e-15), ("float32", 1e-6)):
        try:
            got = mc.forward(a, path, t, x, precision=precision, backend=backend)
        except CannotRun:
            continue
        close(got, exact, tolerance)
