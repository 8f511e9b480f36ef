"""buffers="recompute": PyTorch's re-estimated statistics of every point, in one pass."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.capture.export import capture
from modeconn.capture.training_mode import normalised, training_graph
from modeconn.models import build
from modeconn.plan.planner import make_program
from naive import clone, mlp, re_estimated

X = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(70) % 10


def pair(spec: str) -> list[nn.Module]:
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(build(spec).double())
        for module in nets[-1].modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return nets


def test_each_batch_is_read_twice_and_the_bits_are_the_same_again():
    a, b = pair("resnet20:width=4")
    path, t = mc.Line(a, b), [0.5, 0.0, 0.75, 0.5, 1.0]
    got, again = (
        mc.evaluate(a, path, (X, Y), t, buffers="recompute", batch_size=32) for _ in range(2)
    )
    assert (got.passes, got.samples) == (2, 70)
    np.testing.assert_array_equal(got.loss, again.loss)
    assert got.loss[0] == got.loss[3]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_variance_keeps_its_digits(layout):
    x = (torch.randn(40, 5, 7, 7) + 30).contiguous(memory_format=layout)
    value, mean, var = normalised(x, None, None, 1e-5)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=2e-6, atol=0)
    torch.testing.assert_close(
        value.double(), F.batch_norm(exact, None, None, training=True), rtol=1e-4, atol=1e-4
    )


def test_it_is_not_what_interpolating_gives():
    a, b = pair("resnet20:width=4")
    path = mc.Line(a, b)
    recomputed = mc.evaluate(a, path, (X, Y), [0.5], buffers="recompute")
    with pytest.warns(
        UserWarning, match='batch norms .bn1.* and 20 more. have interpolated .*buffers="recompute"'
    ):
        interpolated = mc.evaluate(a, path, (X, Y), [0.5])
    assert abs(recomputed.loss[0] - interpolated.loss[0]) > 0.05
    assert interpolated.passes == 1


def small(seed: int, **norm: object) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 9),
        nn.BatchNorm1d(9, **norm),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(9, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 10),
    )


ROWS = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(50) % 10


@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"momentum": None, "eps": 0.1}], ids=str)
@pytest.mark.parametrize("kind", ["line", "bezier", "polychain", "mixture", "plane"])
def test_every_path(kind, norm):
    nets = [small(k, **norm) for k in range(3)]
    path, t = {
        "line": (mc.Line(*nets[:2]), [0.3, 0.9]),
        "bezier": (mc.Bezier(nets), [0.3, 0.9]),
        "polychain": (mc.PolyChain(nets), [0.3, 0.9, 0.1, 0.5]),
        "mixture": (mc.Mixture(nets), [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]),
        "plane": (mc.Plane.through(*nets), [[0.1, 0.2], [1.0, 0.0]]),
    }[kind]
    got = mc.evaluate(
        nets[0], path, (ROWS, LABELS), t, buffers="recompute", batch_size=20, precision="float64"
    )
    exact = re_estimated(nets[0], path, ROWS, LABELS, t, torch.float64, batch_size=20)
    # The control points are blended in float64 here, and in their own precision by path.at.
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_other_data_some_batches_and_every_backend(backend):
    a, b = small(0).double(), small(1).double()
    path, t = mc.Line(a, b), [0.25, 0.5]
    train = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).double() + 0.3
    options = {
        "buffers": "recompute",
        "precision": "float64",
        "batch_size": 16,
        "recompute_batches": 3,
        "backend": backend,
    }
    got = mc.evaluate(
        a, path, (ROWS, LABELS), t, recompute_data=(train, torch.zeros(64)), **options
    )
    exact = re_estimated(
        a, path, ROWS.double(), LABELS, t, torch.float64, batch_size=16, batches=3, train=train
    )
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-9)
    assert (got.passes, got.samples) == (2, 50)


def test_what_does_not_move_is_shared():
    """The last layer alone differs: equal statistics at every point, outputs are combinations."""
    a = small(0).double()
    b = copy.deepcopy(a)
    nn.init.normal_(b[7].weight)
    path = mc.Line(a, b)
    got = mc.evaluate(
        a, path, (ROWS, LABELS), 11, buffers="recompute", batch_size=25, precision="float64"
    )
    exact = re_estimated(a, path, ROWS.double(), LABELS, got.t, torch.float64, batch_size=25)
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-9)
    training, names = training_graph(capture(a, ROWS.double()))
    program = make_program(
        training, path, got.t, dtype=torch.float64, device=torch.device("cpu"), frozen=frozenset()
    )
    assert names == [("1.running_mean", "1.running_var"), ("5.running_mean", "5.running_var")]
    assert program.varying_flops == 0 and not any(segment.steps for segment in program.segments)


def test_a_norm_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.norm(self.one(torch.relu(self.norm(self.one(x)))))))

    a, b = Twice().double(), Twice().double()
    path = mc.Line(a, b)
    got = mc.evaluate(
        a, path, (ROWS, LABELS), [0.0, 0.4], buffers="recompute", batch_size=20, precision="float64"
    )
    exact = re_estimated(a, path, ROWS.double(), LABELS, [0.0, 0.4], torch.float64, batch_size=20)
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-9)


def test_a_module_that_cannot_be_captured():
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if bool(x.isfinite().all()) else x

    a, b = DataDependent().double(), DataDependent().double()
    b.body.load_state_dict(small(1).state_dict())
    before, path = clone(a), mc.Line(a, b)
    with pytest.warns(UserWarning, match="could not be captured"):
        got = mc.evaluate(
            a,
            path,
            (ROWS, LABELS),
            [0.4, 1.0],
            buffers="recompute",
            batch_size=20,
            precision="float64",
        )
    exact = re_estimated(a, path, ROWS.double(), LABELS, [0.4, 1.0], torch.float64, batch_size=20)
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-9)
    assert all(torch.equal(before[key], value) for key, value in a.state_dict().items())
    assert a.body[1].momentum == 0.1 and all(module.training for module in a.modules())
    with (
        pytest.warns(UserWarning, match="interpolated running"),
        pytest.warns(UserWarning, match="could not be captured"),
    ):
        mc.evaluate(a, path, (ROWS, LABELS), 3)


def test_a_network_without_norms_takes_one_pass():
    a, b = mlp(6, 5, 10, seed=0), mlp(6, 5, 10, seed=1)
    got = mc.evaluate(a, mc.Line(a, b), (ROWS, LABELS), 3, buffers="recompute")
    np.testing.assert_array_equal(got.loss, mc.evaluate(a, mc.Line(a, b), (ROWS, LABELS), 3).loss)


def test_progress_goes_over_both_passes():
    a, b = small(0), small(1)
    seen: list[tuple[int, int | None]] = []
    mc.evaluate(
        a,
        mc.Line(a, b),
        (ROWS, LABELS),
        2,
        buffers="recompute",
        batch_size=20,
        recompute_batches=2,
        backend="reference",
        progress=lambda *done: seen.append(done),
    )
    assert seen[:2] == [(20, 90), (40, 90)] and seen[-1] == (90, 90)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_warning_where_the_statistics_are_right():
    a, b = small(0), small(1)
    swing = copy.deepcopy(a)
    nn.init.normal_(swing[7].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.evaluate(a, mc.Line(a, b), (ROWS, LABELS), [0.0, 1.0])  # the networks themselves
        mc.evaluate(a, mc.Mixture([a, b]), (ROWS, LABELS), [[1.0, 0.0], [0.0, 1.0]])
        mc.evaluate(a, mc.Line(a, swing), (ROWS, LABELS), 5)  # nothing below a norm moves
        mc.evaluate(a, mc.Line(a, b), (ROWS, LABELS), 5, buffers="start")
    moved = copy.deepcopy(a)
    moved[5].running_mean += 1
    for other in (b, moved):
        with pytest.warns(UserWarning, match="interpolated running statistics"):
            mc.evaluate(a, mc.Line(a, other), (ROWS, LABELS), 3)


def test_explain_shows_the_second_pass():
    a, b = small(0), small(1)
    plan = mc.explain(a, mc.Line(a, b), ROWS[:2], 5, buffers="recompute")
    assert "batch_norm" in str(plan) and plan.flops > 0


@pytest.mark.parametrize(
    "says, changes",
    [
        (
            r"batch 2 has 1 rows, and a norm cannot estimate a variance",
            {"batch_size": 7, "data": (ROWS[:15], LABELS[:15])},
        ),
        ("recompute_batches is 0", {"recompute_batches": 0}),
        (
            "is for buffers=\"recompute\", and buffers is 'start'",
            {"buffers": "start", "recompute_batches": 2},
        ),
        ("no samples", {"recompute_data": (ROWS[:0], LABELS[:0])}),
        (
            "can be read only once",
            {"data": ((ROWS[i : i + 9], LABELS[i : i + 9]) for i in range(0, 50, 9))},
        ),
        (r"does not run on inputs of shape \['N', 5\]", {"recompute_data": (ROWS[:, 1:], LABELS)}),
    ],
)
def test_bad_input_is_one_clear_line(says, changes):
    a, b = small(0), small(1)
    arguments = {"data": (ROWS, LABELS), "points": 3, "buffers": "recompute", **changes}
    with pytest.raises(mc.ModeconnError, match=says) as caught:
        mc.evaluate(a, mc.Line(a, b), **arguments)
    assert "\n" not in str(caught.value)
