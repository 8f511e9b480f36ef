"""Builds the one C++ extension, modeconn._native; everything declarative is in pyproject.toml.

What it finds is printed with a ✓ or ✗ (pip shows it with -v). Without a compiler the package installs as pure
Python and says so; modeconn/_native_missing.txt then keeps the reason for run time.

Environment:
    MODECONN_NATIVE    auto (default): build where possible; 0: never; 1: a failure to build is an error
    MODECONN_SANITIZE  for instance "address,undefined": a slow debug build with these sanitizers
    CXX, CXXFLAGS      as usual
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# The flags of the instruction sets with sources of their own: csrc/**/<name>/*.cpp and csrc/**/*_<name>.cpp.
# Never -march=native (a wheel must run elsewhere), nor -ffast-math (NaN and infinity matter).
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
X86_PROBES = {
    "avx2": "__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n",
    "avx512": "__m512i f(__m512i a) { return _mm512_add_epi8(a, _mm512_mullo_epi64(a, a)); }\n",
}
MISSING_NOTE = "_native_missing.txt"


class NotBuilt(Exception):
    """The extension cannot, or shall not, be built; the text is the reason."""


def say(mark: str, text: str) -> None:
    """Print one line of the report, on a terminal of any encoding."""
    line = f"  {mark} {text}"
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def native_switch() -> str:
    """MODECONN_NATIVE, checked."""
    value = os.environ.get("MODECONN_NATIVE", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"MODECONN_NATIVE is {value!r}: expected auto, 0 or 1")
    return value


def instruction_set(source: Path) -> str:
    """The instruction set that a source is for, by its folder or the end of its name: "generic" for most."""
    for name in X86_FLAGS:
        if name in source.parts[:-1] or source.stem.endswith(f"_{name}"):
            return name
    return "generic"


def first_error(output: str) -> str:
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no output")


class Toolchain:
    """The C++ compiler that the build uses, and what it can do."""

    def __init__(self, command: list[str], include_dirs: list[str]) -> None:
        self.command = command
        self.includes = [f"-I{folder}" for folder in include_dirs]

    def failure(self, code: str, flags: list[str]) -> str | None:
        """Compile `code` to an object file: None if that works, otherwise the reason."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code, encoding="utf-8")
            files = ["-c", str(source), "-o", f"{source}.o"]
            command = [*self.command, "-std=c++17", *flags, *self.includes, *files]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            except OSError as error:
                return f"{command[0]} does not run: {error.strerror}"
            return None if done.returncode == 0 else first_error(done.stderr)

    def version(self) -> str:
        done = subprocess.run([self.command[0], "--version"], capture_output=True, text=True, check=False)
        return (done.stdout.splitlines() or [self.command[0]])[0]

    def check(self) -> None:
        """Raise NotBuilt unless this is a C++17 compiler that finds Python's and pybind11's headers."""
        for what, code in (
            ("no working C++17 compiler", "#include <optional>\nstd::optional<int> f() { return {}; }\n"),
            ("no Python headers (package python3-dev or python3-devel)", "#include <Python.h>\n"),
            ("no usable pybind11 headers", "#include <pybind11/detail/common.h>\n"),
        ):
            problem = self.failure(code, [])
            if problem:
                raise NotBuilt(f"{what}: {problem}")
        say("✓", f"compiler: {self.version()}")

    def instruction_sets(self) -> list[str]:
        """The names of X86_FLAGS that can be compiled; none where the target is not x86-64 alone."""
        if self.failure("#ifndef __x86_64__\n#error not x86-64\n#endif\n", []):
            say("✗", "instruction sets: generic only (the target is not x86-64)")
            return []
        found = []
        for name, flags in X86_FLAGS.items():
            problem = self.failure(f"#include <immintrin.h>\n{X86_PROBES[name]}", flags)
            say("✗" if problem else "✓", f"instruction set {name}: {problem or 'can be compiled'}")
            if not problem:
                found.append(name)
        return found


def report_nvcc() -> None:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if path:
        say("✓", f"nvcc: {path} found, not used yet (there is no CUDA part so far)")
    else:
        say("✗", "nvcc: not found, and not needed (there is no CUDA part so far)")


