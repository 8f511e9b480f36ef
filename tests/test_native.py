"""The C++ extension: CPU features, versions, row-wise log-sum-exp against float64 PyTorch."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from modeconn.backends.native import extension as native
from modeconn.errors import ModeconnError

built = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.reason()}")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc or /sys")


FOREIGN = np.dtype(np.float64).newbyteorder()


def reference(x: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(x.double(), dim=1)


def assert_rows_agree(x: torch.Tensor, got: torch.Tensor | None = None) -> None:
    """Compare with PyTorch's float64 to a few roundings; NaN and infinities must be equal."""
    got = native.logsumexp(x) if got is None else got
    want = reference(x)
    assert got.dtype == torch.float64
    assert got.shape == want.shape
    special = ~torch.isfinite(want)
    torch.testing.assert_close(got[special], want[special], rtol=0, atol=0, equal_nan=True)
    scale = torch.clamp(want[~special].abs(), min=1.0) * np.finfo(np.float64).eps
    assert torch.all((got - want)[~special].abs() <= 8 * scale)


def test_the_extension_is_built_wherever_there_is_a_compiler():
    if os.environ.get("MODECONN_NATIVE") == "0":
        pytest.skip("MODECONN_NATIVE=0 asks for none")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on the PATH")
    assert native.available(), native.reason()
    assert native.reason() == ""


@built
@linux_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86-64 instruction sets")
def test_features_are_what_the_kernel_says():
    flags = (
        re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        .group(1)
        .split()
    )
    features = native.features()
    names = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
    assert {name: features[name] for name in names} == {name: name in flags for name in names}


@built
@linux_only
def test_cores_are_those_that_this_process_may_use():
    assert native.features()["cores"] == len(os.sched_getaffinity(0))
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from modeconn import native; print(native.features()['cores'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@built
@linux_only
@pytest.mark.parametrize(
    ("key", "level", "kind"),
    [("l1d_bytes", 1, "Data"), ("l2_bytes", 2, "Unified"), ("l3_bytes", 3, "Unified")],
)
def test_cache_sizes_are_what_the_kernel_says(key: str, level: int, kind: str):
    want = 0
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        read = {name: (folder / name).read_text().strip() for name in ("level", "type", "size")}
        if (read["level"], read["type"]) == (str(level), kind):
            want = int(read["size"].removesuffix("K")) * 1024
    assert native.features()[key] == want


@built
def test_versions():
    versions = native.versions()
    assert versions["cplusplus"] >= 201703
    assert re.match(r"(gcc|clang) \d+", versions["compiler"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", versions["pybind11"])
    assert versions["instruction_sets"].split()[0] == "generic"
    assert versions["sanitizers"] == os.environ.get("MODECONN_SANITIZE", "")
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert f'\nversion = "{versions["modeconn"]}"\n' in pyproject.read_text(encoding="utf-8")


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 10), (63, 10), (7, 1), (3, 1025), (129, 257)], ids=str
)
def test_logsumexp_agrees_with_float64(shape: tuple[int, int], dtype: torch.dtype):
    assert_rows_agree(
        5 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    )


@built
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.T, id="transposed"),
        pytest.param(lambda x: x[::3], id="every third row"),
        pytest.param(lambda x: x[:, 1::2], id="every second column"),
        pytest.param(lambda x: x[5:6, 3:4].expand(9, 11), id="strides of zero"),
        pytest.param(lambda x: x[1:, 1:], id="inner block"),
    ],
)
def test_logsumexp_reads_any_strides(view):
    x = view(torch.randn(65, 33, generator=torch.Generator().manual_seed(1)))
    assert not x.is_contiguous()
    assert_rows_agree(x)


@built
def test_logsumexp_reads_negative_strides():
    x = np.random.default_rng(2).normal(size=(6, 5))
    got = torch.from_numpy(native._load()[0].logsumexp(x[::-1, ::-1]))
    assert_rows_agree(torch.from_numpy(x[::-1, ::-1].copy()), got)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 10), (0, 0), (4, 0)], ids=str)
def test_logsumexp_of_nothing(shape: tuple[int, int], dtype: torch.dtype):
    got = native.logsumexp(torch.empty(shape, dtype=dtype))
    assert got.tolist() == [-np.inf] * shape[0]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logsumexp_of_special_values(dtype: torch.dtype):
    inf, nan = float("inf"), float("nan")
    rows = [
        [-inf, -inf, -inf],
        [-inf, 2.0, -inf],
        [1.0, inf, 2.0],
        [inf, inf, -inf],
        [nan, 0.0, 1.0],
        [inf, nan, 1.0],
        [-inf, -inf, nan],
        [-0.0, 0.0, -0.0],
    ]
    x = torch.tensor(rows, dtype=dtype)
    assert_rows_agree(x)
    assert native.logsumexp(x).tolist()[:4] == [-inf, 2.0, inf, inf]
    assert torch.isnan(native.logsumexp(x)[4:7]).all()


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logsumexp_does_not_overflow(dtype: torch.dtype):
    largest = torch.finfo(dtype).max
    rows = [[largest, largest], [-largest, -largest], [largest, -largest], [1e-40, 1e-45]]
    assert_rows_agree(torch.tensor(rows, dtype=dtype))


