"""What all tests share: the environment, the real data sets, poisoned memory."""

from __future__ import annotations

import os

# Before anything imports triton (its decorators read the variable once) or starts an OpenMP pool
# (spinning threads take milliseconds per parallel region when other processes hold the cores).
# MODECONN_TEST_DEVICE=cuda: kernels are compiled, and the tests marked gpu run on CUDA tensors.
if os.environ.get("MODECONN_TEST_DEVICE", "cpu") != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None

ROOT = Path(__file__).resolve().parent.parent

# In the background of a shell Ctrl-C is ignored, by what is started from here, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(min(4, torch.get_num_threads()))  # small tests gain nothing from more

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


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data sets and trained networks: beside the checkout, or MODECONN_SHARED."""
    named = os.environ.get("MODECONN_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if named and not folder.is_dir():
        pytest.fail(f"MODECONN_SHARED is {named!r}: not a folder")
    if not folder.is_dir():
        pytest.skip(
            f"the real data and networks are not here: no folder {folder} (MODECONN_SHARED names another)"
        )
    return folder


def _unpacked(shared: Path, name: str) -> Path:
    """Unpack a data set into .cache/data/<name>, once for all test runs, and return that folder."""
    target = ROOT / ".cache" / "data" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete, so that an interrupted run leaves nothing that looks
        # finished.
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{name}-"))
        try:
            subprocess.run(
                [sys.executable, shared / "data" / "unpack.py", partial, name], check=True
            )
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


@pytest.fixture(scope="session")
def mnist_root(shared: Path) -> Path:
    """A root folder with the real MNIST: MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte."""
    return _unpacked(shared, "mnist")


@pytest.fixture(scope="session")
def cifar10_root(shared: Path) -> Path:
    """A root folder with the real CIFAR-10: cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin."""
    return _unpacked(shared, "cifar10")


@pytest.fixture
def device() -> torch.device:
    """Where the tests of kernels run: the CPU, under Triton's interpreter, or the GPU where MODECONN_TEST_DEVICE=cuda."""
    return torch.device(os.environ.get("MODECONN_TEST_DEVICE", "cpu"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN (integers: the largest value): an element nobody writes then shows.

    For a whole file: `pytestmark = pytest.mark.usefixtures("poisoned_memory")`.
    """
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)
