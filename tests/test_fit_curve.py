"""Trained curves: against Garipov's step as it is written, their ends, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.parameters.path_files import metadata_of
from modeconn.training.curves.drawing import Drawing
from modeconn.training.curves.loop import Diverged, Samples
from modeconn.training.curves.settings import rate_at
from modeconn.training.curves.working import Working
from modeconn.training.order import order_of_epoch, seed_of
from naive import mlp

N = 600
X = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3].argmax(1) + 3 * (X[:, 4] > 0)).long()


def trained(seed: int) -> nn.Module:
    net = mlp(8, 16, 16, 6, seed=seed)
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(120):
        adam.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        adam.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets() -> list[nn.Module]:
    return [trained(k) for k in range(2)]


def fit(nets, **more):
    return mc.fit_curve(nets[0], *nets, (X, Y), **{"align": False, "points": 5, "steps": 9} | more)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def garipov(nets, kind, bends, steps, weight_decay, lr=1e-3, size=128):
    """Garipov's step as plain PyTorch has it: parameters of the control points under autograd."""
    model, x = copy.deepcopy(nets[0]).train(), X.double()
    a, b = (net.state_dict() for net in nets)
    line = mc.Line(a, b)
    points = [line.at((k + 1) / (bends + 1)) for k in range(bends)]
    for point in points:
        for value in point.values():
            value.requires_grad_(True)
    path = {"bezier": mc.Bezier, "polychain": mc.PolyChain}[kind]([a, *map(dict, points), b])
    adam = torch.optim.Adam([value for point in points for value in point.values()], lr)
    drawing = Drawing("importance", 0)
    for step in range(steps):
        t = drawing.at(step)
        c = path.coefficients([t])[0].tolist()
        theta = {k: sum(x * p[k] for x, p in zip(c, [a, *points, b])) for k in a}
        epoch, place = divmod(step, N // size)
        rows = order_of_epoch(seed_of(0, epoch + 1), N)[place * size : (place + 1) * size]
        loss = F.cross_entropy(torch.func.functional_call(model, theta, (x[rows],)), Y[rows])
        drawing.add(t, loss.item())
        norm = sum(value.square().sum() for value in theta.values())
        for group in adam.param_groups:
            group["lr"] = lr * rate_at(step, steps)
        adam.zero_grad()
        (loss + weight_decay / 2 * norm).backward()
        adam.step()
    return points


@pytest.mark.parametrize(
    "kind, bends, weight_decay", [("bezier", 1, 0.0), ("bezier", 2, 1e-2), ("polychain", 2, 0.0)]
)
def test_steps_are_garipovs(nets, kind, bends, weight_decay):
    # in float64: Adam turns rounding of small gradients into whole steps
    nets = [copy.deepcopy(net).double() for net in nets]
    found = fit(nets, kind=kind, bends=bends, steps=12, weight_decay=weight_decay)
    expected = garipov(nets, kind, bends, 12, weight_decay)
    assert len(found.path.control_points) == bends + 2
    for point, plain in zip(found.path.control_points[1:-1], expected):
        for name, value in plain.items():
            torch.testing.assert_close(point[name], value.detach(), rtol=0, atol=1e-9)


def test_ends_are_bitwise_the_given_networks_and_the_loss_falls(nets):
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    found = fit(nets, steps=300, points="adaptive", test=(X[:500], Y[:500]), lr=1e-2)
    for t, net, kept in zip((0.0, 1.0), nets, before):
        assert_same(found.path.at(t), net.state_dict())
        assert_same(net.state_dict(), kept)
    line = mc.evaluate(nets[0], mc.Line(*nets), (X, Y), points=21)
    assert found.result.loss.max() < 0.5 * line.loss.max()
    assert found.test.samples == 500 and found.result.samples == N
    assert found.stopped == "300 steps done" and found.history[-1]["step"] == 300
    assert "train loss: at most" in str(found) and not nets[0].training


def test_a_module_in_another_memory_format_is_trained_in_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images, labels = torch.randn(40, 3, 8, 8), torch.arange(40) % 3
    other = {k: v + 0.1 * torch.randn_like(v) for k, v in net.state_dict().items()}
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    working = Working(last, mc.load(last))
    assert working.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(working.rows([other])[0], working.vector)
    one, two = (
        mc.fit_curve(m, net, other, (images, labels), align=False, steps=3, points=3)
        for m in (net, last)
    )
    for name, value in one.path.control_points[1].items():
        torch.testing.assert_close(two.path.control_points[1][name], value, rtol=0, atol=1e-4)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    one, other = Tied(), Tied()
    found = mc.fit_curve(
        one, one, other, (X, X), loss="mse", align=False, epochs=2, points=3, batch_size=100
    )
    bend = found.path.control_points[1]
    assert torch.equal(bend["up.weight"], bend["down.weight"]) and found.history[-1]["step"] == 12
    assert list(found.result.values) == ["loss"]


def test_norms_normalize_by_the_batch_and_are_recomputed_at_the_end():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
    other = {k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    found = mc.fit_curve(net.eval(), net, other, (X, Y), align=False, steps=20, points=5, lr=1e-2)
    assert found.result.passes == 2
    again = mc.evaluate(net, found.path, (X, Y), 5, buffers="recompute")
    np.testing.assert_allclose(found.result.loss, again.loss, rtol=1e-6)
    assert_same(found.path.at(1.0), other)
    with pytest.raises(mc.ModeconnError, match="batch_size is 1, and the network has 1 batch norm"):
        mc.fit_curve(net, net, other, (X, Y), align=False, steps=2, batch_size=1)


def test_any_loss_augmentation_and_optimizer(nets):
    seen = []

    def augment(inputs):
        seen.append(len(inputs))
        return inputs + 0.1 * torch.randn_like(inputs)

    def squares(outputs, targets):
        return (outputs - F.one_hot(targets, 6)).square().sum(1)

    def sgd(points):
        return torch.optim.SGD(points, lr=0.01, momentum=0.9)

    state = torch.random.get_rng_state()
    more = {"loss": squares, "augment": augment, "optimizer": sgd, "t": "uniform"}
    one, two = (fit(nets, **more, steps=7) for _ in range(2))
    assert seen == [128] * 14 and torch.equal(state, torch.random.get_rng_state())
    assert_same(one.path.control_points[1], two.path.control_points[1])
    assert one.history[0]["lr"] == 0.01


def test_a_loss_that_is_not_finite_names_step_and_t(nets, tmp_path):
    def breaks(outputs, targets):
        broken = outputs.sum(1) * (float("inf") if len(calls) == 4 else 1.0)
        calls.append(1)
        return broken

    calls: list[int] = []
    file = tmp_path / "c.safetensors"
    with pytest.raises(Diverged, match=r"the loss is .* at step \d \(t = 0\.\d+\).*keeps") as found:
        fit(nets, loss=breaks, checkpoint=file, steps=50)
    assert found.value.points.isfinite().all()
    assert not file.exists() and (tmp_path / "c.safetensors.training").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"kind": "spline"}, 'kind is \'spline\': expected "bezier" or "polychain"'),
        ({"bends": 0}, "bends is 0: expected a whole number, at least 1"),
        ({"steps": 0}, "steps is 0: expected a whole number, at least 1"),
        ({"steps": None}, "steps and epochs: neither is given"),
        ({"epochs": 1}, "steps and epochs: both are given"),
        ({"steps": None, "epochs": -1}, "epochs is -1"),
        ({"lr": 0.0}, "lr is 0.0: expected a positive number"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: expected at least 0"),
        ({"t": "normal"}, 't is \'normal\': expected "importance" or "uniform"'),
        ({"seed": -1}, "seed is -1"),
        ({"optimizer": "adam"}, "optimizer is a str: expected a callable"),
        ({"resume": True}, "resume needs a checkpoint"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
    ],
)
def test_bad_settings(nets, more, message):
    with pytest.raises(mc.ModeconnError, match=message):
        fit(nets, **more)


