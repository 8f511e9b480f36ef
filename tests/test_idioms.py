"""Many ways of writing one thing: one name in the graph, one subgraph of the engine for all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.backends.native.partition import straight_steps, whole_subgraph
from modeconn.capture.export import capture
from modeconn.errors import Unsupported
from naive import pass_per_point
from policy import assert_within_policy

X = torch.randn(37, 3, 9, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(37) % 10


class Net(nn.Module):
    """A convolution, what a test puts behind it, and a linear layer, if its width is given."""

    def __init__(
        self, forward: Callable[[Net, Tensor], Tensor], width: int | None, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 6, 3, padding=1), forward
        if width is not None:
            self.head = nn.Linear(width, 10)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        y = self.way(self, self.conv(x))
        return self.head(y) if hasattr(self, "head") else y


def behind(
    forward: Callable[[Net, Tensor], Tensor],
    width: int | None = 6,
    **parts: Callable[[], nn.Module],
) -> list[Net]:
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Net(forward, width, **{name: make() for name, make in parts.items()}).eval())
    return nets


def shortcut(net: Net, x: Tensor) -> Tensor:
    """Without weights: every other pixel, and channels of zeros."""
    x = torch.relu(x)
    return (net.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4))).mean((2, 3))


ROWS = {
    "flatten": lambda net, x: torch.flatten(x.relu(), 1),
    "view, rows counted": lambda net, x: x.relu().view(x.size(0), -1),
    "view, rows left open": lambda net, x: x.relu().view(-1, 6 * 72),
    "reshape": lambda net, x: x.relu().reshape(x.shape[0], -1),
}
PIXELS = {
    "mean": lambda net, x: x.relu().mean((2, 3)),
    "mean, kept": lambda net, x: x.relu().mean((2, 3), keepdim=True).flatten(1),
    "means one by one": lambda net, x: x.relu().mean(-1).mean(-1),
    "means, rows first": lambda net, x: x.relu().mean(2).mean(2),
    "maximum": lambda net, x: x.relu().amax((2, 3)),
    "squeezed": lambda net, x: F.adaptive_avg_pool2d(x.relu(), 1).squeeze(-1).squeeze(-1),
    "squeezed at once": lambda net, x: F.adaptive_avg_pool2d(x.relu(), 1).squeeze((2, 3)),
    "indexed": lambda net, x: F.adaptive_avg_pool2d(x.relu(), (1, 1))[:, :, 0, 0],
    "relu6": lambda net, x: F.relu6(4 * x).mean((2, 3)),
    "clamp to six": lambda net, x: x.clamp(0, 6).mean((2, 3)),
    "clamp": lambda net, x: x.clamp(min=0).mean((2, 3)),
    "hardtanh": lambda net, x: F.hardtanh(x, 0, 6).mean((2, 3)),
    "hardsigmoid": lambda net, x: F.hardsigmoid(x).mean((2, 3)),
    "hardswish": lambda net, x: F.hardswish(x).mean((2, 3)),
    "elu": lambda net, x: F.elu(x, 0.3).mean((2, 3)),
    "selu": lambda net, x: F.selu(x).mean((2, 3)),
    "softplus": lambda net, x: F.softplus(x).mean((2, 3)),
    "mish": lambda net, x: F.mish(x).mean((2, 3)),
    "log sigmoid": lambda net, x: F.logsigmoid(x).mean((2, 3)),
}
PARTS = {
    "rounded up": (lambda net, x: F.max_pool2d(x.relu(), 2, ceil_mode=True).mean((2, 3)), {}),
    "shortcut": (shortcut, {"down": lambda: nn.Conv2d(6, 12, 3, 2, 1)}),
    "gate of channels": (
        lambda net, x: (net.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid() * x.relu()).mean((2, 3)),
        {"gate": lambda: nn.Conv2d(6, 6, 1)},
    ),
    "gated": (
        lambda net, x: (x.tanh() * net.gate(x).sigmoid()).mean((2, 3)),
        {"gate": lambda: nn.Conv2d(6, 6, 1)},
    ),
    "square": (lambda net, x: (x * x).mean((2, 3)), {}),
    "numbers": (lambda net, x: (1.5 - (0.5 * x.relu() - 2) / 3 + 1).neg().mean((2, 3)), {}),
    "one entry for all": (
        lambda net, x: (net.scale.weight * x.relu() + net.scale.bias).mean((2, 3)),
        {"scale": lambda: nn.BatchNorm1d(1)},
    ),
    "entries of channels": (
        lambda net, x: (x.relu() - net.shift[0]).mean((2, 3)) * net.scale.weight,
        {
            "scale": lambda: nn.BatchNorm1d(6),
            "shift": lambda: nn.ParameterList([torch.randn(6, 1, 1)]),
        },
    ),
    "branch scaled by an entry": (
        lambda net, x: (x + net.scale.weight * net.more(x.relu())).relu().mean((2, 3)),
        {"scale": lambda: nn.BatchNorm1d(1), "more": lambda: nn.Conv2d(6, 6, 3, padding=1)},
    ),
    "group norm": (
        lambda net, x: net.norm(net.more(x)).relu().mean((2, 3)),
        {"more": lambda: nn.Conv2d(6, 12, 1), "norm": lambda: nn.GroupNorm(4, 12)},
    ),
    "group norm without weights": (
        lambda net, x: net.norm(net.more(x)).mean((2, 3)).tanh(),
        {"more": lambda: nn.Conv2d(6, 12, 1), "norm": lambda: nn.GroupNorm(3, 12, affine=False)},
    ),
    "layer norm": (
        lambda net, x: net.norm(net.more(x.mean((2, 3)))).relu(),
        {"more": lambda: nn.Linear(6, 12), "norm": lambda: nn.LayerNorm(12, eps=0.1)},
    ),
    "layer norm without bias": (
        lambda net, x: net.norm(net.more(x.mean((2, 3)))).relu(),
        {"more": lambda: nn.Linear(6, 12), "norm": lambda: nn.LayerNorm(12, bias=False)},
    ),
}
NETS = {
    **{name: lambda way=way: behind(way, 6 * 72) for name, way in ROWS.items()},
    **{name: lambda way=way: behind(way) for name, way in PIXELS.items()},
    **{
        name: lambda way=way, parts=parts: behind(
            way, 12 if "norm" in parts or "down" in parts else 6, **parts
        )
        for name, (way, parts) in PARTS.items()
    },
}


@pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.reason()}")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", NETS)
def test_each_is_one_subgraph_of_the_engine(name, precision):
    a, b = NETS[name]()
    for net in (a, b):
        for norm in net.modules():
            if (
                isinstance(norm, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d))
                and norm.weight is not None
            ):
                nn.init.normal_(norm.weight)
    path = mc.Line(a, b)
    program = mc.explain(a, path, X, 3).program
    whole_subgraph(program, program.segments[0])  # does not raise
    got = mc.evaluate(a, path, (X, Y), 5, backend="native", precision=precision)
    dtype = getattr(torch, precision)
    plain, exact = (pass_per_point(a, path, X, Y, got.t, d) for d in (dtype, torch.float64))
    for metric in ("loss", "error"):
        assert_within_policy(metric, got.values[metric], plain[metric], exact[metric], dtype)


@pytest.mark.parametrize("name", [*ROWS, *PIXELS])
def test_graphs_have_one_name_for_it(name):
    (net, _) = NETS[name]()
    ops = {net.nodes[i].op for net in [capture(net, X)] for i in _needed(net)}
    assert not ops & {"view", "reshape", "squeeze", "select", "slice"} or name == "squeezed at once"
    if name.startswith("means"):
        assert "flatten" not in ops


def _needed(graph: object) -> set[int]:
    """The nodes that lead to the output."""
    found, left = set(), list(graph.outputs())
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph.nodes[node].inputs
    return found


@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: x[:, :, 1:, 1:].mean((2, 3)),
        lambda net, x: x[:, 1:4, :, :].repeat(1, 2, 1, 1).mean((2, 3)),
        lambda net, x: F.pad(x, (1, 1, 1, 1, 0, 0)).mean((2, 3)),
        lambda net, x: F.pad(x, (0, 0, 0, 0, 1, -1), value=0.0).mean((2, 3)),
        lambda net, x: (x * x.mean(1, keepdim=True)).mean((2, 3)),
        lambda net, x: (x + x.mean((2, 3), keepdim=True)).mean((2, 3)),
        lambda net, x: (2 / (3 + x.relu())).mean((2, 3)),
        lambda net, x: (x * torch.arange(8.0)).mean((2, 3)),
        lambda net, x: torch.sub(x, 2, alpha=3).mean((2, 3)),
        lambda net, x: torch.add(x, x.relu(), alpha=3).mean((2, 3)),
        lambda net, x: F.adaptive_avg_pool2d(x, 1).select(1, 2).squeeze(-1).expand(-1, 6),
        lambda net, x: x.mean((1, 2, 3), keepdim=True)[:, :, 0, 0] * net.head.weight[0],
        lambda net, x: x.mean((1, 2, 3))[:, None] * net.head.weight[0],
        lambda net, x: x.flatten(2)[:, :, 3:4].transpose(1, 2).relu().select(1, 0),
        lambda net, x: (x.flatten(2) * x.mean((2, 3))[:, :, None]).mean(2),
        lambda net, x: x.mean(1).mean(1)[:, :6],
        lambda net, x: x.clamp(-1, 1).mean((2, 3)),
        lambda net, x: F.softplus(x, beta=2).mean((2, 3)),
        lambda net, x: x.mean(3).permute(0, 2, 1)[:, :6].mean(-1),
        lambda net, x: F.layer_norm(x, (9, 8)).mean((2, 3)),
        lambda net, x: F.group_norm(x.flatten(2), 2).mean(2),
    ],
)
def test_what_looks_alike_is_not_taken_for_it(way):
    a, b = behind(way)
    path = mc.Line(a, b)
    got = mc.evaluate(a, path, (X, Y), 3)
    np.testing.assert_allclose(
        got.loss, pass_per_point(a, path, X, Y, got.t, torch.float64)["loss"], rtol=1e-6
    )


def test_plain_chains_have_fewer_activations():
    """Those that kernels for GPUs have."""
    torch.manual_seed(0)
    a, b = (
        nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Mish(), nn.Linear(9, 10))
        for _ in range(2)
    )
    program = mc.explain(a, mc.Line(a, b), torch.randn(5, 6), 3).program
    whole_subgraph(program, program.segments[0])  # does not raise
    with pytest.raises(Unsupported, match=r"^mish \(2\): the engine runs .* activations$"):
        straight_steps(program, program.segments[0], "cuda")


@pytest.mark.parametrize("axis", [1, -1])
def test_log_softmax_before_cross_entropy_is_left_out(axis):
    a, b = behind(
        lambda net, x: F.log_softmax(net.out(x.relu().mean((2, 3))), axis),
        None,
        out=lambda: nn.Linear(6, 10),
    )
    path = mc.Line(a, b)
    got = mc.evaluate(a, path, (X, Y), 5)
    exact = pass_per_point(a, path, X, Y, got.t, torch.float64)
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-6)
    np.testing.assert_array_equal(got.error, exact["error"])
    assert got.backend == ("native" if native.available() else "reference")
    nll = mc.evaluate(a, path, (X, Y), 5, loss=lambda out, y: F.nll_loss(out, y, reduction="none"))
    np.testing.assert_allclose(nll.loss, exact["loss"], rtol=1e-6)
    squares = mc.evaluate(a, path, (X, F.one_hot(Y, 10).float()), 5, loss="mse")
    assert (squares.loss > 5).all()  # of the logarithms


def test_log_softmax_over_other_axes_stays():
    a, b = behind(
        lambda net, x: F.log_softmax(net.out(x.relu().mean((2, 3))), 0),
        None,
        out=lambda: nn.Linear(6, 10),
    )
    path = mc.Line(a, b)
    with pytest.warns(UserWarning, match="depend"):
        got = mc.evaluate(a, path, (X, Y), 3, batch_size=37)
    np.testing.assert_allclose(
        got.loss, pass_per_point(a, path, X, Y, got.t, torch.float64)["loss"], rtol=1e-6
    )
