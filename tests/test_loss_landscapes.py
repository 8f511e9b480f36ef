"""modeconn.dropin.loss_landscapes against loops written from the rules.

The rules are those of modeconn/dropin/loss_landscapes/contract.py, walked step by step here.
tests/peers compares with the package itself.
"""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
import modeconn.dropin.loss_landscapes as loss_landscapes
from dropin_cases import KINDS, SCANS, conv, norm, small
from modeconn.dropin.loss_landscapes import contract, values
from modeconn.evaluation.replay import schedule


@pytest.fixture(params=["as it is", "planned"])
def planning(request, monkeypatch) -> str:
    """Scans that are short run as they are; or all are planned, whatever they take."""
    if request.param == "planned":
        plan_everything(monkeypatch)
    return request.param


def plan_everything(monkeypatch) -> None:
    for module in (schedule, values):
        monkeypatch.setattr(module, "worth", lambda *_: "")
    monkeypatch.setattr(schedule, "_GAIN", float("inf"))


class Oracle:
    """The package's functions as loops that move a model in place."""

    GeneralModelWrapper = loss_landscapes.GeneralModelWrapper

    @staticmethod
    def _parameters(model: Any) -> list[Tensor]:
        modules = [model] if isinstance(model, nn.Module) else model.modules
        return [p for module in modules for p in module.parameters()]

    @staticmethod
    def _wrapped(model: Any) -> Any:
        from modeconn.dropin.loss_landscapes.wrappers import wrapped

        return wrapped(model)

    def point(self, model: Any, metric: Any) -> Any:
        return metric(self._wrapped(model))

    @torch.no_grad()
    def linear_interpolation(self, start: Any, end: Any, metric: Any, steps: int) -> np.ndarray:
        pairs = list(zip(self._parameters(start), self._parameters(end)))
        return self._line(start, [(b - a) / steps for a, b in pairs], metric, steps)

    @torch.no_grad()
    def random_line(
        self, model: Any, metric: Any, distance: float, steps: int, how: str | None
    ) -> np.ndarray:
        weights = self._parameters(model)
        d = [torch.rand(p.shape) for p in weights]
        d = self._normalized(d, weights, how)
        length = self._norm(weights) / distance / steps
        return self._line(model, [x * length / self._norm(d) for x in d], metric, steps)

    @torch.no_grad()
    def planar_interpolation(
        self, start: Any, one: Any, two: Any, metric: Any, steps: int
    ) -> np.ndarray:
        weights = self._parameters(start)
        ds = [
            [(b - a) / steps for a, b in zip(weights, self._parameters(end))] for end in (one, two)
        ]
        return self._plane(start, ds, metric, steps)

    @torch.no_grad()
    def random_plane(
        self, model: Any, metric: Any, distance: float, steps: int, how: str | None
    ) -> np.ndarray:
        weights = self._parameters(model)
        first = [torch.rand(p.shape) for p in weights]
        second = [torch.rand(p.shape) for p in weights]
        share = sum((a * b).sum() for a, b in zip(first, second)) / self._norm(first) ** 2
        second = [b - share * a for a, b in zip(first, second)]
        ds = []
        for d in (first, second):
            d = self._normalized(d, weights, how)
            length = self._norm(weights) / distance / steps
            ds.append([x * length / self._norm(d) for x in d])
        for d in ds:
            self._move(model, d, -steps / 2)
        return self._plane(model, ds, metric, steps)

    def _line(self, model: Any, d: list[Tensor], metric: Any, steps: int) -> np.ndarray:
        found = []
        for _ in range(steps):
            self._move(model, d, 1)
            found.append(metric(self._wrapped(model)))
        return np.array(found)

    def _plane(self, model: Any, ds: list[list[Tensor]], metric: Any, steps: int) -> np.ndarray:
        rows = []
        for i in range(steps):
            row: list[Any] = []
            for _ in range(steps):
                self._move(model, ds[1], -1 if i % 2 else 1)
                row.insert(0 if i % 2 else len(row), metric(self._wrapped(model)))
            rows.append(row)
            self._move(model, ds[0], 1)
        return np.array(rows)

    def _move(self, model: Any, d: list[Tensor], factor: float) -> None:
        with torch.no_grad():
            for p, x in zip(self._parameters(model), d):
                p.add_(x, alpha=factor)

    @staticmethod
    def _norm(tensors: list[Tensor]) -> float:
        return float(torch.cat([t.detach().flatten() for t in tensors]).norm())

    def _normalized(self, d: list[Tensor], weights: list[Tensor], how: str | None) -> list[Tensor]:
        d = [x.clone() for x in d]
        for x, w in zip(d, weights):
            if how == "model":  # one after another: those before count as they are now
                x *= self._norm(weights) / self._norm(d)
            elif how == "layer":
                x *= w.norm() / x.norm()
            elif how == "filter" and w.dim() == 1:
                x.copy_(x.sign() * w.abs())
            elif how == "filter":
                for row, its in zip(x, w):
                    row *= its.norm() / row.norm()
        return d


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


# -- kinds of metric -------------------------------------------------------------------------------

X, Y = KINDS["mlp"][1](), torch.arange(30) % 4
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 30, 8)]


def accuracy(model: Any) -> float:
    return (model.forward(X).argmax(1) == Y).float().mean().item()


