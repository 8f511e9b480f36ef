"""Layer-wise tables: a loop over layers and points, in one pass that shares what does not move."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.capture.optimisations import without
from naive import clone, mlp

X, Y = torch.randn(33, 12, generator=torch.Generator().manual_seed(0)), torch.arange(33) % 5
WIDTHS = (12, 11, 11, 11, 11, 11, 5)


def residual(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x.mean((2, 3)))


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.passes = x, y, 0

    def __iter__(self):
        self.passes += 1
        return zip(self.x.split(10), self.y.split(10))


def by_loop(
    model: nn.Module,
    a: dict[str, Tensor],
    b: dict[str, Tensor],
    t: np.ndarray,
    mode: str,
    x: Tensor,
) -> np.ndarray:
    """A pass for each layer and t, in float64."""
    network = copy.deepcopy(model).double()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in a))
    rows = []
    for place, layer in enumerate(layers):
        moving = [layer] if mode == "single" else layers[: place + 1]
        for each in t:
            state = {}
            for name, value in a.items():
                u = each if name.rpartition(".")[0] in moving else 0.0
                state[name] = (1 - u) * value.double() + u * b[name].double()
            network.load_state_dict(state)
            with torch.no_grad():
                rows.append(F.cross_entropy(network(x.double()), Y).item())
    return np.array(rows).reshape(len(layers), len(t))


@pytest.mark.parametrize("mode", ["single", "cumulative"])
@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_the_table_is_that_of_a_loop_in_one_pass(kind: str, mode: str):
    if kind == "mlp":
        model, a, b, x = mlp(*WIDTHS), mlp(*WIDTHS, seed=1), mlp(*WIDTHS, seed=2), X
    else:
        model, a, b = residual(0), residual(1), residual(2)
        x = torch.randn(33, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    a, b = clone(a), clone(b)
    data = Counted(x, Y)
    table = mc.layerwise(model, a, b, data, points=5, mode=mode, precision="float64")
    assert data.passes == table.passes == 1
    expected = by_loop(model, a, b, table.t, mode, x)
    np.testing.assert_allclose(table.values["loss"], expected, rtol=1e-10)
    ends = [by_loop(model, a, b, np.array([0.0]), "single", x)[0, 0]]
    ends.append(by_loop(model, a, b, np.array([1.0]), "cumulative", x)[-1, 0])
    np.testing.assert_allclose(table.ends["loss"], ends, rtol=1e-10)
    line = (1 - table.t) * ends[0] + table.t * ends[1]
    np.testing.assert_allclose(table.barrier(), (expected - line).max(1), atol=1e-10)


@pytest.mark.parametrize("mode", ["single", "cumulative"])
def test_what_is_below_the_moving_layer_is_computed_once(mode: str):
    widths = (32,) * 12
    model, a, b = mlp(*widths), mlp(*widths, seed=1), mlp(*widths, seed=2)
    groups = [f"{2 * i}" for i in range(11)]
    t = np.linspace(0, 1, 11)
    moving = np.eye(11) if mode == "single" else np.tri(11)
    points = np.kron(moving, t[:, None])
    shuffled = np.random.default_rng(0).permutation(points)
    path = mc.Line(clone(a), clone(b), groups=groups)
    plans = [mc.explain(model, path, torch.zeros(4, 32), each) for each in (points, shuffled)]
    assert plans[0].flops == plans[1].flops  # however the points are ordered
    assert plans[0].naive_flops > 1.8 * plans[0].flops
    text = str(plans[0])
    assert "go on together at" in text and "from " in text
    with without("parting"):
        assert mc.explain(model, path, torch.zeros(4, 32), points).flops > 1.5 * plans[0].flops


def test_a_moving_last_layer_takes_one_pass_of_the_features():
    model = mlp(12, 64, 64, 5)
    start = clone(model)
    others = [start | {"4.weight": torch.randn(5, 64), "4.bias": torch.randn(5)} for _ in range(9)]
    flops = {}
    for count in (2, 9):
        path = mc.Mixture(others[:count])
        flops[count] = mc.explain(model, path, X[:2], np.eye(count)).flops
    features, head = 2 * (12 * 64 + 64 * 64), 2 * 64 * 5
    assert flops[9] - flops[2] < 7 * 1.5 * head
    assert flops[9] < features + 9 * 1.5 * head + 8 * 64
    path = mc.Line(start, others[0], groups=["4"])
    plan = mc.explain(model, path, X[:2], 101)
    assert plan.network_flops < features + 2 * head + 8 * 64
    assert plan.point_flops <= 101 * 4 * 5


def test_unrelated_states_share_the_layers_that_they_have_in_common():
    model = mlp(12, 20, 20, 20, 5)
    base = clone(model)
    other = base | {"0.weight": base["0.weight"] + 1.0}
    heads = [{"6.bias": torch.randn(5)} for _ in range(3)]
    states = [start | head for head in heads for start in (base, other)]
    path, points = mc.Mixture(states), np.eye(6)
    plan = mc.explain(model, path, X[:2], points)
    trunk = 2 * (12 * 20 + 20 * 20 + 20 * 20)
    assert plan.flops < 2 * (trunk + 8 * 20) + 6 * 3 * 2 * 20 * 5
    got = mc.evaluate(model, path, (X, Y), points, precision="float64")
    for state, loss in zip(states, got.loss):
        network = copy.deepcopy(model).double()
        network.load_state_dict({k: v.double() for k, v in state.items()})
        with torch.no_grad():
            assert loss == pytest.approx(F.cross_entropy(network(X.double()), Y).item(), rel=1e-12)


def test_layers_may_be_given_and_others_stay():
    model, a, b = mlp(*WIDTHS), clone(mlp(*WIDTHS, seed=1)), clone(mlp(*WIDTHS, seed=2))
    layers = {"low": ["0", "2"], "biases above": r"(4|6)\.bias"}
    table = mc.layerwise(model, a, b, (X, Y), [0.0, 0.5], layers=layers, precision="float64")
    assert table.layers == ("low", "biases above") and table.values["loss"].shape == (2, 2)
    state = {k: v.double() for k, v in a.items()}
    for name in ("4.bias", "6.bias"):
        state[name] = (a[name].double() + b[name].double()) / 2
    network = copy.deepcopy(model).double()
    network.load_state_dict(state)
    with torch.no_grad():
        expected = F.cross_entropy(network(X.double()), Y).item()
    assert table.values["loss"][1, 1] == pytest.approx(expected, rel=1e-12)
    network.load_state_dict({k: v.double() for k, v in b.items()})
    with torch.no_grad():
        end = F.cross_entropy(network(X.double()), Y).item()
    assert table.ends["loss"][1] == pytest.approx(end, rel=1e-12)


def test_a_table_is_printed_kept_and_drawn(tmp_path):
    model, a, b = mlp(*WIDTHS), clone(mlp(*WIDTHS, seed=1)), clone(mlp(*WIDTHS, seed=2))
    table = mc.layerwise(model, a, b, (X, Y), 3)
    lines = str(table).splitlines()
    assert lines[0].split()[0] == "loss" and "barrier" in lines[0]
    assert [line.split()[0] for line in lines[1:7]] == list(table.layers) == list("02468") + ["10"]
    file = tmp_path / "table.json"
    table.save(file)
    again = mc.LayerTable.load(file)
    assert str(again) == str(table) and again.ends == table.ends
    assert again.values["loss"].tobytes() == table.values["loss"].tobytes()
    file.write_text(file.read_text().replace('"samples": 33', '"samples": 34'))
    with pytest.raises(mc.ModeconnError, match="not a table"):
        mc.LayerTable.load(file)
    pytest.importorskip("matplotlib").use("agg")
    assert table.plot(metric="error").get_xlabel() == "t of the layer"
    pytest.importorskip("pandas")
    assert len(table.to_frame()) == 18


def test_what_does_not_fit_is_refused():
    model, a, b = mlp(*WIDTHS), clone(mlp(*WIDTHS, seed=1)), clone(mlp(*WIDTHS, seed=2))
    with pytest.raises(mc.ModeconnError, match='expected "single" or "cumulative"'):
        mc.layerwise(model, a, b, (X, Y), mode="both")
    with pytest.raises(mc.ModeconnError, match="at least 2"):
        mc.layerwise(model, a, b, (X, Y), 1)
    with pytest.raises(mc.ModeconnError, match="one of them at a time"):
        mc.layerwise(model, a, b, {"train": (X, Y), "test": (X, Y)})
