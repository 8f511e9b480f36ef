"""Zeros, subnormal and huge numbers, infinities and NaN: finite, infinite or NaN as in PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from extreme_cases import BACKENDS, EXTREMES, FINITE, agrees, assert_same_kind, changed
from modeconn.parameters.blending import blend
from naive import mlp

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(not finite|interpolated)"),
    pytest.mark.parametrize("backend", BACKENDS),
]

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(3, 6, generator=G), torch.tensor([0, 1, 3])
IMAGES = torch.randn(2, 2, 8, 8, generator=G)
TARGETS = {"cross_entropy": Y, "mse": torch.randn(3, 4, generator=G)}
TARGETS["bce"] = torch.rand(3, 4, generator=G)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return mlp(6, 9, 7, 4, seed=0), mlp(6, 9, 7, 4, seed=1)


class Images(nn.Module):
    """Two convolutions, the second by Winograd in the engine, a norm, a pooling."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm = nn.Conv2d(2, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.second, self.last = nn.Conv2d(20, 20, 3, padding=1), nn.Linear(320, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.max_pool2d(self.second(x), 2).flatten(1))


@pytest.fixture(scope="module")
def images() -> tuple[nn.Module, nn.Module]:
    return Images(0).eval(), Images(1).eval()


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("value", EXTREMES)
def test_an_input(pair, backend, loss, value):
    """Where all moves, and where the logits, or the first layer's values, are combined."""
    a, b = pair
    x = X.clone()
    x[1, 2] = value
    agrees(a, mc.Line(a, b), x, TARGETS[loss], backend, loss, t=(0, 0.5))
    if loss == "cross_entropy":
        for key in ("0.weight", "4.weight"):
            agrees(a, mc.Line(a, changed(a, key, 0.5)), x, Y, backend, t=(0, 0.5))


@pytest.mark.parametrize("value", EXTREMES)
def test_an_input_that_nothing_reads(pair, backend, value):
    """Zero times an infinity is NaN, whether the planner knows the weights to be zero or not."""
    a, _ = pair
    x = X.clone()
    x[1, 2] = value
    state = a.state_dict()
    first = state | {"0.weight": state["0.weight"] * (torch.arange(6) != 2)}
    agrees(a, mc.Line(first, first | {"4.bias": state["4.bias"] + 1}), x, Y, backend, t=(0, 1))


@pytest.mark.parametrize("key", ["0.weight", "2.weight", "4.bias"])
@pytest.mark.parametrize("value", FINITE[1:])
def test_a_weight(pair, backend, key, value):
    """At one end; of opposite signs at both, with a difference that is too large, and alone."""
    a, b = pair
    t = (0, 0.5, 1)
    agrees(a, mc.Line(changed(a, key, value), b), X, Y, backend, t=t)
    if abs(value) > 1:
        agrees(a, mc.Line(changed(a, key, value), changed(b, key, -value)), X, Y, backend, t=t)
        agrees(a, mc.Line(changed(a, key, value), changed(a, key, -value)), X, Y, backend, t=t)


@pytest.mark.parametrize("value", [v for v in EXTREMES if v not in FINITE])
def test_a_weight_that_is_not_finite_is_refused(pair, backend, value):
    a, b = pair
    with pytest.raises(mc.ModeconnError, match="finite"):
        mc.evaluate(a, mc.Line(changed(a, "2.weight", value), b), (X, Y), 3, backend=backend)


@pytest.mark.parametrize(
    "key, value",
    [
        ("first.weight", 1e20),
        ("norm.weight", 3e38),
        ("norm.running_mean", -1e20),
        ("norm.running_var", 3e38),
        ("norm.running_var", 0.0),
        ("second.weight", -1e20),
        ("second.weight", 3e38),
    ],
)
def test_a_weight_of_images(images, backend, key, value):
    a, b = images
    agrees(a, mc.Line(changed(a, key, value), b), IMAGES, Y[:2], backend, t=(0, 0.5))


@pytest.mark.parametrize("value", EXTREMES[2:])
def test_a_pixel(images, backend, value):
    a, b = images
    x = IMAGES.clone()
    x[0, 1, 3, 3] = value
    agrees(a, mc.Line(a, b), x, Y[:2], backend, t=(0.5,))


@pytest.mark.parametrize("value", EXTREMES)
def test_weights_of_classes(pair, backend, value):
    """As PyTorch's own mean has it, with labels left out and smoothing."""
    a, b = pair
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, value, 0.5, 2.0]), ignore_index=1, label_smoothing=0.1
    )
    got = mc.evaluate(a, mc.Line(a, b), (X, Y), [0.0], loss=loss, metrics="loss", backend=backend)
    plain = loss(a(X), Y).item()
    exact = copy.deepcopy(loss).double()(copy.deepcopy(a).double()(X.double()), Y).item()
    assert_same_kind("loss", got.loss, [plain], [exact])


@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_a_label_that_is_no_class_is_refused(pair, backend, label):
    a, b = pair
    labels = torch.tensor([0, label, 1])
    with pytest.raises(mc.ModeconnError, match="out of range"):
        mc.evaluate(a, mc.Line(a, b), (X, labels), 3, backend=backend)


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_a_target(pair, backend, loss, value):
    a, b = pair
    y = TARGETS[loss].clone()
    y[1, 2] = value
    agrees(a, mc.Line(a, b), X, y, backend, loss, t=(0.5,))


def test_outputs(pair, backend):
    a, _ = pair
    x = X.clone()
    x[1, 2] = 3e38
    path = mc.Line(changed(a, "0.weight", 3e38), changed(a, "0.weight", -3e38))
    got = mc.forward(a, path, [0.5], x, backend=backend)[0]
    model = copy.deepcopy(a)
    model.load_state_dict(path.at(0.5))
    torch.testing.assert_close(got, model(x).detach(), equal_nan=True)


def test_differences_that_are_too_large(backend):
    a, b = torch.tensor([3e38, -3e38, 1.0]), torch.tensor([-3e38, 3e38, 3.0])
    assert blend([a, b], [0.5, 0.5]).tolist() == [0, 0, 2]
    assert blend([a, b], [0.25, 0.75])[0] == pytest.approx(-1.5e38)


class Computed(nn.Module):
    """A product of parameters alone, and one of which the weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 6))
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        computed = F.linear(x, F.linear(self.first, self.second.t()))
        return self.last(x) + computed + F.linear(self.second, self.last.weight).sum()


@pytest.mark.parametrize("value", EXTREMES)
def test_products_of_parameters(backend, value):
    torch.manual_seed(0)
    model, x = Computed(), X.clone()
    x[1, 2] = value
    agrees(model, mc.Line(model, changed(model, "last.bias", 0.5)), x, Y, backend, t=(0, 0.5))
