"""What other packages are given: a Forward, recomputed statistics, losses of parameters, runs."""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

import modeconn as mc
from modeconn.capture import cache, export
from naive import mlp

# PyTorch's own, where forward-mode derivatives load their decompositions
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

X = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 4
DATA = (X, Y)


@pytest.fixture(scope="module")
def ends() -> tuple[nn.Module, nn.Module]:
    return mlp(7, 9, 4, seed=0), mlp(7, 9, 4, seed=1)


# -- Forward ---------------------------------------------------------------------------------------


def test_a_forward_takes_its_points_at_the_call(ends):
    a, b = ends
    path = mc.Line(a, b)
    network = mc.Forward(a, path, X[:2])
    for t in (3, [0.25], [0.9, 0.1, 0.9], 3):
        torch.testing.assert_close(network(t, X), mc.forward(a, path, t, X))
    assert network.plan(3) is network.plan(3)
    for count in range(4, 14):  # the latest plans are kept
        network(count, X[:1])
    assert len(network._planned) == 8
    with pytest.raises(mc.ModeconnError, match="points is 0"):
        network(0, X)
    with pytest.raises(mc.ModeconnError, match="expected \\['N', 7\\]"):
        network(3, X[:, :5])
    with pytest.raises(mc.ModeconnError, match="buffers is 'mean'"):
        mc.Forward(a, path, X, buffers="mean")


def test_leaves_that_require_gradients_stay_leaves(ends):
    a, b = ends
    middle = {k: v.clone().requires_grad_() for k, v in a.state_dict().items()}
    path = mc.Bezier([a, middle, b.state_dict(keep_vars=True)])
    assert not any(v.requires_grad for point in path.control_points for v in point.values())
    network = mc.Forward(a, path, X[:2])
    loss = F.cross_entropy(network([0.3], X)[0], Y)
    loss.backward()
    c = path.coefficients([0.3])[0].tolist()
    leaves = {k: v.detach().clone().requires_grad_() for k, v in middle.items()}
    state = {k: c[0] * a.state_dict()[k] + c[1] * leaves[k] + c[2] * v for k, v in path_end(b)}
    F.cross_entropy(functional_call(a, state, (X,)), Y).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(middle[name].grad, leaf.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is not None for p in b.parameters())
    b.zero_grad()
    optimizer = torch.optim.SGD(middle.values(), lr=0.5)  # a step is seen by the next call
    optimizer.step()
    assert F.cross_entropy(network([0.3], X)[0], Y) < loss


def path_end(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(k, v.detach()) for k, v in module.state_dict().items()]


def test_copies_of_a_module_are_captured_once(monkeypatch):
    model = mlp(7, 5, 4, seed=3)
    export.capture(model, X[:2])
    monkeypatch.setattr(export, "_tried", lambda *_: pytest.fail("captured again"))
    made = copy.deepcopy(model)
    assert export.capture(made, X[:2]) is not None
    assert cache.is_known(export.Runner(copy.deepcopy(made)), X)
    made[1] = nn.Tanh()
    assert not cache.is_known(export.Runner(copy.deepcopy(made)), X)


# -- recomputed ------------------------------------------------------------------------------------