@built
@given(
    npst.arrays(
        st.sampled_from([np.float32, np.float64]),
        npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9),
        elements={"allow_subnormal": False},
    )
)
def test_logsumexp_of_any_matrix(x: np.ndarray):
    assert_rows_agree(torch.from_numpy(x))


@built
@given(st.integers(1, 40), st.floats(-1e4, 1e4))
def test_a_shift_of_a_row_shifts_its_result(columns: int, shift: float):
    x = torch.randn(
        3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns)
    )
    moved = native.logsumexp(x + shift) - native.logsumexp(x)
    torch.testing.assert_close(
        moved, torch.full((3,), shift, dtype=torch.float64), rtol=1e-14, atol=1e-11
    )


@built
def test_logsumexp_releases_the_gil():
    x = torch.rand(1, 1000, dtype=torch.float64).expand(40_000, 1000)
    calls, ticks = [], []

    def call() -> None:
        start = time.perf_counter()
        native.logsumexp(x)
        calls.append((start, time.perf_counter()))

    worker = threading.Thread(target=call)
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    (start, stop) = calls[0]
    inside = [t for t in ticks if start < t < stop]
    assert len(inside) >= 5, (
        f"{len(inside)} ticks of another thread during a call of {stop - start:.3f} s"
    )


@built
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"must have 2 dimensions, \[rows, columns\]; its shape is \[3\]"),
        (torch.zeros(2, 3, 4), r"its shape is \[2, 3, 4\]"),
        (
            torch.zeros(2, 3, dtype=torch.float16),
            "must be float32 or float64; its dtype is torch.float16",
        ),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "its dtype is torch.bfloat16"),
        (torch.zeros(2, 3, dtype=torch.int64), "its dtype is torch.int64"),
        (torch.zeros(2, 3, device="meta"), "must be on the CPU; it is on meta"),
        (torch.zeros(2, 3, requires_grad=True), "has no gradient, and x requires one"),
    ],
)
def test_logsumexp_refuses(x: torch.Tensor, message: str):
    with pytest.raises(ModeconnError, match=message):
        native.logsumexp(x)


@built
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros(3), ValueError, "must have 2 dimensions.*it has 1"),
        (np.zeros((2, 3), np.int32), TypeError, "its dtype is int32"),
        (np.zeros((2, 3), np.float16), TypeError, "its dtype is float16"),
        (np.zeros((2, 3), FOREIGN), TypeError, "native byte order; its dtype is [<>]f8"),
        (np.zeros(49, np.uint8)[1:].view(np.float64).reshape(2, 3), ValueError, "must be aligned"),
        ([[1.0, 2.0]], TypeError, "incompatible function arguments"),
        (torch.zeros(2, 3), TypeError, "incompatible function arguments"),
    ],
    ids=["one dimension", "int32", "float16", "foreign byte order", "unaligned", "list", "tensor"],
)
def test_the_binding_refuses_what_it_cannot_read(x: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        native._load()[0].logsumexp(x)


@pytest.mark.parametrize(
    ("raised", "note", "message"),
    [
        (
            ModuleNotFoundError("x"),
            "no C++ compiler\n",
            "modeconn._native is not available: no C\\+\\+ compiler$",
        ),
        (
            ModuleNotFoundError("x"),
            None,
            "it has not been built for this Python; `pip install -e .`",
        ),
        (
            ImportError("undefined symbol: f"),
            None,
            "it was built but does not load: undefined symbol: f$",
        ),
    ],
    ids=["left out", "never built", "broken"],
)
def test_a_missing_extension_says_why(raised, note, message, monkeypatch, tmp_path):
    def fail(name: str) -> None:
        raise raised

    if note:
        (tmp_path / "note.txt").write_text(note)
    monkeypatch.setattr(native, "_MISSING_NOTE", tmp_path / "note.txt")
    monkeypatch.setattr(importlib, "import_module", fail)
    native._load.cache_clear()
    try:
        assert not native.available()
        for call in (native.features, native.versions, lambda: native.logsumexp(torch.zeros(1, 1))):
            with pytest.raises(ModeconnError, match=message):
                call()
    finally:
        native._load.cache_clear()


def test_poisoned_memory_shows_what_nobody_wrote(poisoned_memory: None):
    assert torch.isnan(torch.empty(5)).all()
    assert torch.isnan(torch.empty_like(torch.zeros(2, 3, dtype=torch.float64))).all()
    assert torch.isnan(torch.zeros(2).new_empty(7)).all()
