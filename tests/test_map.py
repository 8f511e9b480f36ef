"""mc.map: any function at every point; answered where that is the same, run where it is not."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import modeconn as mc
from modeconn.evaluation.replay import schedule
from naive import mlp

X = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 4
T = np.linspace(-0.25, 1.25, 9)


@pytest.fixture(scope="module")
def ends() -> tuple[nn.Module, nn.Module]:
    return mlp(7, 9, 4, seed=0), mlp(7, 9, 4, seed=1)


def loop(fn, model: nn.Module, path, points=T) -> list:
    """The same by a loop over fresh copies."""
    values = []
    for t in points:
        made = copy.deepcopy(model)
        made.load_state_dict(path.at(t))
        values.append(fn(made))
    return values


def check(fn, model, path, answered: int | None = None, points=T, **options) -> mc.MapResult:
    """Compare with the loop, random states included, and the number of answers."""
    torch.manual_seed(3)
    expected = loop(fn, model, path, points)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    before = copy.deepcopy(model.state_dict())
    got = mc.map(fn, model, path, points, **{"replay": True, **options})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    np.testing.assert_allclose(np.array(list(got)), np.array(expected), rtol=2e-5, atol=1e-6)
    if answered is not None:
        assert (got.info["answered"], got.info["run"]) == (
            answered,
            got.info["forwards"] - answered,
        )
    return got


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(X), Y).item()


def test_calls_that_repeat_are_answered(ends):
    a, b = ends
    got = check(loss, a, mc.Line(a, b), answered=7)
    counts = {"points": 9, "forwards": 9, "answered": 7, "run": 2, "changed": 0}
    assert got.info == {**counts, "reason": ""}
    assert got.t.tolist() == T.tolist()
    assert len(got) == 9 and got[-1] == got.values[8]
    assert repr(got) == "MapResult(9 points, 9 forwards, 7 of them answered)"
    result = mc.evaluate(a, mc.Line(a, b), (X, Y), T, metrics=("loss",))
    np.testing.assert_allclose(result.loss, list(got), rtol=1e-5)


def test_chunks_each_begin_with_a_forward_that_runs(ends, monkeypatch):
    a, b = ends
    monkeypatch.setattr(schedule, "_PROBE", 3)
    # two points, then two answers; the fifth point runs, and its chunk has the rest
    check(loss, a, mc.Line(a, b), answered=6)


def test_batches_of_a_loader_and_points_in_any_order(ends):
    a, b = ends
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=6)

    def accuracy(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return sum((model(x).argmax(1) == y).sum().item() for x, y in data) / len(X)

    path = mc.Bezier([a, mlp(7, 9, 4, seed=2), b])
    t = [0.9, 0.1, 0.5, 0.5, 0.0, 1.0]
    done = []
    got = check(
        accuracy, a, path, answered=4 * 4, points=t, progress=lambda *both: done.append(both)
    )
    assert got.info["forwards"] == 24
    assert done == [(i + 1, 6) for i in range(6)]


def test_planes_and_what_a_function_reads_besides(ends):
    a, _ = ends

    def penalized(model: nn.Module) -> float:
        return loss(model) + sum(float(p.detach().square().sum()) for p in model.parameters())

    plane = mc.Plane.random(a, seed=1)
    check(penalized, a, plane, answered=7, points=plane.points(3))


def test_inputs_that_change_run(ends):
    a, b = ends
    path, seen = mc.Line(a, b), []

    def noisy(model: nn.Module) -> float:
        return loss(model) + model(X + torch.randn_like(X)).mean().item()

    got = check(noisy, a, path)
    assert (got.info["answered"], got.info["forwards"]) == (7, 18)

    def in_place(model: nn.Module) -> float:
        x = X.clone()
        first = model(x).mean().item()
        x.data.mul_(len(seen) // 2 % 2 + 1.0)  # one tensor, other numbers, the same version
        seen.append(0)
        return first + 3 * model(x).mean().item()

    values = loop(in_place, a, path)
    seen.clear()
    got = mc.map(in_place, a, path, T, replay=True)
    np.testing.assert_allclose(list(got), values, rtol=1e-4, atol=1e-6)
    assert 0 < got.info["answered"] < 14


def test_shuffled_data_are_never_answered(ends):
    a, b = ends
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), batch_size=8, shuffle=True
    )

    def mean(model: nn.Module) -> float:
        return np.mean([F.cross_entropy(model(x), y).item() for x, y in data])

    got = check(mean, a, mc.Line(a, b), answered=0)
    assert "repeats from point to point" in got.info["reason"]


@pytest.mark.parametrize("how", ["in place", "data", "slot", "load", "attribute", "submodule"])
def test_a_changed_model_runs_as_it_is(ends, how: str):
    a, b = ends

    def change(model: nn.Module) -> None:
        if how == "in place":
            with torch.no_grad():
                model[0].weight.add_(0.5)
        elif how == "data":  # `_version` does not see it
            model[0].weight.data.add_(0.5)
        elif how == "slot":
            model[0].weight = nn.Parameter(model[0].weight.detach() + 0.5)
        elif how == "load":
            model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
        elif how == "attribute":
            model[2].forward = lambda x: x.sum(1, keepdim=True)
        else:
            model[1] = nn.Tanh()

    def moved(model: nn.Module) -> float:
        first = loss(model)
        change(model)
        return first + model(X).square().mean().item()

    if how in ("attribute", "submodule"):
        got = check(moved, a, mc.Line(a, b))
    else:
        with pytest.warns(UserWarning, match=r"changes the model's weights, first at t = -0\.25"):
            got = check(moved, a, mc.Line(a, b))
        assert got.info["changed"] == 9
    assert (got.info["answered"], got.info["run"]) == (7, 11)


def double(model: nn.Module) -> None:
    model.double()


def other_memory(model: nn.Module) -> None:
    model[0].weight.data = torch.zeros_like(model[0].weight)


def hook_around(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, output: 2 * output)


def hook_within(model: nn.Module) -> None:
    model[1].register_forward_hook(lambda module, args, output: 2 * output)


def freeze(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)


@pytest.mark.parametrize("leave", [double, other_memory, hook_around, hook_within, freeze])
@pytest.mark.filterwarnings("ignore:the function changes")
def test_nothing_is_left_at_the_next_point(ends, leave):
    a, b = ends

    def fn(model: nn.Module) -> list[float]:
        before = [loss(model), *(float(p.requires_grad) for p in model.parameters())]
        leave(model)
        return [*before, model(X.to(model[0].weight.dtype)).mean().item()]

    check(fn, a, mc.Line(a, b))


def test_functional_calls_and_copies_run(ends):
    a, b = ends

    def other(model: nn.Module) -> float:
        doubled = {k: 2 * v.detach() for k, v in model.named_parameters()}
        made = copy.deepcopy(model)
        with torch.no_grad():
            made[0].weight.zero_()
            return (
                functional_call(model, doubled, (X,)).mean().item()
                + made(X).mean().item()
                + torch.func.vmap(model)(X).mean().item()
                + loss(model)
            )

    got = check(other, a, mc.Line(a, b))
    assert got.info["answered"] == 7  # the loss alone


def test_hooks_see_every_forward(ends):
    a, b = ends

    def features(model: nn.Module) -> float:
        kept: list[Tensor] = []
        handle = model[0].register_forward_hook(lambda module, args, out: kept.append(out))
        model(X)
        handle.remove()
        return kept[0].mean().item()

    got = check(features, a, mc.Line(a, b), answered=0)
    assert got.info["run"] == 9


def test_gradients_of_answers_are_the_models(ends):
    a, b = ends
    count = [0]

    def late(model: nn.Module) -> float:
        """No gradient at the points that run, first and second derivatives at the others."""
        count[0] += 1
        value = F.cross_entropy(model(X), Y)
        if count[0] % 9 in (1, 2):
            return value.item()
        parameters = list(model.parameters())
        first = torch.autograd.grad(value, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        return float(sum(g.abs().sum() for g in second))

    got = check(late, a, mc.Line(a, b))
    assert got.info["answered"] == 1
    assert "gradients are taken" in got.info["reason"]

    def always(model: nn.Module) -> float:
        F.cross_entropy(model(X), Y).backward()
        return float(sum(p.grad.abs().sum() for p in model.parameters()))

    check(always, a, mc.Line(a, b), answered=0)


def test_training_mode_and_random_layers_run():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    other = copy.deepcopy(norm)
    with torch.no_grad():
        other[0].weight.add_(0.3)
    got = check(loss, norm, mc.Line(norm, other), answered=0)
    assert got.info["changed"] == 0

    def evaluated(model: nn.Module) -> float:
        return loss(model.eval())

    check(evaluated, norm, mc.Line(norm, other), answered=7)
    assert norm.training and norm[1].training


class Several(nn.Module):
    """Takes two inputs, by name too, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"sum": self.one(x).tanh() + self.two(z), "two": self.two(z)}


