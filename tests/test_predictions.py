"""Outputs of every point in batches, ensembles of them, and unrelated states as points."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.metrics.ensembles import Calibration
from naive import clone, mlp

X, Y = torch.randn(41, 7, generator=torch.Generator().manual_seed(0)), torch.arange(41) % 3


def states(count: int) -> list[dict[str, Tensor]]:
    return [clone(mlp(7, 9, 3, seed=k + 1)) for k in range(count)]


def logits_of(model: nn.Module, given: list[dict[str, Tensor]]) -> Tensor:
    outputs = []
    for state in given:
        network = copy.deepcopy(model).double()
        network.load_state_dict({name: value.double() for name, value in state.items()})
        with torch.no_grad():
            outputs.append(network(X.double()))
    return torch.stack(outputs)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return mlp(7, 9, 3)


@pytest.mark.parametrize("batch_size", [None, 1, 8, 100])
def test_batches_of_outputs_are_those_of_every_point(model: nn.Module, batch_size: int | None):
    a, b = states(2)
    read = []

    def batches():
        read.append(1)
        yield from zip(X.split(16), Y.split(16))

    path = mc.Line(a, b)
    found = [*mc.predict(model, path, batches(), 4, batch_size=batch_size, precision="float64")]
    assert len(read) == 1 and all(isinstance(each, mc.Predictions) for each in found)
    if batch_size:
        assert max(len(each.targets) for each in found) == min(batch_size, 41)
    expected = logits_of(model, [path.at(t) for t in np.linspace(0, 1, 4)])
    torch.testing.assert_close(
        torch.cat([each.outputs for each in found], 1), expected, atol=1e-6, rtol=1e-6
    )
    assert torch.equal(torch.cat([each.targets for each in found]), Y)


def test_memory_bounds_the_batches(model: nn.Module):
    path = mc.States(states(4))
    found = [*mc.predict(model, path, (X, Y), memory_budget=8 * 4 * 3 * 5)]
    assert max(len(each.targets) for each in found) <= 5
    assert sum(len(each.targets) for each in found) == 41


def test_bad_input_is_found_before_the_first_batch(model: nn.Module):
    with pytest.raises(mc.ModeconnError, match="backend"):
        mc.predict(model, mc.States(states(2)), (X, Y), backend="none")


def test_states_are_points(model: nn.Module):
    given = states(3)
    path = mc.States(given)
    got = mc.evaluate(model, path, (X, Y), precision="float64")
    logits = logits_of(model, given)
    losses = [nn.functional.cross_entropy(each, Y).item() for each in logits]
    np.testing.assert_allclose(got.loss, losses, rtol=1e-12)
    some = mc.evaluate(model, path, (X, Y), [2, 0, 2], precision="float64")
    np.testing.assert_allclose(some.loss, [losses[2], losses[0], losses[2]], rtol=1e-12)
    assert all(torch.equal(path.at(1)[name], given[1][name]) for name in given[1])
    assert len(path) == 3 and len(mc.evaluate(model, path, (X, Y), 3).t) == 3
    for points in (4, [0, 3], [0.5], [-1]):
        with pytest.raises(mc.ModeconnError, match="expected"):
            mc.evaluate(model, path, (X, Y), points)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """The definition, sample by sample."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.sum()
    return total / len(labels)


def test_an_ensemble_is_the_mean_of_probabilities(model: nn.Module):
    given = states(4)
    got = mc.ensemble(model, mc.States(given), (X, Y), batch_size=9, precision="float64")
    each = logits_of(model, given).softmax(-1)
    mean, rows = each.mean(0), torch.arange(41)
    assert got.loss == pytest.approx(-mean[rows, Y].log().mean().item(), rel=1e-10)
    assert got.error == (mean.argmax(1) != Y).double().mean().item()
    assert got.ece == pytest.approx(calibration_error(mean.numpy(), Y.numpy(), 15), rel=1e-9)
    np.testing.assert_allclose(got.member_loss, -each[:, rows, Y].log().mean(1), rtol=1e-10)
    np.testing.assert_allclose(got.member_error, (each.argmax(-1) != Y).double().mean(1))
    eces = [calibration_error(one.numpy(), Y.numpy(), 15) for one in each]
    np.testing.assert_allclose(got.member_ece, eces, rtol=1e-9)
    predicted = each.argmax(-1)
    apart = (predicted[:, None] != predicted[None]).double().mean(-1)
    np.testing.assert_allclose(got.disagreement, apart)
    assert got.samples == 41 and "ensemble of 4" in str(got)


def test_an_ensemble_has_weights(model: nn.Module):
    given = states(3)
    got = mc.ensemble(model, mc.States(given), (X, Y), weights=[2, 1, 0], precision="float64")
    each = logits_of(model, given).softmax(-1)
    mean = (2 * each[0] + each[1]) / 3
    assert got.loss == pytest.approx(-mean[torch.arange(41), Y].log().mean().item(), rel=1e-10)
    for weights in ([1, 2], [-1, 1, 1], [0, 0, 0], [[1, 1, 1]]):
        with pytest.raises(mc.ModeconnError, match="weights"):
            mc.ensemble(model, mc.States(given), (X, Y), weights=weights)


def test_samples_without_a_label_do_not_count(model: nn.Module):
    path, kept = mc.States(states(2)), torch.arange(41) % 4 != 0
    some = mc.ensemble(model, path, (X, torch.where(kept, Y, -100)))
    alone = mc.ensemble(model, path, (X[kept], Y[kept]))
    assert some.samples == alone.samples and some.loss == pytest.approx(alone.loss, rel=1e-6)
    with pytest.raises(mc.ModeconnError, match="no sample has a label"):
        mc.ensemble(model, path, (X, torch.full_like(Y, -100)))
    with pytest.raises(mc.ModeconnError, match="class labels"):
        mc.ensemble(model, path, (X, torch.randn(41, 3)))


def test_calibration_of_nothing_but_sure_samples():
    calibration = Calibration(bins=4)
    calibration.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert calibration.error == 0.5
    with pytest.raises(mc.ModeconnError, match="bins"):
        Calibration(0)
