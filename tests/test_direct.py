"""Graphs of common layers are those of torch.export; what is not known is left to it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.capture.direct import direct_graph
from modeconn.capture.export import _export, capture, run
from modeconn.capture.graph import Graph, Size
from modeconn.capture.quiet import quietly
from modeconn.models import build

ROWS, IMAGES = (4, 8), (4, 3, 16, 16)


class Mixed(nn.Module):
    """Every function that is known, in the ways in which they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 6, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False)
        self.line, self.layer_norm = nn.Conv1d(6, 5, 3), nn.LayerNorm(5)
        self.last, self.drop = nn.Linear(5, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2, 2)
        y = torch.tanh(self.down(x)).sigmoid()
        y += F.silu(y)
        z = F.adaptive_avg_pool2d(F.gelu(y), 2).flatten(2)
        z = F.elu(self.line(F.pad(z, (0, 1)) if z.dim() == 2 else torch.add(z, z).relu_()))
        return F.log_softmax(self.last(self.drop(self.layer_norm(z.mean(-1)))), dim=-1)


class Residual(nn.Module):
    """Blocks around which values go, with everything in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(self.first(x)) if x.dim() == 3 else self.first(x).relu_()
        y = self.norm(self.second(x))
        y += x
        return self.last(torch.flatten(F.adaptive_avg_pool2d(F.relu_(y), (1, 1)), 1))


def layers() -> nn.Module:
    return nn.Sequential(
        *[nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True)],
        *[nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.AvgPool2d(2)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 3), nn.Softmax(1)],
    )


# By name: what makes a network, and the shape of its input.
KNOWN = {
    "mlp": (lambda: build("mlp:8-6x2-3"), ROWS),
    "vgg": (lambda: build("vgg11_bn:width=4"), (4, 3, 32, 32)),
    "layers": (layers, IMAGES),
    "residual": (Residual, IMAGES),
}


def prepared(make: object) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_it_is_the_graph_of_torch_export(name: str):
    make, shape = KNOWN[name]
    model, x = prepared(make), torch.randn(shape)
    made, expected = direct_graph(model, x.clone()), exported(model, x)
    assert made is not None
    assert described(made) == described(expected)
    other = torch.randn(7, *shape[1:])
    torch.testing.assert_close(run(made, model.state_dict(), other), model(other))


def exported(model: nn.Module, x: Tensor) -> Graph:
    with quietly():
        return _export(model, x)


def described(graph: Graph) -> list[object]:
    nodes = [
        (n.id, n.op, n.function, plain(n.arguments), n.inputs, n.entries, plain(n.shape), n.source)
        for n in graph.nodes
    ]
    return [*nodes, graph.output, [*graph.constants], graph.inputs]


def plain(item: object) -> object:
    """Sizes as text; two functions of the rows are never equal."""
    if isinstance(item, dict):
        return {name: plain(each) for name, each in item.items()}
    if isinstance(item, (list, tuple)):
        return [*map(plain, item)]
    return item.text if isinstance(item, Size) else item


@torch.no_grad()
def test_every_function_is_as_torch_export_has_it():
    model, x = prepared(Mixed), torch.randn(IMAGES)
    made = direct_graph(model, x.clone())
    assert made is not None
    assert described(made) == described(exported(model, x))


# -- what is left to torch.export ------------------------------------------------------------------


class Ways(nn.Module):
    """Does something that is not known, by name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.last = way, nn.Linear(8, 8), nn.Linear(8, 3)
        self.plain = [torch.ones(8)]
        if way == "tied":
            self.last = nn.Linear(8, 8)
            self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.way == "shape":
            h = h[: x.shape[0]]
        elif self.way == "numbers decide":
            h = h if h.sum() > 0 else -h
        elif self.way == "caught":
            try:
                h = h.cumsum(1)
            except Exception:
                h = h.relu()
        elif self.way == "never read":
            self.last(h).relu()
        elif self.way == "a plain tensor":
            h = F.linear(h, torch.eye(8), self.plain[0])
        elif self.way == "other dtype":
            h = torch.relu(h.double()).float()
        elif self.way == "over rows":
            h = h.softmax(0)
        elif self.way == "weights":
            h = F.linear(h, torch.tanh(self.first.weight))
        elif self.way == "several":
            return self.last(h), h  # type: ignore[return-value]
        return self.last(h)


WAYS = (
    "shape|numbers decide|caught|never read|a plain tensor|other dtype|"
    "over rows|weights|several|tied"
).split("|")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_known_is_left(way: str):
    model = prepared(lambda: Ways(way))
    assert direct_graph(model, torch.randn(4, 8)) is None
    assert direct_graph(prepared(lambda: Ways("")), torch.randn(4, 8)) is not None


class UnderAView(nn.Module):
    """Writes in place what another value is a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        flat = h.flatten(1)
        h.relu_()
        return self.last(flat)


def test_writing_under_a_view_is_left():
    x = torch.randn(4, 2, 8)
    model = prepared(UnderAView)
    assert direct_graph(model, x) is None
    torch.testing.assert_close(run(capture(model, x), model.state_dict(), x), model(x))


def test_compiled_parts_are_seen_through():
    model = prepared(lambda: Ways(""))
    expected = direct_graph(model, torch.randn(4, 8))
    model.first.forward = torch.compile(model.first.forward, backend="eager")
    made = direct_graph(model, torch.randn(4, 8))
    assert made is not None and expected is not None
    assert [node.op for node in made.nodes] == [node.op for node in expected.nodes]


def test_inputs_of_other_kinds_are_left():
    model = prepared(lambda: Ways(""))
    assert direct_graph(model, (torch.randn(4, 8),)) is None
    assert direct_graph(model, torch.randn(8)) is None
    assert direct_graph(nn.Embedding(5, 3).eval(), torch.zeros(4, 2, dtype=torch.long)) is None


SCRIPT = """
import sys, torch, modeconn as mc
net = lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
a, b = net(), net()
mc.evaluate(a, mc.Line(a, b), (torch.randn(9, 4), torch.arange(9) % 3), 5, progress=False)
sys.exit(any(name in sys.modules for name in ("torch._dynamo", "torch.export._trace", "sympy")))
"""


def test_torch_export_is_not_loaded_for_them():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(inplace=True)])
def test_a_network_that_writes_to_its_input_leaves_the_data(first: nn.Module) -> None:
    model = nn.Sequential(first, nn.Linear(6, 3)).eval()
    x = torch.randn(3, 6)  # as many rows as are traced with
    before = x.clone()
    with torch.no_grad():
        assert direct_graph(model, x) is not None
    assert torch.equal(x, before)
