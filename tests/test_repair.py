"""REPAIR: the ends stay the given networks, statistics are those of the ends, folding is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from alignment_cases import IMAGE, ROW, randomized
from alignment_networks import Encoder


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.f = nn.Linear(5, 4)

    def forward(self, x):
        return self.f(torch.relu(self.d(torch.relu(self.c(x)))).mean((2, 3)))


def MLP() -> nn.Module:  # noqa: N802
    layers = nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    return nn.Sequential(*layers)


NETWORKS = {
    "mlp": (MLP, ROW, ("0", "2")),
    "convs": (Convs, IMAGE, ("c", "d")),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(10, 6), nn.GELU(), nn.Linear(6, 4)),
        torch.randn(30, 5, 10, generator=torch.Generator().manual_seed(1)),
        ("0",),
    ),
}


def given(name: str) -> tuple[nn.Module, list[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    make, x, _ = NETWORKS[name]
    models = [randomized(make, seed) for seed in range(2)]
    y = torch.arange(len(x)) % 3 if name != "tokens" else torch.zeros(len(x), 5).long()
    return models[0], [dict(m.state_dict()) for m in models], (x.double(), y)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ends_are_the_given_networks(name: str):
    model, ends, data = given(name)
    repaired = mc.repair(model, mc.Line(*ends), data)
    changed, path = repaired
    assert repaired.layers == NETWORKS[name][2]
    for t, end in zip((0.0, 1.0), ends):
        twin = randomized(NETWORKS[name][0])
        twin.load_state_dict(end)
        changed.load_state_dict(path.at(t))
        with torch.no_grad():
            assert torch.allclose(changed(data[0]), twin(data[0]), rtol=1e-10, atol=1e-12)
        folded = repaired.folded(t)
        assert folded.keys() == end.keys()
        assert all(torch.equal(folded[key], end[key]) for key in end)


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_is_the_network_that_is_evaluated(name: str):
    model, ends, data = given(name)
    repaired = mc.repair(model, mc.Line(*ends), data)
    result = mc.evaluate(
        *repaired, data, [0.3], buffers="recompute", precision="float64", batch_size=len(data[0])
    )
    state = repaired.folded(0.3, batch_size=len(data[0]))
    twin = randomized(NETWORKS[name][0])
    twin.load_state_dict(state)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(twin(data[0]).flatten(0, -2), data[1].flatten())
    assert result.loss[0] == pytest.approx(float(loss), rel=1e-5)


def test_units_have_the_ends_statistics():
    """In the middle, every unit has the mean of means and of standard deviations."""
    model, ends, data = given("mlp")
    repaired = mc.repair(model, mc.Line(*ends), data)
    twin = MLP().double()
    values = []
    for state in (*ends, repaired.folded(0.5, batch_size=len(data[0]))):
        twin.load_state_dict(state)
        with torch.no_grad():
            values.append(twin[:3](data[0]))
    one, other, middle = values
    assert torch.allclose(middle.mean(0), (one.mean(0) + other.mean(0)) / 2, atol=0.01)
    spread = (one.std(0, correction=0) + other.std(0, correction=0)) / 2
    # running variances are the unbiased ones, so that layer behind layer differs a little
    assert torch.allclose(middle.std(0, correction=0), spread, rtol=0.05)


def test_both_ends_statistics_take_one_pass():
    class Counted(torch.utils.data.Dataset):
        read = 0

        def __len__(self):
            return len(data[0])

        def __getitem__(self, i):
            self.read += 1
            return data[0][i], data[1][i]

    model, ends, data = given("mlp")
    counted = Counted()
    mc.repair(model, mc.Line(*ends), counted)
    assert counted.read < 3 * len(counted)  # the first rows, which are all of these, and all


def test_chains_are_between_their_ends():
    model, (a, b), data = given("mlp")
    middle = randomized(MLP, 7).state_dict()
    for kind in (mc.PolyChain, mc.Bezier):
        _, path = mc.repair(model, kind([a, middle, b]), data)
        assert type(path) is kind
        first, half, last = (point["0.norm.bias"] for point in path.control_points)
        assert torch.allclose(half, (first + last) / 2)
        assert torch.equal(path.control_points[1]["0.layer.weight"], middle["0.weight"])


def test_batch_norms_are_recomputed():
    make = lambda: nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    models = [randomized(make, seed) for seed in range(2)]
    line = mc.Line(*models)
    data = ROW.double(), torch.arange(64) % 3
    repaired = mc.repair(models[0], line, data)
    model, path = repaired
    assert path is line
    assert repaired.layers == ()
    assert model.state_dict().keys() == models[0].state_dict().keys()
    expected = mc.recomputed(models[0], line, 0.5, data)
    folded = repaired.folded(0.5)
    assert all(torch.equal(folded[key], expected[key]) for key in expected)


def test_layers_whose_weights_are_read_get_no_norm():
    """PyTorch's encoder layers read the weights of their layers where they can."""
    models = [randomized(Encoder, seed) for seed in range(2)]
    x = torch.randn(20, 5, 12, dtype=torch.float64)
    repaired = mc.repair(models[0], mc.Line(*models), (x, torch.zeros(20).long()))
    assert repaired.layers == ("emb",)


def test_what_is_refused():
    model, _, data = given("mlp")
    with pytest.raises(mc.ModeconnError, match="path is a Plane: expected a Line, PolyChain"):
        mc.repair(model, mc.Plane.random(model), data)
    ends = mc.Line(model, randomized(MLP, 1))
    with pytest.raises(mc.ModeconnError, match="data is an iterator, which serves for one pass"):
        mc.repair(model, ends, iter([data]))
    single = nn.Linear(10, 3).double()
    line = mc.Line(single, nn.Linear(10, 3).double())
    with pytest.raises(mc.ModeconnError, match="no linear or convolutional layer before"):
        mc.repair(single, line, data)
    free = [
        nn.Sequential(nn.Linear(10, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2)
    ]
    repaired = mc.repair(free[0], mc.Line(*free), (ROW, torch.arange(64) % 3))
    with pytest.raises(mc.ModeconnError, match="layer '0' has no bias"):
        repaired.folded(0.5)
