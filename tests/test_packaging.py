"""The package as installed: built, put into a clean environment, used from another folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from modeconn.backends.native import extension as native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on the PATH"
)
CXX = str(ROOT / "tests" / "compiled.py")
NOT_SOURCE = (".git", ".venv", ".cache", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info")
NOT_SOURCE += ("__pycache__", "*.so", "_native_missing.txt", "_cuda_missing.txt")


def run(command: Sequence[str | Path], cwd: Path, expected: int = 0, **environment: str) -> str:
    """Run a command without this environment's Python path; return both streams together.

    The CUDA part is left out unless it is asked for: nvcc takes its time, and
    tests/test_cuda_chain.py has it compile. Object files that a test has made before are taken.
    """
    dropped = (
        "PYTHONPATH",
        "MODECONN_NATIVE",
        "MODECONN_SANITIZE",
        "MODECONN_CUDA_ARCHS",
        "CUDA_HOME",
    )
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "PYTHONUTF8": "1", "MODECONN_CUDA": "0", "CXX": CXX, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == expected, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the source tree, without what earlier builds left in it."""
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCE))


def clean_environment(folder: Path, wheel: Path) -> Path:
    """Make a virtual environment with the wheel alone, and this Python's dependencies.

    A .pth file lists those folders; the .pth files in them are not read, so an editable modeconn
    stays out.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder.parent)
    site = run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder.parent
    ).strip()
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(site, "dependencies.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    return python


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_is_complete():
    listed = pyproject()["tool"]["setuptools"]["packages"]
    found = [
        path.parent for top in ("modeconn", "kernels") for path in (ROOT / top).rglob("__init__.py")
    ]
    named = [".".join(folder.relative_to(ROOT).parts) for folder in found]
    assert sorted(listed) == sorted(
        n if n.startswith("modeconn") else f"modeconn.{n}" for n in named
    )
    loose = [
        p for p in (ROOT / "modeconn").rglob("*.py") if not (p.parent / "__init__.py").exists()
    ]
    assert loose == [], "modules in a folder without __init__.py are not packaged"


def test_an_installed_checkout_has_the_kernels():
    """The same names from an editable install as from a wheel."""
    if not any(importlib.metadata.packages_distributions().get("modeconn", [])):
        pytest.skip("modeconn is not installed here, only on Python's path; `make dev` installs it")
    import modeconn.kernels

    assert Path(modeconn.kernels.__file__) == ROOT / "kernels" / "__init__.py"


def test_extras_cover_what_dev_needs():
    extras = pyproject()["project"]["optional-dependencies"]
    named = set(extras["all"][0].partition("[")[2].rstrip("]").split(","))
    assert named == set(extras) - {"all", "dev"}


USE = """
import torch
import modeconn as mc, modeconn.kernels
from modeconn.backends.native import extension as native
print(mc.__file__, modeconn.kernels.__file__)
print(native.available(), native.reason())
a, b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
data = torch.rand(7, 4), torch.arange(7) % 3
result = mc.evaluate(a, mc.Line(a, b), data, points=5, batch_size=4)
print(f"{result.passes} pass, {result.samples} samples, {len(result.loss)} points")
"""


@pytest.mark.slow
def test_a_wheel_works_in_a_clean_environment(checkout: Path, tmp_path: Path):
    """Make an sdist, a wheel from it, install it, and use library, extension, kernels, command."""
    run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", checkout],
        tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"modeconn/py.typed", "modeconn/_native.pyi", "modeconn/kernels/__init__.py"} <= set(
        names
    )
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"modeconn"}

    python = clean_environment(tmp_path / "clean", wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where, native_line, evaluated = run([python, "-c", USE], elsewhere).splitlines()
    assert all(Path(path).is_relative_to(tmp_path / "clean") for path in where.split())
    assert native_line.startswith(str(native.available())), native_line
    assert evaluated == "1 pass, 7 samples, 5 points"

    command = python.parent / "modeconn"
    text = run([command, "--help"], elsewhere)
    assert all(name in text for name in ("demo", "train", "evaluate", "explain", "inspect"))
    assert run([python, "-m", "modeconn", "--help"], elsewhere) == text
    assert "modeconn" in run(
        [command, "inspect", "nothing-here.safetensors"], elsewhere, expected=2
    )
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_a_pure_python_install_works(checkout: Path, tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    text = run([*build, "-w", tmp_path / "dist", checkout], tmp_path, MODECONN_NATIVE="0")
    assert "not built: MODECONN_NATIVE=0 was set when modeconn was installed" in text
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]

    python = clean_environment(tmp_path / "clean", wheel)
    code = (
        "import torch, modeconn, modeconn.kernels\n"
        "from modeconn.backends.native import extension as native\n"
        "try: native.extension()\n"
        "except modeconn.ModeconnError as error: print(native.available(), error)"
    )
    assert run([python, "-c", code], tmp_path / "dist") == (
        "False the C++ extension modeconn._native is not available: "
        "MODECONN_NATIVE=0 was set when modeconn was installed\n"
    )


@pytest.fixture
def small(checkout: Path) -> Path:
    """The checkout with a C++ part that compiles in a moment."""
    shutil.rmtree(checkout / "csrc")
    (checkout / "csrc").mkdir()
    (checkout / "csrc" / "bindings.cpp").write_text(
        "#include <Python.h>\n"
        "static PyModuleDef definition =\n"
        '    {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};\n'
        "PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }\n",
        encoding="utf-8",
    )
    return checkout


def build_extension(
    checkout: Path, expected: int = 0, **environment: str
) -> tuple[str, list[str], str]:
    """Build the extension alone: the output, the shared libraries made, the note left."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        "built",
        "--build-temp",
        "objects",
    ]
    text = run(command, checkout, expected, **environment)
    note = checkout / "built" / "modeconn" / "_native_missing.txt"
    made = sorted(path.name for path in (checkout / "built").rglob("*.so"))
    return text, made, note.read_text(encoding="utf-8") if note.exists() else ""


NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}


def test_without_a_compiler_it_installs_as_pure_python_and_says_so(small: Path):
    text, made, note = build_extension(small, **NO_COMPILER)
    assert "✗ C++ extension modeconn._native: not built: no working C++17 compiler" in text
    assert "installed as pure Python" in text
    assert made == []
    assert "/nowhere/c++ does not run" in note


@needs_compiler
@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("Python.h", "no Python headers (package python3-dev or python3-devel)"),
        ("pybind11/detail/common.h", "no usable pybind11 headers"),
        ("optional", "no working C++17 compiler"),
    ],
)
def test_a_missing_header_leaves_the_extension_out(small: Path, missing: str, what: str):
    """By a compiler that does not find it."""
    compiler = small / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'for file in "$@"; do\n'
        f'  case "$file" in *.cpp) if grep -q "#include <{missing}>" "$file"; then\n'
        f'    echo "$file:1:10: fatal error: {missing}: No such file or directory" >&2; exit 1\n'
        "  fi;; esac\ndone\n"
        f'exec {CXX} "$@"\n',
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    text, made, note = build_extension(small, CXX=str(compiler))
    assert f"✗ C++ extension modeconn._native: not built: {what}: " in text
    assert made == [] and note.count("\n") == 1 and f"{missing}: No such file" in note


def test_what_must_be_built_and_cannot_is_an_error(small: Path):
    text, made, _ = build_extension(small, expected=1, MODECONN_NATIVE="1", **NO_COMPILER)
    assert "MODECONN_NATIVE=1, but the extension cannot be built: no working C++17 compiler" in text
    assert made == []


def test_an_unknown_switch_is_refused(small: Path):
    text, _, _ = build_extension(small, expected=1, MODECONN_NATIVE="yes")
    assert "MODECONN_NATIVE is 'yes': expected auto, 0 or 1" in text


@needs_compiler
def test_a_source_that_does_not_compile_leaves_the_extension_out(small: Path):
    (small / "csrc" / "broken.cpp").write_text("#error broken on purpose\n", encoding="utf-8")
    text, made, note = build_extension(small)
    assert "broken on purpose" in text
    assert made == []
    assert "the compiler failed" in note


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are for x86-64")
def test_each_source_gets_the_flags_of_its_instruction_set_and_no_other(small: Path):
    def demand(file: str, has: str, has_not: str) -> None:
        path = small / "csrc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"#if !({has}) || {has_not} || defined(__FAST_MATH__)\n"
            f"#error wrong flags for {file}\n#endif\n",
            encoding="utf-8",
        )

    demand("plain.cpp", "1", "defined(__AVX2__)")
    demand("cpu/generic/plain.cpp", "1", "defined(__AVX2__)")
    demand("cpu/avx2/kernel.cpp", "defined(__AVX2__) && defined(__FMA__)", "defined(__AVX512F__)")
    demand(
        "engine/kernel_avx2.cpp", "defined(__AVX2__) && defined(__FMA__)", "defined(__AVX512F__)"
    )
    all_512 = " && ".join(f"defined(__AVX512{part}__)" for part in ("F", "BW", "DQ", "VL"))
    demand("cpu/avx512/kernel.cpp", all_512, "0")
    demand("engine/kernel_avx512.cpp", all_512, "0")
    (small / "csrc" / "cuda").mkdir()
    (small / "csrc" / "cuda" / "later.cpp").write_text(
        "#error not for this compiler\n", encoding="utf-8"
    )
    text, made, _ = build_extension(small, MODECONN_NATIVE="1")
    assert "✓ C++ extension modeconn._native: built" in text
    assert len(made) == 1


@needs_compiler
def test_without_nvcc_the_cuda_part_is_left_out_and_says_so(small: Path):
    (small / "csrc" / "cuda").mkdir()
    (small / "csrc" / "cuda" / "kernel.cu").write_text("", encoding="utf-8")
    text, made, _ = build_extension(small, MODECONN_CUDA="auto", CUDA_HOME="/nowhere")
    assert (
        "✗ C++ extension modeconn._cuda: not built: there is no nvcc in CUDA_HOME=/nowhere" in text
    )
    assert [name.partition(".")[0] for name in made] == ["_native"]
    note = small / "built" / "modeconn" / "_cuda_missing.txt"
    assert note.read_text(encoding="utf-8") == "there is no nvcc in CUDA_HOME=/nowhere\n"
    text, _, _ = build_extension(small, expected=1, MODECONN_CUDA="1", CUDA_HOME="/nowhere")
    assert "MODECONN_CUDA=1, but the extension cannot be built: there is no nvcc" in text
    text, _, _ = build_extension(small, expected=1, MODECONN_CUDA="on")
    assert "MODECONN_CUDA is 'on': expected auto, 0 or 1" in text


@needs_compiler
def test_a_build_removes_the_note_of_an_earlier_failure(small: Path):
    _, _, note = build_extension(small, **NO_COMPILER)
    assert note
    _, made, note = build_extension(small)
    assert len(made) == 1
    assert note == ""
    _, made, note = build_extension(small, MODECONN_NATIVE="0")
    assert made == [], "an extension of an earlier build stayed"
    assert note == "MODECONN_NATIVE=0 was set when modeconn was installed\n"
