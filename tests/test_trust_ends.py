"""Control points that are modules with something else than the model's beside their weights."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(20) % 3


class Settings:
    def __init__(self) -> None:
        self.slope, self.note = 0.1, "first"


class Net(nn.Module):
    """Reads an attribute, an object, a buffer that is not saved, and its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out, self.settings = nn.Linear(6, 5), nn.Linear(5, 3), Settings()
        self.temperature, self.most, self.steps = 1.0, 1e3, 0
        self.register_buffer("scale", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.layer(x), self.settings.slope) * self.scale
        if self.out.training:
            h = h * 2
        return (self.out(h) / self.temperature).clamp(max=self.most)


class Keeps(Net):
    """A network of which eval() does not reach all."""

    def train(self, mode: bool = True) -> nn.Module:
        self.training = mode
        return self


class Doubled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def made(seed: int, kind: type[Net] = Net) -> Net:
    torch.manual_seed(seed)
    return kind()


def set_slope(net: Net) -> None:
    net.settings.slope = 0.2


def doubled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 2 * output


# What makes another network of one, and the words that name it.
OTHERS: dict[str, tuple[Callable[[Net], object], str]] = {
    "an attribute": (lambda n: setattr(n, "temperature", 0.5), "'temperature' is 0.5, and 1.0 in"),
    "an attribute deep in an object": (set_slope, "'settings.slope' is 0.2, and 0.1 in the model"),
    "a buffer that is not saved": (lambda n: n.scale.mul_(1.5), "'scale' differs"),
    "a hook": (lambda n: n.out.register_forward_hook(doubled), "'out._forward_hooks'"),
    "a hook before": (
        lambda n: n.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        "'_forward_pre_hooks'",
    ),
    "a layer of another kind": (
        lambda n: setattr(n, "layer", nn.Sequential()) or setattr(n, "layer", Shifted(n)),
        "'layer' of it is a Shifted, and a Linear in the model",
    ),
    "a forward of its own": (
        lambda n: setattr(n.out, "forward", lambda x: F.linear(x, n.out.weight)),
        "only it has 'out.forward'",
    ),
    "another class": (lambda n: setattr(n, "__class__", Doubled), "it is a Doubled, and a Net in"),
    "a class of other code": (lambda n: setattr(n, "__class__", other_class()), "it is a Net, and"),
}


class Shifted(nn.Linear):
    def __init__(self, net: Net) -> None:
        super().__init__(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def other_class() -> type[Net]:
    """As a notebook has it after the cell of the class was changed and run again."""

    class Changed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - x.sum(1, keepdim=True)

    Changed.__name__ = "Net"
    return Changed


@contextlib.contextmanager
def warned(*words: str) -> Iterator[None]:
    """One warning that has all the words."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    (text,) = [str(each.message) for each in seen]
    assert [word for word in words if word not in text] == [], text


def loss(model: Net, path: mc.Path, **options: object) -> np.ndarray:
    return mc.evaluate(model, path, (X, Y), [0.0, 1.0], progress=False, **options).loss


@pytest.mark.parametrize("what", OTHERS)
def test_an_end_that_is_another_network_is_told(what: str):
    a, b = made(0), made(1)
    change, words = OTHERS[what]
    change(b)
    right = copy.deepcopy(a)
    right.load_state_dict(b.state_dict())
    expected = F.cross_entropy(right.eval()(X), Y).item()
    with warned("control point 1 computes something else", words, "state_dict()"):
        assert loss(a, mc.Line(a, b))[1] == pytest.approx(expected, rel=1e-5)
    with warnings.catch_warnings():  # the remedy: its weights alone, with the model's attributes
        warnings.simplefilter("error")
        assert loss(a, mc.Line(a, b.state_dict()))[1] == pytest.approx(expected, rel=1e-5)


def test_modes_that_eval_does_not_reach():
    a, b = made(0, Keeps).eval(), made(1, Keeps).eval()
    a.out.training = False
    with warned("control point 1 computes something else", "'out.training' differs"):
        loss(a, mc.Line(a, b))
    b.out.training = False
    first = loss(a, mc.Line(a, b))
    a.out.training = b.out.training = True  # the graph of before is not taken up
    assert abs(loss(a, mc.Line(a, b)) - first).min() > 1e-3


@pytest.mark.parametrize("way", ["forward", "explain", "plane", "mixture", "random"])
def test_every_way_to_give_a_module_is_compared(way: str):
    a, b, c = made(0), made(1), made(2)
    b.temperature = 0.5
    with warned("computes something else", "'temperature' is"):
        if way == "forward":
            mc.forward(a, mc.Line(b, a), [0.5], X)
        elif way == "explain":
            mc.explain(a, mc.Line(a, b), X)
        elif way == "plane":
            mc.evaluate(a, mc.Plane.through(a, c, b), (X, Y), 2, progress=False)
        elif way == "mixture":
            mc.evaluate(a, mc.Mixture([a, b]), (X, Y), [(0.5, 0.5)], progress=False)
        else:
            mc.evaluate(a, mc.Plane.random(b), (X, Y), 2, progress=False)


@pytest.mark.filterwarnings("error")
def test_what_makes_no_difference_is_not_told():
    a, b = made(0), made(1).train()
    b.settings.note, b.steps = "second", 5  # no forward reads them
    b.layer.register_forward_hook(lambda module, args, output: None)
    b.settings = copy.deepcopy(b.settings)
    loss(a.eval(), mc.Line(a, b))
    drops = [nn.Sequential(nn.Linear(6, 3), nn.Dropout(p)) for p in (0.1, 0.5)]
    loss(drops[0], mc.Line(*drops))


def test_what_a_forward_reads_is_told_where_outputs_agree():
    a, b = made(0), made(1)
    b.most = 1e4
    with warned("'most' is 10000.0, and 1000.0 in the model", "outputs agree"):
        loss(a, mc.Line(a, b))


def test_half_precision_and_copies_are_the_same_network():
    a, b = made(0), made(1)
    c = copy.deepcopy(b).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = loss(a, mc.PolyChain([a, b, c]))
    assert got[1] == pytest.approx(F.cross_entropy(b.eval()(X), Y).item(), rel=1e-2)