def test_several_inputs_and_outputs():
    torch.manual_seed(1)
    a, b, z = Several(), Several(), torch.randn(20, 2)

    def fn(model: nn.Module) -> float:
        one, two = model(X, z), model(X, z=2 * z)
        three = model(x=X, z=z)
        return (one["sum"] + two["two"] + three["sum"]).mean().item()

    check(fn, a, mc.Line(a, b), answered=3 * 7)


def test_values_keep_what_they_were(ends):
    a, b = ends
    path = mc.Line(a, b)

    def kept(model: nn.Module) -> dict:
        out = model(X)
        weight = model[0].weight
        result = {"weight": weight, "view": weight[0], "out": out, "copy": out.detach().clone()}
        out.detach().zero_()  # what a function does to an output is its own affair
        return result

    for t, value in zip(T, mc.map(kept, a, path, T, replay=True)):
        assert torch.equal(value["weight"], path.at(t)["0.weight"]), t
        assert torch.equal(value["view"], path.at(t)["0.weight"][0])
        assert not value["out"].any() and value["copy"].any()


def test_an_exception_names_its_point(ends):
    a, b = ends

    def fails(model: nn.Module) -> float:
        if model[0].bias.detach().equal(mc.Line(a, b).at(0.5)["0.bias"]):
            raise KeyError("no such batch")
        return loss(model)

    with pytest.raises(KeyError, match="no such batch") as info:
        mc.map(fails, a, mc.Line(a, b), [0.0, 0.25, 0.5])
    said = info.value.__notes__[0] if sys.version_info >= (3, 11) else str(info.value.__cause__)
    assert said == "raised at point 2, t = 0.5, by the function"