def test_bad_networks_and_data(nets):
    with pytest.raises(mc.ModeconnError, match="does not match"):
        mc.fit_curve(nets[0], nets[0], mlp(8, 15, 16, 6), (X, Y), align=False, steps=1)
    with pytest.raises(mc.ModeconnError, match="does not take the data's inputs"):
        mc.fit_curve(nets[0], *nets, (X[:, :5], Y), align=False, steps=1)
    with pytest.raises(mc.ModeconnError, match=r"labels|classes"):
        mc.fit_curve(nets[0], *nets, (X, Y + 50), align=False, steps=1)


# -- resuming --------------------------------------------------------------------------------------


def test_a_resumed_fit_ends_at_the_same_curve_to_the_bit(nets, tmp_path):
    file = tmp_path / "c.safetensors"
    more = {"steps": 260, "bends": 2, "checkpoint": file}
    whole = fit(nets, **more | {"checkpoint": None})

    def stop(done, total):
        if done in stops:
            stops.remove(done)
            raise KeyboardInterrupt

    stops = [37, 151]
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt, match="keeps the fit"):
            fit(nets, **more, resume=resume, progress=stop)
    with pytest.raises(mc.ModeconnError, match="holds an unfinished fit: resume it"):
        fit(nets, **more)
    with pytest.raises(mc.ModeconnError, match=r"started with lr 0.001, not 0.002"):
        fit(nets, **more, resume=True, lr=2e-3)
    with pytest.raises(mc.ModeconnError, match="other data"):
        mc.fit_curve(nets[0], *nets, (X + 1, Y), align=False, points=5, **more, resume=True)
    resumed = fit(nets, **more, resume=True)
    for one, other in zip(whole.path.control_points, resumed.path.control_points):
        assert_same(one, other)
    assert resumed.history == whole.history
    assert file.exists() and not (tmp_path / "c.safetensors.training").exists()
    for one, other in zip(mc.load_path(file).control_points, whole.path.control_points):
        assert_same(one, other)
    with pytest.raises(mc.ModeconnError, match="no such file, so there is no fit to resume"):
        fit(nets, **more, resume=True)


