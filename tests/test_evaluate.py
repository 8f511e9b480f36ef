"""mc.evaluate: exact in one pass, whatever the batches, the order of t and the architecture."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import evaluate_cases
import modeconn as mc
from evaluate_cases import X, Y
from modeconn.backends.reference import ReferenceBackend
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy

# Fixtures.
nets = evaluate_cases.nets


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["line", "polychain", "bezier", "plane", "random", "mixture"])
def test_every_path_against_float64(nets, kind, precision):
    a, b, c = nets
    path, points = {
        "line": (mc.Line(a, b), 21),
        "polychain": (mc.PolyChain([a, b, c]), 21),
        "bezier": (mc.Bezier([a, b, c]), 21),
        "plane": (mc.Plane.through(a, b, c), 5),
        "random": (mc.Plane.random(a, biases=True), 5),
        "mixture": (
            mc.Mixture([a, b, c]),
            [[1, 0, 0], [0.2, 0.3, 0.5], [0.4, -0.7, 2.0], [0, 0, 0]],
        ),
    }[kind]
    got = mc.evaluate(a, path, (X, Y), points, precision=precision, backend="reference")
    dtype = getattr(torch, precision)
    plain, exact = (pass_per_point(a, path, X, Y, got.t, d) for d in (dtype, torch.float64))
    for name in ("loss", "error"):
        assert_within_policy(name, got.values[name], plain[name], exact[name], dtype)
    assert (got.passes, got.samples) == (1, 130)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 63, 129])
@pytest.mark.parametrize("widths", [(1, 1, 2), (20, 10), (3, 245, 1, 10), (20, 63, 7, 2)], ids=str)
def test_odd_shapes(rows, widths):
    a, b = (mlp(*widths, seed=k) for k in range(2))
    x, y = torch.randn(rows, widths[0]), torch.arange(rows) % widths[-1]
    path = mc.Line(a, b)
    got = mc.evaluate(a, path, (x, y), 5)
    plain, exact = (
        pass_per_point(a, path, x, y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)


def test_inputs_that_are_not_contiguous(nets):
    path = mc.Line(*nets[:2])
    wide = torch.randn(130, 40)
    wide[:, ::2] = X
    np.testing.assert_allclose(
        mc.evaluate(nets[0], path, (wide[:, ::2], Y), 5).loss,
        mc.evaluate(nets[0], path, (X, Y), 5).loss,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "module",
    [nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU],
    ids=lambda m: m.__name__,
)
def test_activations(module):
    a, b = (mlp(20, 9, 9, 10, activation=module, seed=k) for k in range(2))
    path = mc.Line(a, b)
    got = mc.evaluate(a, path, (X, Y), 5)
    plain, exact = (
        pass_per_point(a, path, X, Y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)


def test_the_end_points_are_the_given_networks(nets):
    got = mc.evaluate(nets[0], mc.Line(*nets[:2]), (X, Y), 3, batch_size=130)
    for t, net in ((0, nets[0]), (2, nets[1])):
        assert got.loss[t] == pytest.approx(
            nn.functional.cross_entropy(net(X).double(), Y).item(), rel=1e-6
        )


# -- data, losses, options -------------------------------------------------------------------------


def test_every_kind_of_data_gives_the_same(nets, tmp_path):
    path = mc.Line(*nets[:2])
    whole = mc.evaluate(nets[0], path, (X, Y), 3).loss
    dataset = TensorDataset(X, Y)
    mapped = np.memmap(tmp_path / "x.dat", np.float32, "w+", shape=X.shape)
    mapped[:] = X.numpy()
    for data in (
        (X.numpy(), Y.numpy()),
        (mapped, Y),
        dataset,
        DataLoader(dataset, batch_size=7),
        [(X[:50], Y[:50]), (X[50:], Y[50:])],
        ((X[i : i + 9], Y[i : i + 9]) for i in range(0, 130, 9)),
    ):
        got = mc.evaluate(nets[0], path, data, 3)
        np.testing.assert_allclose(got.loss, whole, rtol=2e-6)
        assert (got.samples, got.passes) == (130, 1)


def test_data_are_read_once(nets):
    class Counted(torch.utils.data.Dataset):
        reads = 0

        def __len__(self) -> int:
            return 130

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            Counted.reads += 1
            return X[i], Y[i]

    mc.evaluate(nets[0], mc.Bezier(nets), Counted(), 50)
    assert Counted.reads == 130


def test_custom_loss_and_metrics(nets):
    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.topk(2).values.diff(dim=1).neg().squeeze(1)

    def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    path = mc.Line(*nets[:2])
    got = mc.evaluate(
        nets[0], path, (X, Y), 2, loss=smoothed, metrics=("loss", "error", "top5_error", margin)
    )
    logits = nets[1](X)
    assert set(got.values) == {"loss", "error", "top5_error", "margin"}
    assert got.loss[1] == pytest.approx(smoothed(logits, Y).mean().item(), rel=1e-5)
    assert got.margin[1] == pytest.approx(margin(logits, Y).mean().item(), rel=1e-5)
    assert got.top5_error[1] == pytest.approx(
        (logits.topk(5).indices != Y[:, None]).all(1).double().mean().item()
    )


def test_mse_and_bce(nets):
    path, target = mc.Line(*nets[:2]), torch.rand(130, 10)
    got = mc.evaluate(nets[0], path, (X, target), 2, loss="mse")
    assert set(got.values) == {"loss"}
    assert got.loss[1] == pytest.approx(nn.functional.mse_loss(nets[1](X), target).item(), rel=1e-5)
    bits = (target > 0.5).float()
    got = mc.evaluate(nets[0], path, (X, bits), 2, loss="bce")
    assert got.loss[1] == pytest.approx(
        nn.functional.binary_cross_entropy_with_logits(nets[1](X), bits).item(), rel=1e-5
    )
    assert got.error[1] == pytest.approx(
        ((nets[1](X) > 0) != bits.bool()).double().mean().item(), rel=1e-6
    )


def test_ties_are_decided_as_argmax_does():
    model = nn.Linear(20, 10)
    zero = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    got = mc.evaluate(model, mc.Line(zero, model), (X, Y), 2)
    assert got.error[0] == pytest.approx(0.9) and got.loss[0] == pytest.approx(np.log(10))


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_buffers_of_the_start():
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    a, b = clone(model), clone(model)
    b["1.running_mean"] += 1.0
    b["1.running_var"] *= 3.0
    got = mc.evaluate(model, mc.Line(a, b), (X, Y), 3, buffers="start")
    np.testing.assert_allclose(got.loss, got.loss[0], rtol=1e-7)
    assert np.ptp(mc.evaluate(model, mc.Line(a, b), (X, Y), 3).loss) > 1e-3


def test_a_module_that_cannot_be_captured_still_runs():
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.shape[1] == 20 and bool(x.isfinite().all()) else x

    a, b = DataDependent(), DataDependent()
    path = mc.Line(a, b)
    with pytest.warns(
        UserWarning, match=r"could not be captured: test_evaluate\.py:\d+: torch\.export"
    ):
        got = mc.evaluate(a, path, (X, Y), 5)
    exact = pass_per_point(a, path, X, Y, got.t, torch.float64)
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-6)
    assert got.passes == 1 and "torch.export" in got.info["fallback"]


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_the_model_is_left_as_it_was(nets):
    model = nn.Sequential(
        nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10)
    ).train()
    before, modes = clone(model), [m.training for m in model.modules()]
    other = clone(
        nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10))
    )
    for precision in ("float32", "float64"):
        mc.evaluate(model, mc.Line(model, other), (X, Y), 3, precision=precision)
    assert [m.training for m in model.modules()] == modes
    assert all(
        torch.equal(before[k], v) and v.dtype == before[k].dtype
        for k, v in model.state_dict().items()
    )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_progress_reaches_the_end(nets):
    seen: list[tuple[int, int | None]] = []
    mc.evaluate(
        nets[0],
        mc.Line(*nets[:2]),
        (X, Y),
        5,
        batch_size=50,
        backend="reference",
        progress=lambda *done: seen.append(done),
    )
    assert (
        seen[-1] == (130, 130)
        and [d for d, _ in seen] == sorted(d for d, _ in seen)
        and len(seen) == 15
    )


def test_losses_that_are_not_finite_are_reported(nets):
    huge = {key: value * 1e30 for key, value in clone(nets[1]).items()}
    with pytest.warns(RuntimeWarning, match=r"loss is not finite at t = 0.5, 1.0"):
        got = mc.evaluate(nets[0], mc.Line(nets[0], huge), (X, Y), 3)
    assert np.isfinite(got.loss).tolist() == [True, False, False]


# -- memory ----------------------------------------------------------------------------------------

PEAK = """
    import resource, sys, numpy as np, torch, modeconn as mc
    from torch import nn
    torch.set_num_threads(1)
    a, b = (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2))
    for argument in sys.argv[1:]:
        if argument.isdecimal():
            x, y = torch.randn(500, 64), torch.arange(500) % 10
            mc.evaluate(a, mc.Line(a, b), (x, y), int(argument), progress=False)
        else:
            x = np.memmap(argument, np.float32, "r").reshape(-1, 64)
            data = x, np.zeros(len(x), np.int64)
            mc.evaluate(a, mc.Line(a, b), data, 2, memory_budget=4 << 20, progress=False)
        # Pages of a mapped file are the system's to drop; what the process holds itself is the
        # anonymous memory.
        own = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, own[0].split()[1])
