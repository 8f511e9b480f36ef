"""Dropout stability against plain PyTorch: activations times masks, per network, in float64."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.connection.layer_chain import LayerChain
from modeconn.errors import ModeconnError
from modeconn.plan.report import Plan
from modeconn.stability.dropout import dropout_stability, kept_from, without_units
from modeconn.stability.scale import ENOUGH, best_scales, losses_and_errors
from modeconn.stability.table import MEASURES
from naive import mlp
from walk import conv_net


def case(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    if kind == "mlp":
        return (
            mlp(6, 12, 11, 9, 4, seed=2).double(),
            torch.randn(70, 6).double(),
            torch.randint(4, (70,)),
        )
    if kind == "tanh":
        return (
            mlp(6, 12, 9, 4, activation=nn.Tanh, seed=2).double(),
            torch.randn(70, 6).double(),
            torch.randint(4, (70,)),
        )
    model = conv_net().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model, torch.randn(40, 2, 8, 8).double(), torch.randint(3, (40,))


def masked_logits(
    chain: LayerChain, model: nn.Module, x: Tensor, kept: dict[int, Tensor]
) -> Tensor:
    """Run the model with the values of units that are not kept set to 0 behind each layer."""
    state = model.state_dict()
    h = chain.input(x, state)
    for layer in chain.layers:
        h = layer.finish(chain.affine(state, layer.index, h), state)
        if layer.index in kept:
            units = torch.zeros(layer.units, dtype=h.dtype)
            units[kept[layer.index]] = 1
            block = h.shape[1] // layer.units
            h = h * units.repeat_interleave(block).view(1, -1, *[1] * (h.dim() - 2))
    return h


def loss_and_slope(logits: Tensor, y: Tensor, scale: float) -> tuple[float, float]:
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(s * logits, y)
    (slope,) = torch.autograd.grad(loss, s)
    return loss.item(), slope.item()


@pytest.mark.parametrize("kind", ["mlp", "tanh", "conv"])
@pytest.mark.parametrize("fraction", [2, 4, 1.3])
def test_against_masked_networks(kind: str, fraction: float) -> None:
    model, x, y = case(kind)
    more, labels = x[:25].flip(0) * 1.1, y[:25]
    table = dropout_stability(
        model,
        model,
        (x, y),
        (more, labels),
        fraction=fraction,
        draws=3,
        seed=5,
        precision="float64",
    )
    chain = LayerChain.of(model, x[:2])
    assert len(table) == 3 * (chain.length - 1)
    for row in table.rows:
        kept = kept_from(chain, row.entry, row.draw, fraction, 5)
        assert {p: len(units) for p, units in kept.items()} == {
            p: chain.widths[p] - int(chain.widths[p] / fraction)
            for p in range(row.entry, chain.length)
        }
        with torch.no_grad():
            logits, others = (masked_logits(chain, model, each, kept) for each in (x, more))
        loss, slope = loss_and_slope(logits, y, row.scale)
        assert row.train_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
        assert abs(slope) < 1e-8 * max(1, logits.abs().max().item()) or loss <= ENOUGH
        assert row.train_error == ((row.scale * logits).argmax(1) != y).double().mean().item()
        assert row.test_loss == pytest.approx(
            F.cross_entropy(row.scale * others, labels).item(), rel=1e-9
        )
        assert row.test_error == ((row.scale * others).argmax(1) != labels).double().mean().item()
        grid = [F.cross_entropy(s * logits, y).item() for s in np.linspace(-3, 3, 61)]
        assert row.train_loss <= min(grid) + 1e-12
    with torch.no_grad():
        own = [model(each) for each in (x, more)]
    expected = [
        F.cross_entropy(own[0], y).item(),
        (own[0].argmax(1) != y).double().mean().item(),
        F.cross_entropy(own[1], labels).item(),
        (own[1].argmax(1) != labels).double().mean().item(),
    ]
    assert dataclasses.astuple(table.original) == pytest.approx(expected)


def same(a: object, b: object) -> None:
    """Equal numbers, but for the time and for rounding."""
    for one, other in zip(a, b, strict=True):
        assert (one.entry, one.draw, one.method) == (other.entry, other.draw, other.method)
        for name in (*MEASURES, "scale"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, nan_ok=True)


def test_nothing_removed() -> None:
    """More than all units to a part: the network itself, with the best scale."""
    model, x, y = case("mlp")
    table = dropout_stability(model, model, (x, y), fraction=100, draws=2, precision="float64")
    with torch.no_grad():
        logits = model(x)
    assert all(abs(loss_and_slope(logits, y, row.scale)[1]) < 1e-9 for row in table.rows)
    assert max(table.column("train_loss")) <= table.original.train_loss
    assert np.ptp(table.column("train_loss")) < 1e-12
    assert np.isnan(table.column("test_loss")).all()


def test_half_of_the_layer_itself_is_removed() -> None:
    """Layer l of the dropout networks has as many units as a subnetwork of entry layer l reads."""
    model, x, y = case("mlp")
    table = dropout_stability(model, model, (x, y), draws=3, precision="float64")
    assert table.entries == [1, 2, 3]
    assert len(set(table.column("train_loss", 3))) == 3
    chain = LayerChain.of(model, x[:2])
    assert {p: len(units) for p, units in kept_from(chain, 3, 0, 2, 0).items()} == {3: 5}
    with pytest.raises(ModeconnError, match="keep all inputs; expected layers from 1 to 3"):
        dropout_stability(model, model, (x, y), entries=[0, 1])


def test_draws_do_not_depend_on_what_else_is_asked_for() -> None:
    model, x, y = case("conv")
    everything = dropout_stability(model, model, (x, y), draws=3, seed=7, precision="float64")
    few = dropout_stability(
        model, model, (x, y), draws=2, entries=[3, 1], seed=7, precision="float64"
    )
    same(few.rows, [row for row in everything.rows if row.entry in (1, 3) and row.draw < 2])
    other = dropout_stability(
        model, model, (x, y), draws=2, entries=[3, 1], seed=8, precision="float64"
    )
    assert few.column("train_loss", 1).tolist() != other.column("train_loss", 1).tolist()
    assert len(set(everything.column("train_loss", 1))) == 3


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_many_passes_and_outputs_on_disk(kind: str) -> None:
    model, x, y = case(kind)
    seen: list[tuple[int, int | None]] = []
    arguments = {"draws": 3, "precision": "float64", "batch_size": 16}
    whole = dropout_stability(model, model, (x, y), (x, y), **arguments)
    parts = dropout_stability(
        model,
        model,
        (x, y),
        (x, y),
        **arguments,
        memory_budget=1000,
        progress=lambda *done: seen.append(done),
    )
    same(whole.rows, parts.rows)
    assert whole.original.train_loss == pytest.approx(parts.original.train_loss, rel=1e-12)
    assert seen[-1][0] == seen[-1][1] and seen[-1][0] > 2 * len(x)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_plan_leaves_removed_units_out_and_shares_the_prefix() -> None:
    model, x, _ = case("mlp")
    chain, state = LayerChain.of(model, x[:2]), model.state_dict()
    networks = [without_units(chain, state, kept_from(chain, 2, draw, 2, 0)) for draw in range(4)]
    path = mc.PolyChain([*networks, networks[-1]])
    plan = mc.explain(model, path, x[:2], np.arange(4) / 4)
    assert isinstance(plan, Plan)
    program = plan.program
    widths = [
        step.entries[0].shape
        for step in (program.shared[i] for i in program.order)
        if step.node.op == "linear"
    ]
    # Layer 1 once for all four; then rows of layer 2, and the rest cut down to the kept units on
    # both sides.
    assert sorted(map(tuple, widths)) == sorted([(12, 6)] + 4 * [(6, 12), (5, 6), (4, 5)])


def test_model_and_weights_are_left_alone() -> None:
    model, x, y = case("conv")
    before, training = copy.deepcopy(model.state_dict()), model.training
    dropout_stability(model, model, (x, y), draws=2, precision="float64")
    assert model.training == training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_float32_is_close_to_float64() -> None:
    model, x, y = case("mlp")
    single = dropout_stability(model.float(), model.float(), (x.float(), y), draws=3)
    double = dropout_stability(model.double(), model.double(), (x, y), draws=3, precision="float64")
    assert single.column("train_loss") == pytest.approx(double.column("train_loss"), rel=1e-5)
    assert single.column("scale") == pytest.approx(double.column("scale"), rel=1e-3, abs=1e-4)


# -- the scale -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 30.0, 1e4]), st.floats(-1.5, 1.5))
def test_scale_is_a_minimum(seed: int, size: float, lean: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (50,), generator=generator)
    z = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    z = size * (z + lean * F.one_hot(y, 4))
    chunks = [(z[:, :20], y[:20]), (z[:, 20:], y[20:])]
    for logits, scale in zip(z, best_scales(chunks).tolist()):
        loss, slope = loss_and_slope(logits, y, scale)
        assert loss <= ENOUGH or abs(slope) <= 1e-7 * size
        assert (
            loss
            <= min(loss_and_slope(logits, y, scale * f)[0] for f in (0.5, 0.99, 1.01, 2)) + ENOUGH
        )


def test_network_that_is_always_right_gets_a_finite_scale() -> None:
    y = torch.arange(30) % 3
    z = F.one_hot(y, 3).double()[None] * 0.3
    (scale,) = best_scales([(z, y)])
    (loss,), (error,) = losses_and_errors([(z, y)], scale[None])
    assert 1 < scale < 1e3 and loss <= ENOUGH and error == 0
    (scale,) = best_scales([(100 * z, y)])
    assert scale == 1


def test_network_that_is_always_wrong_is_turned_round() -> None:
    y = torch.arange(40) % 2
    z = -F.one_hot(y, 2).double()[None]
    z[0, :4] *= -1
    (scale,) = best_scales([(z, y)])
    assert scale < 0 and losses_and_errors([(z, y)], scale[None])[1].item() == 0.1


def test_outputs_that_are_zero_or_not_finite() -> None:
    y = torch.arange(12) % 3
    z = torch.zeros(2, 12, 3, dtype=torch.float64)
    z[1, 3] = torch.inf
    scale = best_scales([(z, y)])
    assert scale[0] == 1 and losses_and_errors([(z, y)], scale)[0][0].item() == pytest.approx(
        np.log(3)
    )


# -- bad input -------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model, x, y = case("mlp")
    with pytest.raises(ModeconnError, match="fraction is 1: expected a number above 1"):
        dropout_stability(model, model, (x, y), fraction=1)
    with pytest.raises(ModeconnError, match="fraction is nan"):
        dropout_stability(model, model, (x, y), fraction=float("nan"))
    with pytest.raises(ModeconnError, match="draws is 0"):
        dropout_stability(model, model, (x, y), draws=0)
    with pytest.raises(ModeconnError, match="entry layer 4: Sequential has entry layers 0 to 3"):
        dropout_stability(model, model, (x, y), entries=[4])
    with pytest.raises(ModeconnError, match="entries is empty"):
        dropout_stability(model, model, (x, y), entries=[])
    with pytest.raises(ModeconnError, match="holds no samples"):
        dropout_stability(model, model, (x[:0], y[:0]))
    with pytest.raises(ModeconnError, match="label 4 is out of range: the model has 4 classes"):
        dropout_stability(model, model, (x, y + 1))
    with pytest.raises(ModeconnError, match="class labels are integers"):
        dropout_stability(model, model, (x, x))
    with pytest.raises(ModeconnError, match="read only once"):
        dropout_stability(model, model, iter([(x, y)]))
    with pytest.raises(ModeconnError, match="memory_budget is 0"):
        dropout_stability(model, model, (x, y), memory_budget=0)
    with pytest.raises(ModeconnError, match="does not match"):
        dropout_stability(model, mlp(6, 12, 11, 9, 5).double(), (x, y))


def test_not_a_chain() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + self.a(x).relu())

    with pytest.raises(ModeconnError, match="Residual is not a chain of layers"):
        dropout_stability(
            Residual(), Residual(), (torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
        )
