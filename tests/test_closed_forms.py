"""Subnetworks that nothing is trained for: separating witnesses, memorising layers, a free S_0."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import modeconn as mc
from modeconn.connection import memorising_layers as layers
from modeconn.connection import rounds as search
from modeconn.connection.kept import activity, drawn_units
from modeconn.connection.layer_chain import LayerChain
from naive import mlp

Data = tuple[torch.Tensor, torch.Tensor]


def fitted(model: nn.Sequential, data: Data, steps: int = 300) -> nn.Sequential:
    """Full-batch Adam, deterministic."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model.eval()


def random_labels(samples: int = 120, classes: int = 3) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator)
    return x, torch.randint(0, classes, (samples,), generator=generator)


@pytest.fixture(scope="module")
def memorised() -> tuple[list[nn.Sequential], Data]:
    data = random_labels()
    return [fitted(mlp(6, 16, 14, 48, 48, 3, seed=seed), data) for seed in (1, 2)], data


@pytest.fixture(scope="module")
def exclusive_or() -> tuple[list[nn.Sequential], Data]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(80, 2, generator=generator) - 1
    x += 0.15 * x.sign()
    data = (x, ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long())
    return [fitted(mlp(2, 24, 24, 24, 2, seed=seed), data) for seed in (1, 2)], data