def over_batches(model: Any) -> float:
    return float(np.mean([F.cross_entropy(model.forward(x), y).item() for x, y in BATCHES]))


def with_penalty(model: Any) -> float:
    squares = sum(p.square().sum() for p in model.get_module_parameters())
    return (F.cross_entropy(model.forward(X), Y) + 0.1 * squares).item()


def of_the_module(model: Any) -> float:
    return F.cross_entropy(model.modules[0](X), Y).item()


def own_loss(model: Any) -> float:
    return (model.forward(X).softmax(1)[:, 0] - 0.5).abs().mean().item()


def in_eval(model: Any) -> float:
    model.eval()
    return F.cross_entropy(model.forward(X), Y).item()


def noisy(model: Any) -> float:
    return F.cross_entropy(model.forward(X + 0.1 * torch.randn_like(X)), Y).item()


def gradient_norm(model: Any) -> float:
    model.requires_grad_(True)
    parameters = [p for module in model.modules for p in module.parameters()]
    found = torch.autograd.grad(F.cross_entropy(model.forward(X), Y), parameters)
    model.requires_grad_(False)
    return float(sum(g.norm() for g in found))


def curvature(model: Any) -> float:
    model.requires_grad_(True)
    parameters = [p for module in model.modules for p in module.parameters()]
    value = F.cross_entropy(model.forward(X), Y)
    first = torch.autograd.grad(value, parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), parameters)
    model.requires_grad_(False)
    return float(sum(g.norm() for g in second))


def shuffled(model: Any) -> float:
    order = torch.randperm(30)[:10]
    return F.cross_entropy(model.forward(X[order]), Y[order]).item()


def episode(model: Any) -> float:
    seen, total = torch.ones(1, 6), 0.0
    for _ in range(3):
        out = model.forward(seen)
        total += out.max().item()
        seen = torch.cat([seen[:, 1:], out[:, :1]], 1)
    return total


def perturbed(model: Any) -> Any:
    return loss_landscapes.metrics.LossPerturbations(F.cross_entropy, X, Y, 2, 0.1)(model)


def loss(function: Any) -> Any:
    return loss_landscapes.metrics.Loss(function, X, Y)


# By name: the metric, forwards per point, and how many of them run at each of 12 points; two of
# those points run in any case, and the losses that the evaluator has run there alone.
METRICS: dict[str, tuple[Any, int, int]] = {
    "loss": (loss(nn.CrossEntropyLoss()), 1, 0),
    "smoothing": (loss(nn.CrossEntropyLoss(label_smoothing=0.1)), 1, 0),
    "class weights": (loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]))), 1, 0),
    "own loss in Loss": (loss(lambda o, y: (o.logsumexp(1) - o[:, 0]).mean()), 1, 0),
    "own loss": (own_loss, 1, 0),
    "accuracy": (accuracy, 1, 0),
    "loader": (over_batches, 4, 0),
    "reads weights": (with_penalty, 1, 0),
    "modules[0](x)": (of_the_module, 1, 0),
    "pipeline": (loss_landscapes.metrics.MetricPipeline([accuracy, over_batches]), 5, 0),
    "eval inside": (in_eval, 1, 0),
    "noise": (noisy, 1, 1),
    "gradient": (gradient_norm, 1, 1),
    "curvature": (curvature, 1, 1),
    "shuffled": (shuffled, 1, 1),
    "episode": (episode, 3, 2),  # its first step is the same at every point
    "perturbations": (perturbed, 3, 2),
}


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    return small(0), small(1)


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """The forwards of all scans in the test, by what became of them."""
    counts = {"answered": 0, "run": 0}

    def mapped(*args: Any, **options: Any) -> Any:
        result = mc.map(*args, **options)
        for key in counts:
            counts[key] += result.info[key]
        return result

    monkeypatch.setattr(values, "mapped", mapped)
    return counts


@pytest.mark.filterwarnings("ignore:the function changes")
@pytest.mark.parametrize("name", METRICS)
def test_kinds_of_metric(name: str, networks, counted, monkeypatch):
    plan_everything(monkeypatch)
    metric, forwards, always = METRICS[name]
    a, b = networks
    torch.manual_seed(2)
    expected = Oracle().linear_interpolation(copy.deepcopy(a), b, metric_of(metric), 12)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    got = loss_landscapes.linear_interpolation(a, b, metric, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert counted["run"] == 2 * forwards + 10 * always


def metric_of(metric: Any) -> Any:
    """The metric in a loop that keeps no gradients off: those that need one turn it on."""

    def call(model: Any) -> Any:
        with torch.enable_grad():
            model.requires_grad_(False)
            return metric(model)

    return call


def test_norms_in_training_mode_run(counted, monkeypatch):
    plan_everything(monkeypatch)
    a, b = norm(0).train(), norm(1)
    inputs = KINDS["norm"][1]()
    metric = loss_landscapes.metrics.Loss(nn.CrossEntropyLoss(), inputs, torch.arange(20) % 3)
    expected = Oracle().linear_interpolation(copy.deepcopy(a), b, metric, 8)
    got = loss_landscapes.linear_interpolation(a, b, metric, 8)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert counted == {"answered": 0, "run": 8}
    assert a.training and a[1].num_batches_tracked == 0


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
