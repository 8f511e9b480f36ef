"""The engine's sources alone: clean under sanitizers, and free of shared symbols."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiled import CACHE, CXX
from native_cases import engine
from native_random_calls import calls
from sanitize import CSRC, ROOT, program

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="not in a checkout"),
]


def skip_elsewhere() -> None:
    """Skip where the compiler's target is not x86-64, whose instruction sets have sources."""
    machine = subprocess.run(
        [str(CXX), "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    if not machine.startswith("x86_64"):
        pytest.skip(f"the compiler's target is {machine.strip()}")


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path):
    """No access beyond an array, leak, misaligned access or overflow in the C++ driver.

    A driver that has passed is known by its bits, and runs again when they change; `make sanitize`
    runs it always.
    """
    skip_elsewhere()
    made = program("address", tmp_path)
    passed = CACHE / f"{hashlib.sha256(made.read_bytes()).hexdigest()}.passed"
    if not passed.exists():
        done = subprocess.run([made], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASS" in done.stdout
        passed.touch()


@pytest.mark.slow
def test_no_code_of_an_instruction_set_is_shared(tmp_path: Path):
    """No weak symbol: the linker might keep the one that is compiled for AVX-512 for all.

    Of the object files that a wheel is made of (tests/test_packaging.py), compiled once for both.
    """
    skip_elsewhere()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    subprocess.run(
        [*map(str, command), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CXX": str(ROOT / "tests" / "compiled.py"), "MODECONN_CUDA": "0"},
        check=True,
    )
    kernels = sorted((CSRC / "cpu").glob("*/kernels_*.cpp"))
    assert len(kernels) == 3
    for source in kernels:
        target = (tmp_path / source.relative_to(ROOT)).with_suffix(".o")
        rows = subprocess.run(
            ["nm", "-C", target], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        defined = [row[19:] for row in rows if row[17:18] in set("TWVuBD")]
        assert defined == [f"modeconn::fill_{source.parent.name}(modeconn::Context&)"]


@pytest.mark.parametrize("at_once", [1, 4])
def test_random_calls(at_once):
    """What `make sanitize` makes 2,000 of: results do not depend on threads, bad ones are refused.

    Most of the good ones are that; of those with an argument spoiled, some are good yet.
    """
    counts = calls(engine, 150, at_once, seed=10_000)
    assert counts["good"] > 60 and counts["refused"] > 20, counts