# -- the maps themselves ---------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_two_layers_give_every_value(samples: int, levels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    features = random.normal(size=(samples, 3))
    values = random.integers(0, levels, samples).astype(float)
    width = next(w for w in range(4, 200) if layers.two_layers_fit(samples, (w, w)))
    assert width * width <= 4 * samples + 16 * math.sqrt(samples) + 64
    assert not layers.two_layers_fit(samples, (0, width))
    line, gap = layers.line_of(features)
    places = layers.evaluated([line], features)[:, 0]
    assert gap > 0
    assert places.min() == pytest.approx(0)
    assert places.max() <= 1 + 1e-12
    maps = layers.two_layers(places, values, levels, (width, width))
    assert len(maps[0].bias) <= width and len(maps[1].bias) <= width
    np.testing.assert_allclose(layers.evaluated(maps, places[:, None])[:, 0], values, atol=1e-4)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_one_layer_gives_every_value(samples: int, dimensions: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    features = np.abs(random.normal(size=(samples, dimensions))) * 10.0 ** random.integers(-3, 3)
    values = random.integers(0, 5, samples).astype(float)
    size = layers.rank(features)
    assert size == min(samples, dimensions)
    width = 4 * math.ceil(samples / size)
    maps = layers.one_layer(features, values, width)
    assert len(maps[0].bias) == width
    np.testing.assert_allclose(layers.evaluated(maps, features)[:, 0], values, atol=1e-3)
    if width > 4:
        with pytest.raises(mc.ModeconnError, match=f"units, and there are {width - 1}"):
            layers.one_layer(features, values, width - 1)


def test_units_that_are_constant_do_not_count_for_the_rank() -> None:
    features = np.random.default_rng(0).normal(size=(20, 6))
    features[:, 2] = 0
    features[:, 4] = features[:, 1]
    assert layers.rank(features) == 4
    with pytest.raises(mc.ModeconnError, match="20 samples on features of rank 4 need"):
        layers.one_layer(features, np.zeros(20), 16)


@pytest.mark.parametrize("loss", [0.3, 1e-3, 1e-9])
def test_a_number_is_decoded_as_the_nearest_class(loss: float) -> None:
    labels = torch.arange(6)
    logits = layers.evaluated([layers.class_readout(6, loss)], labels.double()[:, None].numpy())
    losses = nn.functional.cross_entropy(torch.from_numpy(logits), labels, reduction="none")
    assert float(losses.max()) <= loss


def test_samples_that_no_projection_tells_apart() -> None:
    features = np.array([[0.0], [1e-15], [1.0]])
    with pytest.raises(mc.ModeconnError, match="so close together"):
        layers.line_of(features)


# -- memorise --------------------------------------------------------------------------------------


def test_memorising_subnetworks_connect_at_the_level_of_the_ends(memorised) -> None:
    (a, b), data = memorised
    found = mc.connect(a, a, b, data, subnetworks="memorise")
    losses = found.certificate.losses
    assert found.certificate.bound == max(losses[0], losses[-1])
    for record in found.details["found"]:
        assert record["method"] == "memorise"
        assert record["error"] == 0
    points = found.path.control_points
    for end, network in ((points[0], a), (points[-1], b)):
        for key, value in network.state_dict().items():
            assert torch.equal(end[key], value.double())
    verified = mc.verify(a, found, data, a=a, b=b)  # float32 networks at a float64 path's ends
    assert verified.bound == pytest.approx(found.certificate.bound, rel=1e-9)
    with pytest.raises(mc.FalseCertificate, match="the path does not end in b"):
        mc.verify(a, found, data, a=a, b=a)
    t = np.random.default_rng(0).random(200)
    between = mc.evaluate(a, found.path, data, points=t, precision="float64")
    assert between.loss.max() <= found.certificate.bound * (1 + 1e-6)


def test_what_cannot_be_memorised_is_refused(memorised) -> None:
    (a, b), (x, y) = memorised
    twice = torch.cat([x, x[:1]]), torch.cat([y, (y[:1] + 1) % 3])
    with pytest.raises(
        mc.ModeconnError, match=r"samples 0 and 120 have equal features and the labels \d and \d"
    ):
        mc.connect(a, a, b, twice, subnetworks="memorise")
    narrow = [mlp(6, 16, 14, 20, 48, 3, seed=seed) for seed in (1, 2)]
    with pytest.raises(mc.ModeconnError, match=r"features of rank \d+ need 4⌈N/rank⌉|m·m' ≥ 4N"):
        mc.connect(narrow[0], *narrow, (x, y), subnetworks="memorise")
    smooth = mlp(6, 8, 8, 3, activation=nn.Tanh)
    with pytest.raises(mc.ModeconnError, match=r'"memorise" need .* tanh, which carries'):
        mc.connect(smooth, smooth, smooth, (x, y), subnetworks="memorise")
    without = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(mc.ModeconnError, match=r"layer 1 \(0\.weight\) has no bias"):
        mc.connect(without, without, without, (x, y), subnetworks="memorise")


def test_auto_memorises_where_training_does_not_reach_the_target(memorised, monkeypatch) -> None:
    (a, b), data = memorised
    monkeypatch.setattr(search, "_SHALLOW_ROUNDS", ((1, 1),))
    monkeypatch.setitem(search._ROUNDS, "auto", 1)
    monkeypatch.setattr(search, "_STEPS", 1)
    found = mc.connect(a, a, b, data, target=0.05)
    assert {record["method"] for record in found.details["found"]} == {"memorise"}
    assert found.path.control_points[0]["0.weight"].dtype == torch.float64


# -- separable -------------------------------------------------------------------------------------


def test_separable_subnetworks_connect_at_the_level_of_the_ends(exclusive_or) -> None:
    (a, b), data = exclusive_or
    found = mc.connect(a, a, b, data, subnetworks="separable")
    losses = found.certificate.losses
    assert found.certificate.bound == pytest.approx(max(losses[0], losses[-1]), rel=1e-4)
    assert {record["epochs"] for record in found.details["found"]} == {0}
    mc.verify(a, found, data)


def test_features_that_are_not_separable_are_refused_with_the_proof() -> None:
    a, b = (mlp(6, 10, 8, 3, seed=seed) for seed in (1, 2))
    with pytest.raises(
        mc.ModeconnError, match="all 8 units of layer 2 of a are not linearly separable, hence no"
    ):
        mc.connect(a, a, b, random_labels(), subnetworks="separable")


def test_units_are_chosen_where_those_drawn_are_not_separable() -> None:
    """Two of 24 units tell the classes; an eighth of the units, drawn, miss one of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 0.5 * x[:, 0].sign()
    nets = []
    for seed in (1, 2):
        net = mlp(5, 24, 12, 2, seed=seed)
        with torch.no_grad():
            net[0].weight[:, 0] = 0
            net[0].weight[3] = torch.tensor([1.0, 0, 0, 0, 0])
            net[0].weight[17] = torch.tensor([-1.0, 0, 0, 0, 0])
            net[0].bias[[3, 17]] = 0.0
        nets.append(net)
    found = mc.connect(
        nets[0], *nets, (x, y), kept=[0.125, 0.5], subnetworks="separable", target=0.01
    )
    units = {r["entry"]: r["units"] for r in found.details["found"]}
    assert len(units[1]) == 3
    assert {3, 17} & set(units[1])
    assert max(found.certificate.losses[1:-1]) <= max(
        0.01, *found.certificate.losses[:: len(found.kinds)]
    )


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.GELU, nn.LeakyReLU])
def test_other_activations_carry_readouts(exclusive_or, activation) -> None:
    _, data = exclusive_or
    nets = [mlp(2, 24, 24, 24, 2, activation=activation, seed=seed) for seed in (1, 2)]
    a, b = (fitted(net, data, 150) for net in nets)
    found = mc.connect(a, a, b, data)
    assert {record["method"] for record in found.details["found"]} <= {"readout", "head"}
    losses = found.certificate.losses
    assert found.certificate.bound <= 2 * max(losses[0], losses[-1]) + 1e-3
    mc.verify(a, found, data)


def test_the_input_costs_nothing(exclusive_or) -> None:
    (a, b), data = exclusive_or
    found = mc.connect(a, a, b, data, target=0.7, subnetworks="head")
    records = {(r["side"], r["entry"]): r for r in found.details["found"]}
    assert records["a", 0]["epochs"] == 0
    best = min(records["a", 1]["loss"], records["b", 1]["loss"])
    assert records["a", 0]["loss"] == pytest.approx(best, rel=1e-4)


def test_dead_units_are_not_kept() -> None:
    x, y = random_labels()
    a, b = (mlp(6, 20, 20, 3, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        a[0].bias[:6] = -1e4
        b[0].bias[4:8] = -1e4
    chain = LayerChain.of(a, x[:4])
    ends = {"a": a.state_dict(), "b": b.state_dict()}
    active = activity(chain, ends, (x, y))
    assert (active[1][:8] == 0).all()
    assert (active[1][8:] > 0).all()
    units = drawn_units(chain, 0.5, active, seed=0)
    assert units[1].min() >= 8
    most = drawn_units(chain, [0.75, 0.5], active, seed=0)
    assert set(range(8, 20)) <= set(most[1].tolist())


def test_the_default_goal_is_below_the_loss_of_outputs_that_are_zero() -> None:
    data = random_labels()
    a, b = (fitted(mlp(6, 20, 20, 3, seed=seed), data, 3) for seed in (1, 2))
    for method in ("readout", "head"):
        certificate = mc.connect(a, a, b, data, subnetworks=method).certificate
        assert certificate.bound < max(certificate.losses[0], certificate.losses[-1], math.log(3))
