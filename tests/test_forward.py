"""mc.forward: the outputs at each t that functional_call gives for the weights at that t."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import modeconn as mc
from forward_cases import KINDS, chain, conv
from modeconn.backends.native import extension as native
from modeconn.evaluation.outputs import PlannedForward, forward
from modeconn.parameters.paths import Path
from naive import clone, mlp
from policy import assert_within_policy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def call_per_point(
    model: nn.Module, path: Path, t: np.ndarray, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """functional_call with the weights of each t, one after the other."""
    network = copy.deepcopy(model).to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    outputs = []
    for row in path.coefficients(t):
        state = {
            key: sum(
                c * point[key].to(dtype) for c, point in zip(row.tolist(), path.control_points)
            )
            if value.is_floating_point()
            else value
            for key, value in path.control_points[0].items()
        }
        with torch.no_grad():
            outputs.append(functional_call(network, state, (x,)))
    return torch.stack(outputs)


def check(model: nn.Module, path: Path, t: object, x: Tensor, **options: object) -> Tensor:
    for precision in ("float64", "float32"):
        dtype = getattr(torch, precision)
        got = forward(model, path, t, x, precision=precision, **options)
        plain, exact = (
            call_per_point(model, path, path.points(t), x, d) for d in (dtype, torch.float64)
        )
        assert got.dtype == dtype
        assert_within_policy("outputs", got, plain, exact, dtype)
    return got


def test_a_perceptron():
    nets = [mlp(7, 33, 17, 4, seed=k) for k in range(3)]
    x = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    for path, t in (
        (mc.Line(*nets[:2]), 9),
        (mc.Bezier(nets), [1.5, 0.2, 0.2, -1.0]),
        (mc.Plane.through(*nets), [[0.1, 0.2], [0, 0], [1, 1], [0.1, 0.2]]),
        (mc.Mixture(nets), [[1, 0, 0], [0.5, 0.25, 0.25], [0, 0, 0]]),
    ):
        got = check(nets[0], path, t, x)
        assert got.shape == (len(path.points(t)), 13, 4)


def test_the_end_points_are_the_networks():
    a, b = conv(0).eval(), conv(1).eval()
    x = torch.randn(6, 3, 8, 8)
    got = forward(a, mc.Line(a, b), [1, 0], x)
    torch.testing.assert_close(got, torch.stack([b(x), a(x)]))


@pytest.mark.parametrize("buffers", ["interpolate", "start"])
def test_convolutions_and_norms(buffers):
    a, b = conv(0), conv(1)
    b[1].running_mean += 0.3
    b[1].running_var *= 2
    path = mc.Line(a, b)
    if buffers == "start":
        got = forward(a, path, [0.7], torch.ones(2, 3, 8, 8), buffers="start")
        b[1].load_state_dict(
            {**b[1].state_dict(), "running_mean": torch.zeros(8), "running_var": torch.ones(8)}
        )
        torch.testing.assert_close(got, forward(a, mc.Line(a, b), [0.7], torch.ones(2, 3, 8, 8)))
    else:
        check(a, path, [0.7, 0.0, 0.3, 0.7], torch.randn(9, 3, 8, 8))


def test_a_chain_of_rewrites_and_swings():
    model, path = chain()
    t = [0.9, 0.1, 1 / 3, 0.5, 0.4, 0.5, 1.0, 0.0, 2 / 3]
    x = torch.randn(11, 7)
    got = check(model, path, t, x)
    assert torch.equal(got[3], got[5])
    plan = PlannedForward(model, path, t, x).plan
    assert plan.point_flops < 0.1 * plan.naive_flops


@pytest.mark.parametrize("budget", [1, 1 << 12, None])
def test_batches_of_any_size_and_any_budget(budget):
    a, b = mlp(7, 20, 4, seed=0), mlp(7, 20, 4, seed=1)
    path, t = mc.Line(a, b), [0.5, 1.0, 0.25]
    engine = PlannedForward(a, path, t, torch.randn(3, 7), memory_budget=budget)
    assert engine.t.tolist() == t
    for rows in (1, 2, 300):
        x = torch.randn(rows, 7)
        exact = call_per_point(a, path, engine.t, x, torch.float64)
        torch.testing.assert_close(engine(x).double(), exact, rtol=1e-5, atol=1e-6)


def test_inputs_may_be_arrays_and_tokens():
    a, b = (nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(15, 2)) for _ in range(2))
    tokens = np.arange(12).reshape(4, 3) % 11
    torch.testing.assert_close(
        forward(a, mc.Line(a, b), 3, tokens),
        call_per_point(a, mc.Line(a, b), np.linspace(0, 1, 3), torch.tensor(tokens), torch.float32),
    )


class Folded(nn.Module):
    """Samples that are not the first axis of what is shared between points."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(x.size(0), 5, 4).transpose(0, 1)
        return self.head(torch.relu(self.inner(tokens)).transpose(0, 1).flatten(1))


