"""Runs the C++ engine under sanitizers (`make sanitize`); exit code 1 if one finds something.

    python tests/sanitize.py [address] [thread] [--calls 2000]

Under the address and undefined-behaviour sanitizers: the test program of csrc/tests with a look for
leaks, the engine's tests in Python, random calls. Under the thread sanitizer: the test program,
whose callers overlap, and random calls from eight threads of Python at once. That one sees neither
PyTorch nor OpenMP, which are not instrumented: without them the engine starts threads of its own,
and no report has to be suppressed. Tiles have at most three units: each size is the same template,
and takes its own time to compile.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiled import CXX, object_of

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NAMES = {"address": "address,undefined", "thread": "thread"}
# The runtimes that the uninstrumented Python must have from its start.
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python itself does not give all back; the program looks
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    "OPENBLAS_NUM_THREADS": "1",
}
SMALL = ["-g1", "-DMODECONN_MOST_UNITS=3"]
ENGINE = ("engine/chain.cpp", "engine/statistics.cpp", "engine/team.cpp", "cpu/context.cpp")


def isa_flags() -> dict[str, list[str]]:
    """Returns the flags that setup.py compiles each instruction set's folder with."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "X86_FLAGS"
    ]
    return {"generic": [], **ast.literal_eval(value)}


def build(sources: Sequence[tuple[Path, Sequence[str]]]) -> list[Path]:
    """Compiles sources, each with flags of its own and those of its folder's instruction set."""
    assert CXX is not None
    sets = isa_flags()
    macros = [f"-DMODECONN_HAVE_{name.upper()}" for name in sets if name != "generic"]
    common = [CXX, "-std=c++17", f"-iquote{CSRC}", "-pthread", "-ffp-contract=fast", *macros]

    def compile_one(given: tuple[Path, Sequence[str]]) -> Path:
        source, flags = given
        return object_of(source, [*common, *flags, *sets.get(source.parent.name, [])])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def program(name: str, folder: Path) -> Path:
    """Builds the test program of csrc/tests under a sanitizer.

    The engine is one source, which has each template once, and not optimized, which the compiler
    takes twice as long for. Kernels are: most of the time is theirs. The tests compute what is
    expected in plain loops, and are not instrumented.
    """
    sanitizer = f"-fsanitize={NAMES[name]}"
    flags = [sanitizer, "-fno-sanitize-recover=all", *SMALL]
    engine, tests = folder / "engine.cpp", folder / "tests.cpp"
    engine.write_text("".join(f'#include "{source}"\n' for source in ENGINE), encoding="utf-8")
    found = sorted(path.name for path in (CSRC / "tests").glob("test_*.cpp"))
    tests.write_text("".join(f'#include "tests/{source}"\n' for source in found), encoding="utf-8")
    sources = [(path, [*flags, "-O1"]) for path in sorted(CSRC.glob("cpu/*/*.cpp"))]
    objects = build([(engine, [*flags, "-O0"]), (tests, ["-O1"]), *sources])
    made = folder / "engine_tests"
    assert CXX is not None
    subprocess.run([CXX, "-pthread", sanitizer, *map(str, objects), "-o", str(made)], check=True)
    return made


def extension(name: str, folder: Path) -> Path:
    """Builds modeconn._native under a sanitizer."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run(
        [*command, "--build-temp", str(folder / "objects")],
        cwd=ROOT,
        env={
            **os.environ,
            "CXX": str(ROOT / "tests" / "compiled.py"),
            "CXXFLAGS": " ".join(SMALL),
            "MODECONN_NATIVE": "1",
            "MODECONN_CUDA": "0",
            "MODECONN_SANITIZE": NAMES[name],
        },
        check=True,
    )
    (made,) = (folder / "modeconn").glob("_native*.so")
    return made


def preloaded(name: str, made: Path) -> dict[str, str]:
    """Returns an environment in which Python has a sanitizer, and our extension for the usual one.

    The file sitecustomize.py, which every Python reads, puts it in the place of `modeconn._native`.
    """
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('modeconn._native', {str(made)!r})\n"
        "sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules[spec.name])\n"
    )
    (made.parent / "sitecustomize.py").write_text(code, encoding="utf-8")
    assert CXX is not None
    files = []
    for runtime in RUNTIMES[name]:
        asked = [CXX, f"-print-file-name={runtime}"]
        files.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    preload = " ".join(file.strip() for file in files)
    return {**os.environ, **OPTIONS, "PYTHONPATH": str(made.parent), "LD_PRELOAD": preload}


def check(name: str, calls: int) -> bool:
    """Builds and runs all under one sanitizer; returns whether it is clean."""
    folder = ROOT / "build" / "sanitize" / name
    folder.mkdir(parents=True, exist_ok=True)
    made = program(name, folder)
    env = {**os.environ, **OPTIONS, "ASAN_OPTIONS": "detect_leaks=1"}
    # Thread sanitizers know few layouts of memory: it must not be drawn at random.
    fixed = ["setarch", platform.machine(), "-R"] if name == "thread" else []
    runs: list[tuple[list[str], dict[str, str]]] = [([*fixed, str(made)], env)]
    shared = extension(name, folder)
    env = preloaded(name, shared)
    script = [sys.executable, str(ROOT / "tests" / "native_random_calls.py"), str(shared)]
    at_once = "8" if name == "thread" else "1"
    random = [*script, "--calls", str(calls), "--at-once", at_once]
    runs.append(([*fixed, *random], env))
    if name == "address":
        tests = sorted(map(str, (ROOT / "tests").glob("test_native_*.py")))
        tests.remove(str(ROOT / "tests" / "test_native_build.py"))
        runs.append(([sys.executable, "-m", "pytest", "-q", "--capture=sys", *tests], env))
    clean = True
    for command, environment in runs:
        print(f"{NAMES[name]}: {' '.join(command[:6])}", flush=True)
        clean &= subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    return clean


def main() -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(description="the C++ engine under sanitizers")
    parser.add_argument("names", nargs="*", metavar="address|thread", default=list(NAMES))
    parser.add_argument("--calls", type=int, default=2000, help="random calls")
    given = parser.parse_args()
    found = [name for name in given.names if not check(name, given.calls)]
    print("\n".join(f"{NAMES[name]}: NOT CLEAN" for name in found) or "sanitizers: clean")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
