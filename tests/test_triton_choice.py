"""Where the Triton backend runs, what it refuses and why, and work that is recorded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends.triton.backend import why_not
from naive import clone, mlp
from policy import assert_within_policy
from refused import refused
from triton_cases import X, Y

pytest.importorskip("triton")


# -- who runs --------------------------------------------------------------------------------------


def test_why_it_cannot_run(monkeypatch):
    a, b = (mlp(6, 5, 4, seed=k) for k in range(2))
    path, data = mc.Line(a, b), (X, Y)
    with refused('"triton" cannot run', "float64", 'ask for "reference"'):
        mc.evaluate(a, path, data, 3, backend="triton", precision="float64")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        with refused('"triton" cannot run', "there is no CUDA device"):
            mc.evaluate(a, path, data, 3, backend="triton")
    monkeypatch.setattr("modeconn.backends.triton.backend.find_spec", lambda name: None)
    assert "pip install 'modeconn[gpu]'" in why_not(torch.float32, torch.device("cuda"))


def test_kernels_that_cannot_be_built_are_left_out_in_one_line(monkeypatch):
    from modeconn import backends
    from modeconn.kernels import launch

    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    a, b = (mlp(6, 5, 4, seed=k) for k in range(2))
    path, data = mc.Line(a, b), (X, Y)
    expected = mc.evaluate(a, path, data, 3, backend="reference")
    assert launch.why_not_built(torch.device("cpu")) == ""
    launch.why_not_built.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "launch", no_compiler)
            patch.setattr(backends, "_automatic", lambda *asked: ["triton", "reference"])
            words = "no kernel can be built", "(RuntimeError: Failed to find C compiler.)"
            with refused('"triton" cannot run', *words, 'ask for "reference"'):
                mc.evaluate(a, path, data, 3, backend="triton")
            with pytest.warns(UserWarning, match="kernels are left out, and PyTorch computes"):
                got = mc.evaluate(a, path, data, 3)
    finally:
        launch.why_not_built.cache_clear()
    assert got.backend == "reference"
    np.testing.assert_array_equal(got.loss, expected.loss)


def test_nothing_for_a_kernel_to_do():
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x[:, :4] + self.shift)

    a, b = Wave(), Wave()
    with refused('"triton" cannot run', "kernel"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="triton")


def test_precisions_that_a_backend_does_not_have():
    a, b = (mlp(6, 5, 4, seed=k) for k in range(2))
    for backend, precision in (
        ("auto", "tf32"),
        ("reference", "tf32"),
        ("native", "bf16"),
        ("reference", "bf16"),
    ):
        with refused(precision, backend, "float32 or float64", "triton"):
            mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend=backend, precision=precision)
    with refused("tf32", "reference"):
        mc.forward(a, mc.Line(a, b), 3, X, precision="tf32")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_reduced_precisions_are_near(precision):
    a, b = (mlp(6, 5, 4, seed=k) for k in range(2))
    got, exact = (
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend=backend, precision=p)
        for backend, p in (("triton", precision), ("reference", "float64"))
    )
    np.testing.assert_allclose(got.loss, exact.loss, rtol=3e-2)
    assert got.info["precision"] == precision


def test_auto_leaves_the_interpreter_alone():
    a, b = (mlp(6, 5, 4, seed=k) for k in range(2))
    assert mc.evaluate(a, mc.Line(a, b), (X, Y), 3).backend != "triton"


def test_nothing_of_triton_is_imported_until_it_is_asked_for():
    code = (
        "import sys, torch, modeconn.backends.triton.backend\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'"
        " or name.startswith('modeconn.kernels.path_')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- recordings ------------------------------------------------------------------------------------


def test_recorded_work_is_done_again_on_new_inputs(monkeypatch):
    """With a recorder that keeps what a CUDA graph keeps: the memory that was read and written."""
    recorded = []

    def record(work):
        result = work().clone()
        recorded.append(work)
        return lambda: result.copy_(work())

    monkeypatch.setattr("modeconn.backends.triton.cuda_graphs.recorder", lambda device: record)
    x = torch.randn(62, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(62) % 4
    a, b, c = (mlp(6, 9, 7, 4, seed=k) for k in range(3))
    swung = clone(a)
    swung["4.weight"] += 0.3  # its logits are combined: the work reads several shared values
    path = mc.PolyChain([clone(b), clone(a), swung, clone(c)])
    got, plain = (
        mc.evaluate(a, path, (x, y), 10, backend=name, batch_size=10)
        for name in ("triton", "reference")
    )
    exact = mc.evaluate(a, path, (x.double(), y), 10, backend="reference", precision="float64")
    # once for each segment, at the fourth of six equal batches; the last one has another shape
    assert len(recorded) == 3
    for name in ("loss", "error"):
        assert_within_policy(
            name, got.values[name], plain.values[name], exact.values[name], torch.float32
        )
