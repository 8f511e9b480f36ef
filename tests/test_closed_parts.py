"""Parts of a network that cannot be captured run as they are; the plan says which and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.capture.export import capture, run
from naive import clone, pass_per_point
from policy import assert_within_policy


class Branch(nn.Module):
    """Branches on the data; `sign` is a parameter of its own, the norm has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.sign = (
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Parameter(torch.tensor(-1.0)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        return x if bool(x.isfinite().all()) else self.sign * x


class Halved(torch.autograd.Function):
    """A custom function through NumPy, which no tracer sees through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(0.5 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.5 * gradient


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(x)


class Several(nn.Module):
    """Keyword arguments; several outputs, one of other sizes, one a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, *, scale: float, other: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.layer(x) * scale
        return (y if float(y.detach().sum()) < 1e9 else -y), {
            "pairs": torch.cat([x, other]).reshape(2 * len(x), 8),
            "scale": scale,
        }


class UsesSeveral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several, self.head = Several(), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, more = self.several(x, scale=0.5, other=x + 1)
        return self.head(y) + more["scale"] * more["pairs"][: x.shape[0]]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (hidden, _) = self.lstm(x.view(-1, 2, 4))
        return outputs[:, -1] + hidden[-1]


def network(middle: nn.Module, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Sequential(nn.Linear(8, 8), copy.deepcopy(middle)),
        nn.Linear(8, 3),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


X, Y = torch.randn(37, 6, generator=torch.Generator().manual_seed(0)), torch.arange(37) % 3
PARTS = {"branch": Branch(), "function": Function(), "several": UsesSeveral(), "lstm": Recurrent()}
CLOSED = {"branch": "2.1", "function": "2.1", "several": "2.1.several", "lstm": ""}
pytestmark = [
    pytest.mark.usefixtures("fresh_graphs"),
    pytest.mark.filterwarnings("ignore:part of the model runs as it is"),
    pytest.mark.filterwarnings("ignore:batch norms .* interpolated"),
]


@pytest.mark.parametrize("name", PARTS)
def test_only_the_part_runs_as_it_is(name):
    model, other = (network(PARTS[name], seed) for seed in (1, 2))
    graph = capture(model.eval(), X)
    closed = [node.function.path for node in graph.nodes if node.op == "module"]
    assert graph.fallback is None and closed == ([CLOSED[name]] if CLOSED[name] else [])
    assert {"linear", "relu"} <= {node.op for node in graph.nodes} and not graph.mixes_rows
    for rows in (1, 2, 7):
        torch.testing.assert_close(run(graph, model.state_dict(), X[:rows]), model(X[:rows]))
    path = mc.Line(model, other)
    got = mc.evaluate(model, path, (X, Y), 5)
    plain, exact = (
        pass_per_point(model, path, X, Y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)
    rows = mc.explain(model, path, X, 5).nodes(mc.explain(model, path, X, 5).program.segments[0])
    assert rows[0]["class"] == "combination", "the first layer is still one"


def test_the_part_and_the_line_are_named():
    model, other = (network(PARTS["branch"], seed) for seed in (1, 2))
    path = mc.Line(model, other)
    with pytest.warns(
        UserWarning,
        match=r"part of the model runs as it is.*2\.1 \(Branch\): test_closed_parts\.py:\d+: torch",
    ):
        result = mc.evaluate(model, path, (X, Y), 3)
    assert "2.1 (Branch)" in result.info["fallback"]
    plan = mc.explain(model, path, X, 3)
    line = next(line for line in str(plan).splitlines() if line.lstrip().startswith("module"))
    assert "test_closed_parts.py:" in line and "the module itself, per point" in line
    assert plan.to_json()["closed"] == [next(iter(plan.program.graph.closed))]


def test_what_is_below_the_part_is_shared():
    model = network(PARTS["branch"], 1)
    swung = clone(model)
    swung["3.weight"] += 1.0
    plan = mc.explain(model, mc.Line(model, swung), X, 101)
    (segment,) = plan.program.segments
    assert [row["class"] for row in plan.nodes(segment)][-2:] == ["constant", "combination"]
    assert plan.point_flops == 101 * 2 * 2 * 3, (
        "the closed part runs once, whatever the number of points"
    )


def test_its_statistics_are_recomputed():
    model, other = (network(PARTS["branch"], seed).double() for seed in (1, 2))
    path, x = mc.Line(model, other), X.double()
    before = clone(model)
    got = mc.evaluate(
        model, path, (x, Y), [0.4, 1.0], buffers="recompute", batch_size=20, precision="float64"
    )
    for t, loss in zip(got.t, got.loss):
        network_at = copy.deepcopy(model)
        network_at.load_state_dict(path.at(t))
        norm = network_at[2][1].norm
        norm.reset_running_stats()
        norm.momentum = None
        with torch.no_grad():
            for batch in x.split(20):
                network_at.train()(batch)
            expected = nn.functional.cross_entropy(network_at.eval()(x), Y)
        assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[2][1].norm.momentum == 0.1 and all(module.training for module in model.modules())


def test_hooks_run_once_and_stay():
    """A hook of a closed part belongs to it; the module keeps its hooks and its forward."""
    model = network(PARTS["branch"], 1).eval()
    part = model[2][1]
    part.register_forward_hook(lambda module, args, output: 2 * output)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    graph = capture(model, X)
    torch.testing.assert_close(run(graph, model.state_dict(), X), model(X))
    assert (
        graph.fallback is None
        and [dict(module._forward_hooks) for module in model.modules()] == hooks
    )
    assert "forward" not in part.__dict__


def test_where_the_sizes_do_not_follow_the_next_larger_part_is_closed():
    class Ragged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = x[x[:, 0] > x[:, 0].mean()]
            return kept if float(kept.detach().sum()) < 1e9 else -kept

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ragged = Ragged()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.ragged(x).sum(0)

    graph = capture(network(Outer(), 1).eval(), X)
    assert [node.function.path for node in graph.nodes if node.op == "module"] == [
        "2.1"
    ] and graph.mixes_rows


def test_the_networks_own_forward_closes_all_of_it():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(PARTS["branch"], 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.detach().sum()) < 1e9 else x

    graph = capture(Whole().eval(), X)
    assert graph.fallback is not None and "test_closed_parts.py:" in graph.fallback