class BuildNative(build_ext):
    """Compile in parallel, each source with the flags of its instruction set, or leave the extension out."""

    def run(self) -> None:
        in_source = bool(self.inplace)
        problem = None
        try:
            if native_switch() == "0":
                raise NotBuilt("MODECONN_NATIVE=0 was set when modeconn was installed")
            super().run()
        except NotBuilt as reason:
            problem = str(reason)
            if native_switch() == "1":
                raise SystemExit(f"MODECONN_NATIVE=1, but the extension cannot be built: {problem}") from None
            self.leave_out(problem, in_source)
        self.write_note(problem, in_source)

    def build_extension(self, ext: Extension) -> None:
        """Build modeconn._native; raises NotBuilt with the reason where that fails."""
        if os.name == "nt":
            raise NotBuilt("Windows is not supported by the extension")
        try:
            import pybind11
        except ImportError:
            raise NotBuilt("pybind11 is not installed") from None
        self.choose_compiler()
        include_dirs = [*self.compiler.include_dirs, pybind11.get_include()]
        toolchain = Toolchain(self.compiler.compiler_so_cxx, include_dirs)
        toolchain.check()
        found = toolchain.instruction_sets()
        report_nvcc()
        try:
            self.compile_and_link(ext, include_dirs, found)
        except (BaseError, CCompilerError) as error:
            raise NotBuilt(f"the compiler failed, see its messages above ({error})") from error
        say("✓", "C++ extension modeconn._native: built")

    def choose_compiler(self) -> None:
        """Use another C++ compiler where the one that built Python is not on this machine."""
        command = self.compiler.compiler_so_cxx
        if shutil.which(command[0]) or "CXX" in os.environ:
            return
        other = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if other is None:
            raise NotBuilt(f"no C++ compiler: none of {command[0]}, c++, g++, clang++ is on the PATH")
        self.compiler.set_executable("compiler_so_cxx", [other, *command[1:]])
        self.compiler.set_executable("linker_so_cxx", [other, *self.compiler.linker_so_cxx[1:]])

    def compile_and_link(self, ext: Extension, include_dirs: list[str], found: list[str]) -> None:
        sanitizers = os.environ.get("MODECONN_SANITIZE", "")
        speed = ["-O3"]
        link = ["-pthread"]
        if sanitizers:
            speed = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
            link.append(f"-fsanitize={sanitizers}")
            say("✓", f"sanitizers: {sanitizers} (a slow build, for tests)")
        # -iquote, since a header of ours must never stand in for a system header of the same name.
        common = ["-std=c++17", "-iquotecsrc", *speed, "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
        common.append("-ffp-contract=fast")  # a multiply-add is one rounding less; nothing else is given up
        version = self.distribution.get_version()
        macros: list[tuple[str, str | None]] = [("MODECONN_VERSION", f'"{version}"')]
        macros += [(f"MODECONN_HAVE_{name.upper()}", None) for name in found]
        macros += [("MODECONN_SANITIZERS", f'"{sanitizers}"')]

        def compile_one(source: str) -> list[str]:
            name = instruction_set(Path(source))
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=include_dirs,
                extra_postargs=[*common, *X86_FLAGS.get(name, [])],
            )

        sources = [s for s in ext.sources if instruction_set(Path(s)) in ("generic", *found)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            objects = [path for paths in pool.map(compile_one, sources) for path in paths]
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=link, target_lang="c++")

    def leave_out(self, problem: str, in_source: bool) -> None:
        """Take the extension out of this build, with what an earlier build left of it."""
        say("✗", f"C++ extension modeconn._native: not built: {problem}")
        say(" ", "modeconn is installed as pure Python and works on PyTorch alone (MODECONN_NATIVE=1 insists)")
        for folder in self.package_folders(in_source):
            for ext in self.extensions:
                folder.joinpath(Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        self.extensions = []

    def package_folders(self, in_source: bool) -> list[Path]:
        built = Path(self.build_lib, "modeconn")
        return [built, Path("modeconn")] if in_source else [built]

    def write_note(self, problem: str | None, in_source: bool) -> None:
        """Keep the reason for modeconn.native.reason(), or remove that of an earlier build."""
        for folder in self.package_folders(in_source):
            note = folder / MISSING_NOTE
            if problem is None:
                note.unlink(missing_ok=True)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                note.write_text(problem + "\n", encoding="utf-8")


# Relative paths: object files of absolute ones would land outside the build folder.
sources = sorted(path for path in Path("csrc").rglob("*.cpp") if not {"cuda", "tests"} & set(path.parts))
headers = sorted(Path("csrc").rglob("*.h"))
setup(
    ext_modules=[
        Extension(
            "modeconn._native",
            sources=[path.as_posix() for path in sources],
            depends=[path.as_posix() for path in headers],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