def test_t_is_drawn_where_the_loss_is_high():
    drawing = Drawing("importance", 3)
    for _ in range(200):
        for t in np.linspace(0, 0.999, 16):
            drawing.add(float(t), 10.0 if 0.4 < t < 0.6 else 0.0)
    early = [drawing.at(step) for step in range(100)]
    late = np.array([drawing.at(step) for step in range(101, 1101)])
    assert max(early) > 0.9 and min(early) < 0.1
    share = np.mean((late > 0.35) & (late < 0.65))
    assert share > 0.85 and late.min() < 0.3 and late.max() > 0.7  # the rest gets a tenth
    assert drawing.at(500) == Drawing("importance", 3, drawing.means).at(500)


def test_batches_go_through_all_whole_batches_of_an_epoch():
    samples = Samples(torch.arange(10), torch.arange(10), 3, seed=1)
    epochs = [[samples.batch(3 * e + k)[1].tolist() for k in range(3)] for e in range(2)]
    for epoch in epochs:
        rows = epoch[0] + epoch[1] + epoch[2]
        assert len(rows) == len(set(rows)) == 9
    assert epochs[0] != epochs[1] and samples.batch(0)[1].tolist() == epochs[0][0]


# -- alignment -------------------------------------------------------------------------------------


def test_b_is_permuted_first_and_the_file_keeps_the_digest(nets, tmp_path):
    pytest.importorskip("scipy")
    groups = mc.symmetries(nets[0], X[:8])
    shuffled = groups.permuted(mc.load(nets[0]), groups.random(seed=1))
    file = tmp_path / "c.safetensors"
    found = fit([nets[0], shuffled], align=True, steps=3, checkpoint=file, points=21)
    assert found.alignment.digest and metadata_of(file)["alignment"] == found.alignment.digest
    assert_same(found.path.at(1.0), found.alignment.apply(shuffled))
    # planted: the permuted b is a again, so that the whole curve is good
    assert found.result.barrier("loss") < 1e-3 and "b is permuted" in str(found)
    again = fit([nets[0], shuffled], align=found.alignment, steps=3)
    for one, other in zip(found.path.control_points, again.path.control_points):
        assert_same(one, other)
    with pytest.raises(mc.ModeconnError, match="align is a str: expected True, False"):
        fit(nets, align="weights")