"""


def peaks(*arguments: object) -> list[tuple[int, int]]:
    """Evaluate one after the other; per evaluation the largest memory so far, and its own now.

    Args:
        arguments: numbers of points, or files of data.
    """
    code = [sys.executable, "-c", textwrap.dedent(PEAK), *map(str, arguments)]
    lines = subprocess.run(code, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(int(most), int(own)) for most, own in map(str.split, lines)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_neither_with_points_nor_with_a_memory_map(tmp_path):
    rows = {"small": 1 << 14, "large": 1 << 19}  # 4 MiB and 128 MiB, under a budget of 4 MiB
    for name, count in rows.items():
        np.memmap(tmp_path / name, np.float32, "w+", shape=(count, 64)).flush()
    found = peaks(11, 10_001, *(tmp_path / name for name in rows))
    (few, _), (many, _), (_, small), (_, large) = found
    assert many <= 1.05 * few
    assert large < small + 48 * 1024, "kilobytes that the process holds itself"


def test_a_good_run_warns_of_nothing(nets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.evaluate(nets[0], mc.Line(*nets[:2]), (X, Y), 3)


class Folded(nn.Module):
    """Tokens folded into the batch: the first axis of a shared value is not that of the samples."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.inner, self.head, self.transposed = nn.Linear(4, 6), nn.Linear(30, 10), transposed

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(x.size(0), 5, 4)
        if self.transposed:
            return self.head(
                torch.relu(self.inner(tokens.transpose(0, 1))).transpose(0, 1).flatten(1)
            )
        return self.head(torch.relu(self.inner(tokens.reshape(-1, 4))).view(x.size(0), -1))


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_whose_first_axis_is_not_the_samples(transposed, rows):
    a, b = Folded(transposed), Folded(transposed)
    x, y, path = torch.randn(rows, 20), torch.arange(rows) % 10, mc.Line(a, b)
    got = mc.evaluate(a, path, (x, y), 5)
    plain, exact = (
        pass_per_point(a, path, x, y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)
    assert not got.info["fallback"]


def test_what_is_kept_for_a_batch_fits_the_budget():
    torch.manual_seed(0)
    a, b = (
        nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16 * 16, 10)
        )
        for _ in range(2)
    )
    program = mc.explain(a, mc.Line(a, b), torch.randn(2, 1, 16, 16), 5).program
    engine, budget = ReferenceBackend(program, torch.float32, torch.device("cpu")), 1 << 28
    per_row = 2 * 64 * 16 * 16 * 4  # the first layer's values at both end points
    assert 0.5 * budget < engine.most_rows(budget) * per_row <= budget