def norm(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def test_the_recomputed_network():
    a, b = norm(0), norm(1)
    path = mc.Line(a, b)
    state = mc.recomputed(a, path, 0.3, DATA, batch_size=8, batches=2)
    network = copy.deepcopy(a)
    network.load_state_dict(path.at(0.3))
    network[1].reset_running_stats()
    network[1].momentum = None
    for start in (0, 8):
        network(X[start : start + 8])
    for name, value in network.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(mc.ModeconnError, match="data is None"):
        mc.recomputed(a, path, 0.3, None)
    with pytest.raises(mc.ModeconnError, match="batches is 0"):
        mc.recomputed(a, path, 0.3, DATA, batches=0)


# -- loss_function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_losses_of_parameters_and_their_derivatives(ends, loss):
    a, b = ends
    f = mc.loss_function(a, DATA, loss=loss, batch_size=6)
    state = mc.Line(a, b).at(0.4)
    result = mc.evaluate(a, mc.Line(a, b), DATA, [0.4], loss=loss, metrics=("loss",))
    assert float(f(state)) == pytest.approx(result.loss[0], rel=1e-6)
    direction = {k: torch.randn_like(v) for k, v in state.items()}
    _, product = jvp(grad(f), (state,), (direction,))
    step = 1e-3
    up, down = (
        grad(f)({k: v + sign * step * direction[k] for k, v in state.items()}) for sign in (1, -1)
    )
    for name, value in product.items():
        expected = (up[name] - down[name]) / (2 * step)
        torch.testing.assert_close(value, expected, rtol=0.05, atol=2e-3)
    assert torch.equal(a[0].weight, ends[0][0].weight)


def test_what_curvlinops_takes(ends):
    a, b = ends
    f = mc.loss_function(a, DATA, batch_size=6)
    state = mc.Line(a, b).at(0.4)
    model, loss, parameters, data = f.arguments(state)
    assert [len(x) for x, _ in data] == [6, 6, 6, 2]
    assert all(any(p is q for q in model.parameters()) for p in parameters)
    mean = sum(loss(model(x), y) * len(x) for x, y in data) / 20
    assert float(mean.detach()) == pytest.approx(float(f(state)), rel=1e-6)
    for given, says in (
        ({"loss": lambda o, y: o[:, 0]}, "loss is <function"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(mc.ModeconnError, match=says):
            mc.loss_function(a, DATA, **given).arguments()
    with pytest.raises(mc.ModeconnError, match="no parameters"):
        mc.loss_function(nn.ReLU(), DATA)
    curvlinops = pytest.importorskip("curvlinops")
    vector = torch.randn(sum(p.numel() for p in parameters))
    got = curvlinops.HessianLinearOperator(model, loss, parameters, data) @ vector
    parts = torch.split(vector, [p.numel() for p in parameters])
    tangent = {k: v.view_as(state[k]) for k, v in zip(f.params, parts)}
    _, expected = jvp(grad(f), (state,), (tangent,))
    torch.testing.assert_close(
        got, torch.cat([v.flatten() for v in expected.values()]), rtol=1e-3, atol=1e-5
    )


# -- runs ------------------------------------------------------------------------------------------


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_a_trajectory_keeps_the_first_and_the_latest():
    model, trajectory, firsts = nn.Linear(3, 2), mc.Trajectory(most=4), []
    for _ in range(23):
        firsts.append(model.weight.detach().clone())
        trajectory.add(model)
        moved(model)
        kept = [state["weight"] for state in trajectory.checkpoints]
        assert len(kept) <= 4
        assert torch.equal(kept[0], firsts[0]) and torch.equal(kept[-1], firsts[-1])
    plane = trajectory.plane(centre=0)
    assert len(plane.marks) == len(kept)
    for given, says in (({"most": 3}, "most is 3"), ({"every": 0}, "every is 0")):
        with pytest.raises(mc.ModeconnError, match=says):
            mc.Trajectory(**given)


def test_transformers_callback():
    pytest.importorskip("transformers")
    model, trajectory = nn.Linear(3, 2), mc.Trajectory(every=2)
    callback = trajectory.for_transformers()
    state = types.SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None, model=model)
    for step in range(1, 6):
        moved(model)
        state.global_step = step
        callback.on_step_end(None, state, None, model=model)
    callback.on_epoch_end(None, state, None, model=model)
    assert len(trajectory.checkpoints) == 3
    by_epoch = mc.Trajectory()
    callback = by_epoch.for_transformers()
    callback.on_step_end(None, state, None, model=model)
    callback.on_epoch_end(None, state, None, model=model)
    assert len(by_epoch.checkpoints) == 1


def test_lightning_callback(monkeypatch):
    import sys

    module = types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    model, trajectory = nn.Linear(3, 2), mc.Trajectory(every=2)
    callback = trajectory.for_lightning()
    assert isinstance(callback, module.Callback)
    trainer = types.SimpleNamespace(global_step=0)
    callback.on_train_start(trainer, model)
    for batch in range(1, 9):  # a step for every two batches
        moved(model)
        trainer.global_step = batch // 2
        callback.on_train_batch_end(trainer, model, None, None, batch)
    callback.on_train_epoch_end(trainer, model)
    assert len(trajectory.checkpoints) == 3
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(mc.ModeconnError, match="neither lightning nor pytorch_lightning"):
        trajectory.for_lightning()


class Lit(nn.Module):
    """As a LightningModule is after a fit: with a trainer that cannot be copied."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(7, 9, 4, seed=seed)
        self._trainer = Trainer(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Trainer:
    """Holds the module, and data that no copy is to be made of."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.steps = module, 0

    def __deepcopy__(self, memo: dict) -> Trainer:
        raise TypeError("a trainer cannot be copied")


def test_a_lightning_module_is_a_model(ends):
    a, b = Lit(0), Lit(1)
    path = mc.Line(a, b)
    result = mc.evaluate(a, path, DATA, 5, metrics=("loss",))
    plain = mc.evaluate(ends[0], mc.Line(*ends), DATA, 5, metrics=("loss",))
    np.testing.assert_allclose(result.loss, plain.loss, rtol=1e-6)
    a._trainer.steps += 1  # what a trainer counts is nothing that a forward reads
    assert cache.is_known(export.Runner(a, torch.float32, torch.device("cpu")), X)
    values = mc.map(lambda m: m.training_step(DATA, 0).item(), a, path, 5, replay=True)
    np.testing.assert_allclose(list(values), plain.loss, rtol=1e-5)
    assert values.info["answered"] == 3
