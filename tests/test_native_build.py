"""The engine's sources alone: clean under sanitizers, and free of shared symbols."""

from __future__ import annotations

import ast
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compiled import object_of

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout"),
]


def isa_flags() -> dict[str, list[str]]:
    """The flags that setup.py compiles each instruction set's folder with."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "X86_FLAGS"
    ]
    return {"generic": [], **ast.literal_eval(value)}


def build(sources: list[Path], flags: list[str]) -> list[Path]:
    """Compile sources, each with its folder's instruction set; skip where it is not x86-64."""
    sets = isa_flags()
    machine = subprocess.run(
        [CXX, "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    if not machine.startswith("x86_64"):
        pytest.skip(f"the compiler's target is {machine.strip()}")
    macros = [f"-DMODECONN_HAVE_{name.upper()}" for name in sets if name != "generic"]

    def compile_one(source: Path) -> Path:
        csrc = ROOT / "csrc"
        own = sets.get(source.parent.name, [])
        command = [CXX, "-std=c++17", f"-iquote{csrc}", "-pthread", *macros, *flags, *own]
        return object_of(source, csrc, command)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def test_sanitizers_find_nothing(tmp_path: Path):
    """No access beyond an array, leak, misaligned access or overflow in the C++ driver."""
    csrc = ROOT / "csrc"
    sources = [
        *csrc.glob("engine/*.cpp"),
        *csrc.glob("cpu/*.cpp"),
        *csrc.glob("cpu/*/*.cpp"),
        *csrc.glob("tests/test_*.cpp"),
    ]
    flags = [
        "-O1",
        "-g",
        "-ffp-contract=fast",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    objects = build(sources, flags)
    program = tmp_path / "test_chain"
    subprocess.run(
        [CXX, "-pthread", "-fsanitize=address,undefined", *objects, "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout


def test_no_code_of_an_instruction_set_is_shared():
    """No weak symbol: the linker might keep the one that is compiled for AVX-512 for all."""
    kernels = sorted((ROOT / "csrc" / "cpu").glob("*/kernels_*.cpp"))
    assert len(kernels) == 3
    for source, target in zip(kernels, build(kernels, ["-O3", "-fvisibility=hidden"])):
        rows = subprocess.run(
            ["nm", "-C", target], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        defined = [row[19:] for row in rows if row[17:18] in set("TWVuBD")]
        assert defined == [f"modeconn::fill_{source.parent.name}(modeconn::Context&)"]
