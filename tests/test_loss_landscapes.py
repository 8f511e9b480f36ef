"""modeconn.dropin.loss_landscapes against loops written from the rules.

The rules are those of modeconn/dropin/loss_landscapes/contract.py, walked step by step here.
tests/peers compares with the package itself.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import landscape_cases
import modeconn as mc
import modeconn.dropin.loss_landscapes as loss_landscapes
from dropin_cases import KINDS, SCANS, conv, small
from landscape_cases import Oracle, X, Y, accuracy, loss, own_loss, plan_everything, with_penalty
from modeconn.dropin.loss_landscapes import contract, values

# Fixtures.
networks = landscape_cases.networks


@pytest.fixture(params=["as it is", "planned"])
def planning(request, monkeypatch) -> str:
    """Scans that are short run as they are; or all are planned, whatever they take."""
    if request.param == "planned":
        plan_everything(monkeypatch)
    return request.param


def outcome(library: Any, metrics: Any, kind: str, scan: str, steps: int, how: str | None) -> Any:
    make, inputs = KINDS[kind]
    metric = metrics.Loss(nn.CrossEntropyLoss(), inputs(), torch.arange(len(inputs())) % 3)
    torch.manual_seed(5)
    found = SCANS[scan](library, lambda seed: make(library, seed), metric, steps, how)
    return found, torch.get_rng_state()


@pytest.mark.parametrize("kind", KINDS)
def test_the_five_functions(kind: str, planning: str):
    for scan in SCANS:
        for how in contract.NORMALIZATIONS if scan.startswith("random") else ["filter"]:
            for steps in (3, 4) if how == "filter" else [3]:
                ours, state = outcome(
                    loss_landscapes, loss_landscapes.metrics, kind, scan, steps, how
                )
                theirs, expected = outcome(
                    Oracle(), loss_landscapes.metrics, kind, scan, steps, how
                )
                assert np.shape(ours) == np.shape(theirs)
                assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), (scan, how)
                assert torch.equal(state, expected)


def test_the_evaluator_has_the_losses_that_it_knows(monkeypatch):
    plan_everything(monkeypatch)
    calls = []
    monkeypatch.setattr(
        values, "evaluate", lambda *a, **k: calls.append(a[3]) or mc.evaluate(*a, **k)
    )
    outcome(loss_landscapes, loss_landscapes.metrics, "mlp", "random plane", 4, "filter")
    assert [len(points) for points in calls] == [15]
    # a mean of outputs and targets that broadcast is no mean of rows: seen at the second point
    x, y = torch.randn(6, 6), torch.randn(6)
    one = nn.Sequential(small(0), nn.Linear(4, 1))
    metric = loss_landscapes.metrics.Loss(nn.MSELoss(), x, y)
    with pytest.warns(UserWarning, match="target size"):
        got = loss_landscapes.linear_interpolation(one, copy.deepcopy(one), metric, 5)
    with pytest.warns(UserWarning, match="target size"):
        expected = F.mse_loss(one(x), y).item()
    np.testing.assert_allclose(got, np.full(5, expected), rtol=1e-5)


# -- what is different on purpose ------------------------------------------------------------------


def test_models_are_left_alone(networks):
    a, b = networks
    before = copy.deepcopy(a.state_dict())
    loss_landscapes.random_plane(a, accuracy, 1, 3)
    loss_landscapes.linear_interpolation(a, b, accuracy, 3, deepcopy_model=True)
    assert all(p.requires_grad for p in a.parameters())
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())


def test_a_metric_that_reads_the_users_model_moves_it(networks):
    a, b = networks
    before = copy.deepcopy(a.state_dict())
    torch.manual_seed(0)
    got = loss_landscapes.linear_interpolation(
        a, b, lambda _: F.cross_entropy(a(X), Y).item() + torch.rand(1).item(), 5
    )
    torch.manual_seed(0)
    expected = [F.cross_entropy(at(a, b, t), Y).item() + torch.rand(1).item() for t in range(1, 6)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())
    agent = loss_landscapes.GeneralModelWrapper(object(), [a], lambda _, x: a(x))
    got = loss_landscapes.linear_interpolation(agent, b, loss(nn.CrossEntropyLoss()), 5)
    expected = [F.cross_entropy(at(a, b, t), Y).item() for t in range(1, 6)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def at(a: nn.Module, b: nn.Module, t: int) -> Tensor:
    made = copy.deepcopy(a)
    made.load_state_dict(mc.Line(a, b).at(t / 5))
    return made(X)


def test_directions_of_zero_stay_zero():
    model = conv(0)
    nn.init.zeros_(model[0].bias)
    metric = loss_landscapes.metrics.Loss(F.cross_entropy, KINDS["conv"][1](), Y[:20])
    for how in contract.NORMALIZATIONS:
        assert np.isfinite(loss_landscapes.random_line(model, metric, 0.5, 3, how)).all()


def test_fixed_planes_are_aligned(networks):
    a, b = networks
    c = small(2)
    got = loss_landscapes.planar_interpolation(a, b, c, with_penalty, 4, fixed=True)
    path = mc.Plane.through(a, b, c)
    made = copy.deepcopy(a)
    for i, j in np.ndindex(4, 4):
        made.load_state_dict(path.at([i / 4, j / 4]))
        expected = with_penalty(Oracle._wrapped(made))
        assert got[i, j] == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(0)
    plane = loss_landscapes.random_plane(a, own_loss, 0.5, 4, fixed=True)
    assert plane[2, 2] == pytest.approx(own_loss(Oracle._wrapped(a)), rel=1e-5)  # the centre


def test_gradients_and_returns(networks):
    a, _ = networks
    metrics = loss_landscapes.metrics
    got = loss_landscapes.point(a, metrics.LossGradient(F.cross_entropy, X, Y))
    expected = torch.autograd.grad(F.cross_entropy(a(X), Y), list(a.parameters()))
    np.testing.assert_allclose(got, torch.cat([g.flatten() for g in expected]), rtol=1e-4)

    class Environment:
        def reset(self) -> np.ndarray:
            self.left = 2
            return np.ones(6)

        def step(self, action: Tensor) -> tuple[np.ndarray, float, bool, dict]:
            self.left -= 1
            return np.zeros(6), 1.5, self.left == 0, {}

    assert loss_landscapes.point(a, metrics.ExpectedReturnMetric(Environment(), 2)) == 3.0


def test_an_exception_names_its_point(networks):
    a, b = networks
    calls = [0]

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyError("no such class")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(KeyError, match="no such class") as info:
        loss_landscapes.linear_interpolation(a, b, loss(fails), 5)
    calls[0] = 0
    cross_entropy = nn.CrossEntropyLoss()
    cross_entropy.register_forward_pre_hook(lambda module, args: (fails(*args), None)[1])
    with pytest.raises(KeyError, match="no such class") as known:
        loss_landscapes.linear_interpolation(a, b, loss(cross_entropy), 5)
    for each in (info, known):
        error = each.value
        said = error.__notes__[0] if sys.version_info >= (3, 11) else str(error.__cause__)
        assert said == "raised at point 3, t = 0.8, by the function"


def test_what_is_refused(networks, monkeypatch):
    a, _ = networks
    with pytest.raises(AttributeError, match="normalization is 'filters'"):
        loss_landscapes.random_line(a, accuracy, normalization="filters")
    with pytest.raises(ValueError, match="of type dict: expected a torch"):
        loss_landscapes.point({}, accuracy)
    with pytest.raises(mc.ModeconnError, match="4 and 2 parameters"):
        loss_landscapes.linear_interpolation(a, nn.Linear(6, 4), accuracy)
    with pytest.raises(mc.ModeconnError, match="steps is 0"):
        loss_landscapes.random_plane(a, accuracy, steps=0)
    with pytest.raises(AttributeError, match="no attribute 'nudged_elastic_band': it has"):
        loss_landscapes.nudged_elastic_band  # noqa: B018
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.1.0")
    contract.tell_of_other_versions.cache_clear()
    with pytest.warns(UserWarning, match=r"4\.1\.0 is installed.*rules of 3\.0\.6"):
        loss_landscapes.point(a, accuracy)
    contract.tell_of_other_versions.cache_clear()