def test_short_scans_are_not_captured(ends, monkeypatch):
    a, b = ends
    monkeypatch.setattr(schedule.Passes, "outputs", lambda *_: pytest.fail("planned"))
    got = mc.map(loss, mlp(7, 9, 4, seed=0), mc.Line(a, b), 40)
    assert got.info["answered"] == 0
    assert "take less time" in got.info["reason"]
    assert mc.map(loss, a, mc.Line(a, b), 2, replay=True).info["run"] == 2
    assert mc.map(loss, a, mc.Line(a, b), 5, replay=False).info["reason"] == "replay is False"


def test_planned_passes_that_are_slower_end(ends, monkeypatch):
    a, b = ends
    monkeypatch.setattr(schedule, "worth", lambda *_: "")
    monkeypatch.setattr(schedule, "_GAIN", 0.0)
    monkeypatch.setattr(schedule, "_PROBE", 4)
    got = mc.map(loss, a, mc.Line(a, b), 9)
    assert got.info["answered"] == 3  # those of the first chunk
    assert "planned passes take as long" in got.info["reason"]


def test_buffers_of_the_start_and_models_in_float64():
    torch.manual_seed(0)
    a = (
        nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        .double()
        .eval()
    )
    b = copy.deepcopy(a)
    b[1].running_mean.fill_(2.0)
    x = X.double()

    def fn(model: nn.Module) -> float:
        assert model[1].running_mean.eq(0).all()
        return model(x).square().mean().item()

    got = mc.map(fn, a, mc.Line(a, b), T, buffers="start", replay=True)
    assert got.info["answered"] == 7
    np.testing.assert_allclose(list(got), np.full(9, fn(a)), rtol=1e-12)


def test_what_is_refused(ends):
    a, b = ends
    for options, says in (
        ({"fn": 3}, "fn is of type int"),
        ({"points": 0}, "points is 0"),
        ({"buffers": "recompute"}, "buffers is 'recompute'"),
        ({"backend": "fast"}, "backend 'fast' is unknown"),
        ({"model": mlp(7, 8, 4)}, "does not match"),
        ({"memory_budget": 0}, "memory_budget is 0"),
    ):
        given = {"fn": loss, "model": a, "path": mc.Line(a, b), "points": 3} | options
        with pytest.raises(mc.ModeconnError, match=says):
            mc.map(**given)
