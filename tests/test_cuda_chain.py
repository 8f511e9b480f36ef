"""The fused CUDA chain, compiled for an emulated device, against float64; and nvcc's code.

Whether the emulation would notice a missing wait or barrier is tested too, by taking them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cuda_cases
import modeconn as mc
from cuda_cases import ACTIVATIONS, CSRC, CXX, agrees, link_and_load, problem
from modeconn.backends import cuda
from modeconn.backends.activations import Activation, names_of
from modeconn.backends.cuda import CudaLayer, mlp_sums
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy

# Fixtures.
objects = cuda_cases.objects


pytestmark = [
    pytest.mark.skipif(CXX is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="not in a checkout"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture(scope="session")
def emulated(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("emulated")
    return link_and_load(list(objects.values()), folder / "_cuda.so")


@pytest.fixture
def device(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: emulated)


KINDS = [("float32", "mma"), ("tf32", "mma"), ("tf32", "wgmma"), ("bf16", "mma"), ("bf16", "wgmma")]
SHAPES = [
    (1, 1, 1, (1, 2)),
    (63, 3, 2, (7, 63, 2, 1)),
    (130, 1, 3, (33, 128, 10)),
    (2, 2, 2, (245, 245, 7)),
    (3, 1, 1, (63, 129, 256)),
    (65, 9, 2, (12,)),
    (0, 2, 2, (5, 3)),
]


@pytest.mark.parametrize("precision, variant", KINDS)
@pytest.mark.parametrize("rows, points, count, widths", SHAPES, ids=str)
def test_shapes(device, rows, points, count, widths, precision, variant):
    agrees(problem(rows, points, count, widths), precision, variant)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("variant", ["mma", "wgmma"])
def test_activations(device, act, variant):
    agrees(problem(5, 2, 2, (9, 33, 6), act), "float32" if variant == "mma" else "tf32", variant)


def test_norms_are_folded_in_and_points_go_in_chunks(device, monkeypatch):
    p = problem(7, 5, 2, (9, 12, 6))
    g = torch.Generator().manual_seed(1)
    first = p["layers"][0]
    scale, shift = (torch.randn(5, 12, generator=g, dtype=torch.float64) for _ in range(2))
    fields = dict(first.__dict__)
    p["layers"][0] = CudaLayer(**{**fields, "scale": scale, "shift": shift})
    agrees(p)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_WORKSPACE", 1)
        agrees(p)
    without = {
        **fields,
        "biases": torch.zeros(0, 12),
        "bias_coefficients": torch.zeros(5, 0, dtype=torch.float64),
    }
    p["layers"][0] = CudaLayer(**without)
    agrees(p)


def test_many_tiles_add_up_the_same_every_time(device):
    p = problem(128 * 33 + 1, 1, 2, (6,))
    agrees(p)
    first, second = (mlp_sums(**p) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("precision, variant", KINDS)
def test_what_is_not_finite_stays_so(device, precision, variant):
    p = problem(4, 3, 2, (5, 40, 7))
    # of a control point that the first point leaves out
    p["layers"][0].weights[1, 3, 2] = float("nan")
    got = mlp_sums(**p, precision=precision, variant=variant)
    assert got[0].isfinite().all() and got[1:, 0].isnan().all()
    p = problem(4, 2, 1, (5, 40, 7))
    p["layers"][1].biases[0, 2] = float("inf")
    got = mlp_sums(**p, precision=precision, variant=variant)
    # the second point's coefficient is negative
    assert got[0, 0].isnan() and not got[1, 0].isfinite()


def test_ties_and_special_logits(device):
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(7, 7)
    x[1, :3] = torch.tensor([1, 2, 2])
    x[2, [1, 2, 5]] = torch.tensor([nan, 5, nan])
    x[3, 1], x[4, 0], x[5], x[6, 0] = -inf, 9e30, -inf, inf
    labels = torch.tensor([0, 2, 1, 1, 0, 0, 0])
    ones = torch.ones(1, 1, dtype=torch.float64)
    each = torch.stack(
        [mlp_sums([x[i : i + 1]], ones, [], labels[i : i + 1], top5=True)[0] for i in range(len(x))]
    )
    loss = nn.functional.cross_entropy(x, labels, reduction="none")
    torch.testing.assert_close(each[:, 0].float(), loss, equal_nan=True)
    assert torch.equal(each[:, 1], (x.argmax(1) != labels).double())
    assert each[:, 2].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_the_activations_are_those_of_the_table(device):
    assert cuda.extension().activations() == names_of("cuda")


def test_bad_input_is_named(device):
    p = problem(4, 2, 2, (5, 3))
    for change, text in (
        ({"labels": p["labels"].int()}, "labels is torch.int32"),
        ({"coefficients": p["coefficients"].float()}, "coefficients is torch.float32"),
        ({"terms": [p["terms"][0], p["terms"][1][:, :4]]}, r"terms\[1\] is"),
        ({"terms": [t.T.contiguous().T for t in p["terms"]]}, r"terms\[0\] is .* contiguous"),
        ({"terms": []}, r"coefficients is .*\[2, 0\]"),
        ({"precision": "fp8"}, "precision must be one of float32, tf32, bf16, got 'fp8'"),
        ({"activation": Activation("swish")}, "activation must be one of identity"),
        ({"variant": "wgmma"}, "variant 'wgmma' is for tf32 and bf16"),
    ):
        with pytest.raises(mc.ModeconnError, match=text):
            mlp_sums(**{**p, **change})
    with pytest.raises(mc.ModeconnError, match=r"width must be in 1..256, got 257"):
        mlp_sums(**problem(2, 1, 1, (257, 3)))
    with pytest.raises(mc.ModeconnError, match=r"layers\[0\].units must be in 1..256, got 300"):
        mlp_sums(**problem(2, 1, 1, (3, 300, 2)))


# The backend.

X = torch.randn(130, 20, generator=torch.Generator().manual_seed(0))
Y = torch.arange(130) % 10


def evaluates(model: nn.Module, path: object, points: int) -> None:
    names = ("loss", "error", "top5_error")
    got = mc.evaluate(model, path, (X, Y), points, backend="cuda", metrics=names)
    near, exact = (
        pass_per_point(model, path, X, Y, got.t, d) for d in (torch.float32, torch.float64)
    )
    assert got.backend == "cuda"
    for name in ("loss", "error"):
        assert_within_policy(name, got.values[name], near[name], exact[name], torch.float32)
    reference = mc.evaluate(model, path, (X, Y), points, backend="reference", metrics=names)
    np.testing.assert_array_equal(got.top5_error, reference.top5_error)


def test_backend_on_lines_with_dead_units_and_combined_logits(device):
    a, b = (mlp(20, 33, 17, 10, seed=k) for k in range(2))
    evaluates(a, mc.Line(a, b), 5)
    swing = clone(a)
    swing["4.weight"] += 0.1
    dead = clone(a)
    dead["2.weight"][:, 16:] = 0
    evaluates(a, mc.PolyChain([a, swing, dead]), 7)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_backend_with_norms(device):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 10))
        net(X)
        return net.eval()

    a, b = make(0), make(1)
    evaluates(a, mc.Line(a, b), 3)


def test_what_the_backend_cannot_run_is_said_in_one_line(device):
    a, b = (mlp(20, 300, 300, 10, seed=k) for k in range(2))
    with pytest.raises(mc.ModeconnError, match="its width is 300: expected at most 256"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="cuda")
    a, b = (mlp(20, 9, 10, seed=k) for k in range(2))
    with pytest.raises(mc.ModeconnError, match="computes in float32"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="cuda", precision="float64")


def test_without_a_gpu_or_the_extension_the_reason_is_given(monkeypatch):
    a, b = (mlp(20, 9, 10, seed=k) for k in range(2))
    with pytest.raises(
        mc.ModeconnError, match=r'backend "cuda" cannot run this: .*(not available|CUDA device)'
    ):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="cuda", device="cpu")
    assert mc.evaluate(a, mc.Line(a, b), (X, Y), 3).backend != "cuda"
