"""Linear readouts: the minimum of a convex problem, and where the search for it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import modeconn as mc
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.readout import fit_readout
from modeconn.connection.subnetworks import initial, outputs
from naive import mlp


def problem(dtype: torch.dtype = torch.float32) -> tuple[LayerChain, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    chain = LayerChain.of(mlp(6, 9, 4), torch.zeros(2, 6))
    h = torch.randn(300, 9, generator=generator, dtype=dtype).relu() * torch.logspace(
        -2, 2, 9, dtype=dtype
    )
    h[:, 3] = 0  # a dead unit
    labels = (
        h @ torch.randn(9, 4, generator=generator, dtype=dtype) / 30
        + torch.randn(300, 4, generator=generator)
    ).argmax(1)
    return chain, h, labels


def start(chain: LayerChain, kept: list[int], seed: int = 0):
    return initial(chain, 1, torch.tensor(kept), (), torch.Generator().manual_seed(seed))


def test_it_is_the_minimum_from_any_start() -> None:
    chain, h, labels = problem(torch.float64)
    kept = [0, 1, 2, 3, 5, 8]
    found = [
        fit_readout(chain, start(chain, kept, s), h, labels, iterations=2000, weight_decay=1e-4)
        for s in (1, 2)
    ]
    rms = h[:, kept].square().mean(0).sqrt()
    for result in found:
        sub = result.subnetwork
        weight, bias = (
            sub.weights[0].clone().requires_grad_(),
            sub.biases[0].clone().requires_grad_(),
        )
        loss = F.cross_entropy(F.linear(h[:, kept], weight, bias), labels)
        slopes = torch.autograd.grad(loss + 5e-5 * (weight * rms).square().sum(), [weight, bias])
        assert float((slopes[0] / rms.clamp_min(1e-9)).abs().max()) < 1e-6
        assert float(slopes[1].abs().max()) < 1e-6
        assert result.loss == pytest.approx(loss.item(), rel=1e-12)
        assert result.error == pytest.approx(
            float((outputs(chain, sub, h).argmax(1) != labels).double().mean())
        )
        assert not result.reached
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)


def test_single_precision_and_kept_features_give_the_same() -> None:
    chain, h, labels = problem()
    exact = fit_readout(chain, start(chain, [0, 2, 5]), h.double(), labels, iterations=2000)
    for features in (h, h[:, [0, 2, 5]]):
        found = fit_readout(chain, start(chain, [0, 2, 5]), features, labels)
        assert found.subnetwork.weights[0].dtype == torch.float32
        assert found.loss == pytest.approx(exact.loss, rel=1e-4)


def test_it_stops_at_the_wanted_loss() -> None:
    chain, h, labels = problem()
    best = fit_readout(chain, start(chain, list(range(9))), h, labels).loss
    easy = fit_readout(chain, start(chain, list(range(9))), h, labels, stop_loss=1.2 * best)
    assert easy.reached
    assert best < easy.loss <= 1.2 * best
    nothing = start(chain, list(range(9)))
    nothing = replace(nothing, weights=(torch.zeros(4, 9),))
    untouched = fit_readout(chain, nothing, h, labels, iterations=0)
    assert untouched.loss == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert torch.equal(untouched.subnetwork.weights[0], torch.zeros(4, 9))


def test_other_subnetworks_are_refused() -> None:
    chain, h, labels = problem()
    deeper = initial(chain, 0, torch.arange(6), (5,), torch.Generator())
    with pytest.raises(mc.ModeconnError, match="entry layer 0 is no linear readout"):
        fit_readout(chain, deeper, h, labels)
