"""A guard holds as long as a forward reads the same, and no longer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.capture.guard import Guard
from modeconn.models import build

SCALE = 1.0
TABLE = [torch.ones(3)]


def helper(x: Tensor) -> Tensor:
    return x * SCALE


class Config:
    def __init__(self) -> None:
        self.slope, self.sizes = 0.1, {"hidden": [4, 5]}


class Net(nn.Module):
    """Reads everything that a forward can read."""

    exponent = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.temperature, self.config = nn.Linear(3, 3), 1.0, Config()
        self.register_buffer("mask", torch.zeros(3), persistent=False)
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.offset, self.plain_list = torch.arange(3.0), [nn.Linear(3, 3)]
        self.function = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(helper(x)) / self.temperature + self.mask + self.offset * TABLE[0]
        return (
            self.function(x * self.config.slope) ** self.exponent + self.plain_list[0].eps
            if False
            else x
        )


def new_slope(net: Net) -> None:
    net.function = functools.partial(F.leaky_relu, negative_slope=0.2)


# What is done to a network, by name.
CHANGES: dict[str, Callable[[Net], object]] = {
    "an attribute": lambda net: setattr(net, "temperature", 1.0009),
    "an attribute's type": lambda net: setattr(net, "temperature", 1),
    "a new attribute": lambda net: setattr(net, "extra", 1),
    "a sign of zero": lambda net: net.mask.neg_(),
    "a buffer that is not saved": lambda net: net.mask.data.add_(1e-7),
    "a tensor attribute": lambda net: net.offset.data.add_(1),
    "a value deep in an object": lambda net: net.config.sizes["hidden"].append(6),
    "a partial's argument": new_slope,
    "a hook": lambda net: net.layer.register_forward_hook(lambda module, args, out: out),
    "a hook before": lambda net: net.register_forward_pre_hook(lambda module, args: args),
    "a submodule of another kind": lambda net: setattr(net, "layer", nn.Bilinear(3, 3, 3)),
    "a submodule of another size": lambda net: setattr(net, "layer", nn.Linear(3, 3, bias=False)),
    "a forward of its own": lambda net: setattr(net.layer, "forward", lambda x: x),
    "a module in a list": lambda net: setattr(net.plain_list[0], "in_features", 4),
    "the dtype of a parameter": lambda net: net.layer.double(),
    "two parameters that become one": lambda net: setattr(
        net.plain_list[0], "weight", net.layer.weight
    ),
}
# What is done to a global name, or to the class.
GLOBALS: dict[str, tuple[str, object]] = {
    "a global number of a helper": ("SCALE", 2.0),
    "a helper": ("helper", lambda x: x),
    "a tensor in a global": ("TABLE", [torch.zeros(3)]),
}
MEMBERS: dict[str, tuple[str, object]] = {
    "a class attribute": ("exponent", 2.0),
    "a method of the class": ("forward", lambda self, x: x),
}


@pytest.mark.parametrize("what", [*CHANGES, *GLOBALS, *MEMBERS])
def test_a_change_is_seen(what: str, monkeypatch: pytest.MonkeyPatch):
    net = Net()
    guard = Guard(net)
    assert guard.holds(net)
    if what in GLOBALS:
        monkeypatch.setitem(globals(), *GLOBALS[what])
    elif what in MEMBERS:
        monkeypatch.setattr(Net, *MEMBERS[what])
    else:
        CHANGES[what](net)
    assert not guard.holds(net)


def test_weights_saved_buffers_and_modes_are_the_paths():
    net = Net()
    guard = Guard(net)
    with torch.no_grad():
        net.layer.weight.add_(1)
        net.counter.add_(1)
    net.eval()
    assert guard.holds(net)


def test_a_copy_reads_the_same():
    net = Net()
    assert Guard(net).holds(copy.deepcopy(net))


def test_nan_is_equal_to_itself():
    net = Net()
    net.mask.fill_(float("nan"))
    net.temperature = float("nan")
    assert Guard(net).holds(net)


@pytest.mark.parametrize(
    "spec",
    [
        "mlp:4-5x2-3",
        "resnet20:width=2",
        "vit:width=12,layers=1,image=16,patch=8",
        "gpt:vocab=7,context=4,width=8,layers=1,heads=2",
    ],
)
def test_models_hold(spec: str):
    one, other = build(spec), build(spec)
    assert Guard(one).holds(one) and Guard(one).holds(other)


def test_what_is_recursive_ends():
    net = Net()
    net.itself = [net]  # type: ignore[assignment]
    net.cycle = {}  # type: ignore[assignment]
    net.cycle["again"] = net.cycle  # type: ignore[index]
    assert Guard(net).holds(net)


def test_globals_with_the_names_of_attributes_do_not_count(monkeypatch: pytest.MonkeyPatch):
    """`self.layer` and `self.mask` are read, and no global of those names, as notebooks have."""
    net = Net()
    for name in ("layer", "mask", "config"):
        monkeypatch.setitem(globals(), name, torch.zeros(2))
    guard = Guard(net)
    for name in ("layer", "mask", "config"):
        monkeypatch.setitem(globals(), name, torch.ones(3))
    assert guard.holds(net)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert not guard.holds(net)
