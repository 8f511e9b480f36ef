"""The tests' environment and shared fixtures: reused graphs, real data sets, poisoned memory."""

from __future__ import annotations

import os

# Before anything imports triton (its decorators read the variable once) or starts an OpenMP pool
# (spinning threads take milliseconds per parallel region when other processes hold the cores).
# MODECONN_TEST_DEVICE=cuda: kernels are compiled, and the tests marked gpu run on CUDA tensors.
if os.environ.get("MODECONN_TEST_DEVICE", "cpu") != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Small tests gain nothing from more threads than 4; the workers of pytest-xdist share the cores.
# They inherit what the process that starts them has set here: that is not theirs, as a user's is.
if os.environ.get("OMP_NUM_THREADS") == os.environ.get("MODECONN_TEST_THREADS"):
    os.environ["OMP_NUM_THREADS"] = os.environ["MODECONN_TEST_THREADS"] = str(
        max(1, min(4, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    )

import contextlib
import gc
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graph_reuse import Reuse
from modeconn.capture import export

try:
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None

ROOT = Path(__file__).resolve().parent.parent

# What is imported stays: looking through it again and again for garbage takes a tenth of the suite.
gc.disable()

# Helpers that assert: a failure there shows the values, as one in a test does.
pytest.register_assert_rewrite(*(file.stem for file in (ROOT / "tests").glob("*_cases.py")))

# In the background of a shell Ctrl-C is ignored, by what is started from here, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if hypothesis is not None:  # the tests of kernels do without it
    # No deadline and no check for slow draws: a busy machine is not a failure. In CI the examples
    # never change.
    _profile = {
        "deadline": None,
        "suppress_health_check": [hypothesis.HealthCheck.too_slow],
        "print_blob": True,
    }
    hypothesis.settings.register_profile("local", **_profile)
    hypothesis.settings.register_profile("always-the-same", derandomize=True, **_profile)
    hypothesis.settings.load_profile("always-the-same" if os.environ.get("CI") else "local")


def pytest_collection_finish() -> None:
    """Leave all that is there to the end, and look for garbage less often than by default."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def graphs() -> Iterator[Reuse]:
    """Reuse captured graphs between tests (graph_reuse.py)."""
    with pytest.MonkeyPatch.context() as patch:
        reuse = Reuse(export._captured)
        patch.setattr(export, "_captured", reuse)
        yield reuse


@pytest.fixture
def fresh_graphs(graphs: Reuse) -> Iterator[None]:
    """Capture every module anew: for the tests of capture itself."""
    with graphs.off():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and trained networks: MODECONN_SHARED, or beside the checkout."""
    named = os.environ.get("MODECONN_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if named and not folder.is_dir():
        pytest.fail(f"MODECONN_SHARED is {named!r}: not a folder")
    if not folder.is_dir():
        pytest.skip(f"no real data and networks: {folder} is no folder (MODECONN_SHARED names it)")
    return folder


def _unpacked(shared: Path, name: str) -> Path:
    """Unpack a data set into .cache/data/<name>, once for all test runs, and return that folder."""
    target = ROOT / ".cache" / "data" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete: an interrupted run leaves nothing that looks finished.
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{name}-"))
        try:
            subprocess.run(
                [sys.executable, shared / "data" / "unpack.py", partial, name], check=True
            )
            with contextlib.suppress(OSError):  # another process was faster
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        assert target.is_dir(), f"{target} cannot be made"
    return target


@pytest.fixture(scope="session")
def mnist_root(shared: Path) -> Path:
    """A root folder with the real MNIST: MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte."""
    return _unpacked(shared, "mnist")


@pytest.fixture(scope="session")
def cifar10_root(shared: Path) -> Path:
    """A root folder with the real CIFAR-10: cifar-10-batches-bin/{data_batch_*,test_batch}.bin."""
    return _unpacked(shared, "cifar10")


@pytest.fixture
def device() -> torch.device:
    """The device of the kernels' tests: the CPU (interpreted), or MODECONN_TEST_DEVICE."""
    return torch.device(os.environ.get("MODECONN_TEST_DEVICE", "cpu"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN (integers: the largest value): what nobody writes shows.

    For a whole file: `pytestmark = pytest.mark.usefixtures("poisoned_memory")`.
    """
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)
