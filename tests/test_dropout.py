"""Dropout stability against a plain masked network per draw, and its scale against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn import ModeconnError
from modeconn.connect.chain import Chain
from modeconn.connect.dropout import dropout_stability, kept_after, without_units
from naive import mlp


def problem(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    if kind == "mlp":
        return mlp(6, 14, 13, 12, 4).double(), torch.randn(90, 6, dtype=torch.float64), torch.randint(0, 4, (90,))
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10), nn.ReLU(), nn.Linear(10, 4)]
    return nn.Sequential(*layers).double(), torch.randn(90, 2, 8, 8, dtype=torch.float64), torch.randint(0, 4, (90,))


def masked_outputs(model: nn.Module, chain: Chain, kept: dict[int, Tensor], x: Tensor) -> Tensor:
    """The network with hidden values of removed units set to 0: no weights are touched."""
    h = chain.input(x)
    for p in range(1, chain.length):
        h = chain.run(model.state_dict(), h, p - 1, p) if p > 1 else chain.run(model.state_dict(), x, 0, 1)
        if p in kept:
            by_unit = h.reshape(len(h), chain.widths[p], -1) * torch.zeros(chain.widths[p], 1).index_fill_(0, kept[p], 1.0)
            h = by_unit.reshape(h.shape)
    return chain.affine(model.state_dict(), chain.length, h)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_as_plain_masked_networks_with_the_best_scale(kind: str) -> None:
    model, x, y = problem(kind)
    chain = Chain.of(model, x)
    table = dropout_stability(model, model, (x, y), (x[:40], y[:40]), draws=3, seed=5, precision="float64")
    assert [(row.entry, row.draw) for row in table.rows] == [(e, d) for e in range(chain.length) for d in range(3)]
    for row in table.rows:
        kept = kept_after(chain, row.entry, row.draw, 2, 5)
        assert all(len(units) == chain.widths[p] - chain.widths[p] // 2 for p, units in kept.items())
        with torch.no_grad():
            logits = masked_outputs(model, chain, kept, x)
        scale = torch.tensor(row.scale, dtype=torch.float64, requires_grad=True)
        loss = F.cross_entropy(scale * logits, y)
        (slope,) = torch.autograd.grad(loss, scale)
        assert row.train_loss == pytest.approx(loss.item(), rel=1e-9)
        assert abs(float(slope)) < 1e-6
        assert row.train_error == pytest.approx(float((row.scale * logits).argmax(1).ne(y).double().mean()))
        assert row.test_loss == pytest.approx(float(F.cross_entropy(row.scale * logits[:40], y[:40])), rel=1e-9)
        assert row.train_loss <= float(F.cross_entropy(logits, y)) + 1e-12


def test_removed_units_have_no_outgoing_weights() -> None:
    model, x, _ = problem("conv")
    chain = Chain.of(model, x)
    kept = kept_after(chain, 0, 0, 2, 0)
    masked = without_units(chain, model.state_dict(), kept)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(model, masked, (x,)), masked_outputs(model, chain, kept, x), rtol=1e-12, atol=1e-12
        )


def test_draws_do_not_depend_on_which_entries_are_asked_for_nor_on_the_budget() -> None:
    model, x, y = problem("mlp")
    whole = dropout_stability(model, model, (x, y), draws=2, precision="float64")
    part = dropout_stability(model, model, (x, y), draws=3, entries=[2], precision="float64", memory_budget=4000)
    for a, b in zip([row for row in whole.rows if row.entry == 2], part.rows):
        assert (a.train_loss, a.scale) == pytest.approx((b.train_loss, b.scale), rel=1e-9)
        assert math.isnan(a.test_loss)


def test_bad_input_is_named() -> None:
    model, x, y = problem("mlp")
    with pytest.raises(ModeconnError, match="fraction is 1: expected a number above 1"):
        dropout_stability(model, model, (x, y), fraction=1)
    with pytest.raises(ModeconnError, match="draws is 0"):
        dropout_stability(model, model, (x, y), draws=0)
    with pytest.raises(ModeconnError, match="entry layer 9"):
        dropout_stability(model, model, (x, y), entries=[9])
    net = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))
    with pytest.raises(ModeconnError, match="not a chain"):
        dropout_stability(net, net, (x.float(), y))