def test_samples_that_are_not_the_first_axis():
    a, b = Folded(), Folded()
    check(a, mc.Line(a, b), [0.0, 0.3, 1.0], torch.randn(1000, 20))


def test_a_module_that_cannot_be_captured():
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if bool(x.isfinite().all()) else x

    a, b = DataDependent(), DataDependent()
    x = torch.randn(5, 3)
    with pytest.warns(UserWarning, match="could not be captured"):
        got = forward(a, mc.Line(a, b), [0.5, 0.0], x)
    torch.testing.assert_close(
        got, call_per_point(a, mc.Line(a, b), np.array([0.5, 0.0]), x, torch.float32)
    )


def test_the_model_is_left_as_it_was():
    model, other = conv(0).train(), conv(1)
    before = clone(model)
    for precision in ("float32", "float64"):
        forward(model, mc.Line(model, other), 3, torch.randn(4, 3, 8, 8), precision=precision)
    assert all(module.training for module in model.modules())
    assert all(
        torch.equal(before[k], v) and v.dtype == before[k].dtype
        for k, v in model.state_dict().items()
    )


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class Mean(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean()


@pytest.mark.parametrize(
    "model, x, says",
    [
        (Pair(), torch.ones(4, 3), "the model returns tuple, and forward needs one tensor"),
        (
            Mean(3, 2),
            torch.ones(4, 3),
            r"output has shape \[\] for a few inputs: expected a row per input",
        ),
        (nn.Linear(3, 2), torch.ones(0, 3), "expected at least one row"),
        (nn.Linear(3, 2), torch.ones(4, 2), r"does not run on inputs of shape \['N', 2\]"),
    ],
    ids=["pair", "mean", "no rows", "wrong width"],
)
def test_bad_input_is_one_clear_line(model, x, says):
    with pytest.raises(mc.ModeconnError, match=says) as caught:
        forward(model, mc.Line(model, model), 3, x)
    assert "\n" not in str(caught.value)


def test_backends_and_what_they_refuse():
    pytest.importorskip("triton")
    a, b = mlp(7, 20, 4, seed=0), mlp(7, 20, 4, seed=1)
    x = torch.randn(9, 7)
    with pytest.raises(mc.ModeconnError, match='"cuda" cannot run this'):
        forward(a, mc.Line(a, b), 3, x, backend="cuda")
    with pytest.raises(
        mc.ModeconnError, match='"native" cannot run this: it computes no gradients'
    ):
        forward(a, mc.Line(a, b), 3, x.clone().requires_grad_(), backend="native")
    path = mc.Line(clone(a), clone(b))
    path.control_points[0]["0.weight"].requires_grad_()
    with pytest.raises(
        mc.ModeconnError, match='"native" cannot run this: it computes no gradients'
    ):
        PlannedForward(a, path, 3, x, backend="native")
    with pytest.raises(
        mc.ModeconnError, match='"triton" cannot run this: its kernels compute in float32'
    ):
        forward(a, mc.Line(clone(a), clone(b)), 3, x, backend="triton", precision="float64")


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_these_outputs(kind, backend):
    if backend == "native" and not native.available():
        pytest.skip(native.reason())
    if backend == "triton":
        pytest.importorskip("triton")
    model, path, x = KINDS[kind]()
    t = np.array([0.9, 0.1, 0.5, 0.1])
    got = forward(model, path, t, x, backend=backend)
    plain, exact = (
        call_per_point(model, path, t, x, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("outputs", got, plain, exact, torch.float32)


def test_bad_options():
    a = nn.Linear(3, 2)
    engine = PlannedForward(a, mc.Line(a, a), 3, torch.ones(2, 3))
    with pytest.raises(mc.ModeconnError, match=r"shape \['N', 3, 3\].*: expected \['N', 3\]"):
        engine(torch.ones(2, 3, 3))
    for options, says in (
        ({"buffers": "mean"}, "buffers is 'mean'"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"device": "nowhere"}, "device 'nowhere'"),
    ):
        with pytest.raises(mc.ModeconnError, match=says):
            forward(a, mc.Line(a, a), 3, torch.ones(2, 3), **options)
