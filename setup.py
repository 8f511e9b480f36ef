"""Builds the C++ extension modeconn._native and, where there is nvcc, modeconn._cuda.

Declarative metadata is in pyproject.toml. Each finding is printed with a ✓ or ✗ (pip shows it with
-v). Without a compiler the package installs as pure Python and says so;
modeconn/_native_missing.txt and _cuda_missing.txt then keep the reasons for run time.

Environment:
    MODECONN_NATIVE      auto (default): build where possible; 0: never; 1: a failure is an error
    MODECONN_CUDA        likewise for modeconn._cuda
    MODECONN_CUDA_ARCHS  architectures of modeconn._cuda: 80,90a,100 by default; 80,90a in editable
                         installs, which are then quicker
    MODECONN_SANITIZE    "address,undefined", for instance: a slow debug build of modeconn._native
                         under these sanitizers
    CUDA_HOME            folder of the CUDA toolkit; by default nvcc is looked for on the PATH
    CXX, CXXFLAGS        as usual
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# The flags of the instruction sets with sources of their own: csrc/**/<name>/*.cpp and
# csrc/**/*_<name>.cpp. Never -march=native (a wheel must run elsewhere), nor -ffast-math (NaN and
# infinity matter).
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
}
X86_PROBES = {
    "avx2": "__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n",
    "avx512": "__m512i f(__m512i a) { return _mm512_add_epi8(a, _mm512_mullo_epi64(a, a)); }\n",
}
# What is missing if a program does not compile.
PROBES = {
    "no working C++17 compiler": "#include <optional>\nstd::optional<int> f() { return {}; }\n",
    "no Python headers (package python3-dev or python3-devel)": "#include <Python.h>\n",
    "no usable pybind11 headers": "#include <pybind11/detail/common.h>\n",
}
NATIVE, CUDA = "modeconn._native", "modeconn._cuda"
# Where a toolkit may have its libraries, below its folder.
CUDA_LIBRARIES = (["lib64"], ["lib"], ["targets", "x86_64-linux", "lib"])

Macros = list[tuple[str, str | None]]


class NotBuilt(Exception):
    """Raised where an extension cannot, or shall not, be built; the text is the reason."""


def say(mark: str, text: str) -> None:
    """Prints one line of the report, on a terminal of any encoding."""
    line = f"  {mark} {text}"
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def switch_of(extension: str) -> str:
    """Returns the checked value of MODECONN_NATIVE or MODECONN_CUDA."""
    name = switch_name(extension)
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is {value!r}: expected auto, 0 or 1")
    if value == "0":
        raise NotBuilt(f"{name}=0 was set when modeconn was installed")
    return value


def switch_name(extension: str) -> str:
    """Names the environment variable of an extension."""
    return extension.replace("._", "_").upper()


def note_name(extension: str) -> str:
    """Names the file that keeps the reason why an extension is missing."""
    return f"{extension.partition('.')[2]}_missing.txt"


def instruction_set(source: Path) -> str:
    """Returns the instruction set of a source, by its folder or name; "generic" for most."""
    for name in X86_FLAGS:
        if name in source.parts[:-1] or source.stem.endswith(f"_{name}"):
            return name
    return "generic"


def first_error(output: str) -> str:
    """Returns the first line with an error in a compiler's output, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    return next((line for line in lines if "error" in line), last)


class Toolchain:
    """The C++ compiler that the build uses, and what it can do."""

    def __init__(self, command: list[str], include_dirs: list[str]) -> None:
        self.command = command
        self.includes = [f"-I{folder}" for folder in include_dirs]

    def failure(self, code: str, flags: list[str]) -> str | None:
        """Compiles `code` to an object file; returns None, or the reason why that fails."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code, encoding="utf-8")
            files = ["-c", str(source), "-o", f"{source}.o"]
            command = [*self.command, "-std=c++17", *flags, *self.includes, *files]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", check=False
                )
            except OSError as error:
                return f"{command[0]} does not run: {error.strerror}"
            return None if done.returncode == 0 else first_error(done.stderr)

    def version(self) -> str:
        """Returns the first line of the compiler's --version."""
        done = subprocess.run(
            [self.command[0], "--version"], capture_output=True, text=True, check=False
        )
        return (done.stdout.splitlines() or [self.command[0]])[0]

    def check(self) -> None:
        """Raises NotBuilt unless the compiler knows C++17, Python's headers and pybind11's."""
        for what, code in PROBES.items():
            problem = self.failure(code, [])
            if problem:
                raise NotBuilt(f"{what}: {problem}")
        say("✓", f"compiler: {self.version()}")

    def instruction_sets(self) -> list[str]:
        """Lists the names of X86_FLAGS that compile; none unless the target is x86-64 alone."""
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


class Nvcc:
    """The CUDA compiler, and where its toolkit is."""

    def __init__(self, host: str) -> None:
        home = os.environ.get("CUDA_HOME")
        path = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
        if path is None:
            raise NotBuilt(f"there is no nvcc {f'in CUDA_HOME={home}' if home else 'on the PATH'}")
        self.command = [path, "-ccbin", host]
        # nvcc on the PATH may be a script that calls another one: only that one knows where it is.
        command = [*self.command, "--dryrun", "-x", "cu", "-c", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        top = re.search(r"TOP=(.*)", done.stderr)
        if done.returncode or top is None:
            raise NotBuilt(f"{path} does not work: {first_error(done.stderr)}")
        folders = [Path(top[1].strip(), *parts) for parts in CUDA_LIBRARIES]
        libraries = [folder / "libcudart_static.a" for folder in folders]
        self.runtime = next((library for library in libraries if library.exists()), None)
        if self.runtime is None:
            raise NotBuilt(f"{path} has no libcudart_static.a in {', '.join(map(str, folders))}")
        say("✓", f"nvcc: {path}")

    def compile(self, source: str, target: Path, architectures: list[str]) -> None:
        """Compiles one CUDA source for all architectures; raises NotBuilt where that fails."""
        # The newest architecture goes in as PTX too, which later GPUs compile for themselves; not
        # those of one GPU alone (90a).
        newest = max((a for a in architectures if a.isdigit()), key=int, default="")
        codes = [f"[sm_{a},compute_{a}]" if a == newest else f"sm_{a}" for a in architectures]
        generate = []
        for a, code in zip(architectures, codes):
            generate.append(f"-gencode=arch=compute_{a},code={code}")
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *generate]
        done = subprocess.run(
            [*self.command, *flags, "-c", source, "-o", target],
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode:
            raise NotBuilt(f"nvcc failed on {source}: {first_error(done.stderr)}")


def cuda_architectures(editable: bool) -> list[str]:
    """Returns the checked architectures of MODECONN_CUDA_ARCHS."""
    text = os.environ.get("MODECONN_CUDA_ARCHS") or ("80,90a" if editable else "80,90a,100")
    architectures = text.replace(";", ",").split(",")
    if not all(re.fullmatch(r"[1-9][0-9]{1,2}[af]?", a) for a in architectures):
        raise SystemExit(f"MODECONN_CUDA_ARCHS is {text!r}: expected architectures such as 80,90a")
    return architectures


class BuildExtensions(build_ext):
    """Compiles in parallel, each source with its flags; leaves out what cannot be built."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)
        self.toolchain: Toolchain | None = None
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Builds one extension, or leaves it out and says why."""
        try:
            switch_of(ext.name)
            if ext.name == CUDA:
                self.build_cuda(ext)
            else:
                self.build_native(ext)
        except NotBuilt as reason:
            if os.environ.get(switch_name(ext.name)) == "1":
                raise SystemExit(
                    f"{switch_name(ext.name)}=1, but the extension cannot be built: {reason}"
                ) from None
            self.leave_out(ext, str(reason))
        else:
            say("✓", f"C++ extension {ext.name}: built")
            self.write_note(ext, None)

    def prepare(self) -> Toolchain:
        """Finds the C++ compiler, once; raises NotBuilt where none works."""
        if self.toolchain is None:
            if os.name == "nt":
                raise NotBuilt("Windows is not supported by the extension")
            try:
                import pybind11
            except ImportError:
                raise NotBuilt("pybind11 is not installed") from None
            self.choose_compiler()
            self.include_folders = [*self.compiler.include_dirs, pybind11.get_include()]
            toolchain = Toolchain(self.compiler.compiler_so_cxx, self.include_folders)
            toolchain.check()
            self.toolchain = toolchain
        return self.toolchain

    def build_native(self, ext: Extension) -> None:
        """Builds modeconn._native; raises NotBuilt with the reason where that fails."""
        found = self.prepare().instruction_sets()
        sanitizers = os.environ.get("MODECONN_SANITIZE", "")
        speed = ["-O3"]
        link = ["-pthread"]
        if sanitizers:
            speed = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
            link.append(f"-fsanitize={sanitizers}")
            say("✓", f"sanitizers: {sanitizers} (a slow build, for tests)")
        # -iquote, since a header of ours must never stand in for a system header of the same name.
        # A multiply-add is one rounding less: -ffp-contract=fast gives nothing else up.
        common = ["-iquotecsrc", *speed, "-pthread", "-Wall", "-Wextra", "-ffp-contract=fast"]
        macros: Macros = [(f"MODECONN_HAVE_{name.upper()}", None) for name in found]

        def compile_one(source: str) -> list[str]:
            flags = X86_FLAGS.get(instruction_set(Path(source)), [])
            # What checks arguments gains nothing from -O3, and takes the compiler long.
            level = ["-O1"] if Path(source).name == "bind_engine.cpp" else []
            return self.compile_cpp(source, macros, [*common, *flags, *level])

        sources = [s for s in ext.sources if instruction_set(Path(s)) in ("generic", *found)]
        self.link(ext, in_parallel(compile_one, sources), link)

    def build_cuda(self, ext: Extension) -> None:
        """Builds modeconn._cuda; raises NotBuilt with the reason where that fails."""
        nvcc = Nvcc(self.prepare().command[0])
        architectures = cuda_architectures(self.in_source)

        def compile_one(source: str) -> list[str]:
            if source.endswith(".cpp"):
                macros: Macros = [("MODECONN_CUDA_ARCHS", f'"{",".join(architectures)}"')]
                return self.compile_cpp(source, macros, ["-O2", "-Wall", "-Wextra"])
            target = Path(self.build_temp, source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            nvcc.compile(source, target, architectures)
            return [str(target)]

        objects = in_parallel(compile_one, ext.sources)
        # The runtime is linked in, and hidden: PyTorch brings one of its own, and a machine without
        # a driver has none.
        flags = [str(nvcc.runtime), "-ldl", "-lrt", "-pthread", "-Wl,--exclude-libs,ALL"]
        self.link(ext, objects, flags)
        say("✓", f"CUDA architectures: {', '.join(architectures)}")

    def choose_compiler(self) -> None:
        """Takes another C++ compiler where the one that built Python is not on this machine."""
        command = self.compiler.compiler_so_cxx
        if shutil.which(command[0]) or "CXX" in os.environ:
            return
        other = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if other is None:
            raise NotBuilt(
                f"no C++ compiler: none of {command[0]}, c++, g++, clang++ is on the PATH"
            )
        self.compiler.set_executable("compiler_so_cxx", [other, *command[1:]])
        self.compiler.set_executable("linker_so_cxx", [other, *self.compiler.linker_so_cxx[1:]])

    def compile_cpp(self, source: str, macros: Macros, flags: list[str]) -> list[str]:
        """Compiles one C++ source; returns its object file."""
        try:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=self.include_folders,
                extra_postargs=["-std=c++17", "-fvisibility=hidden", *flags],
            )
        except (BaseError, CCompilerError) as error:
            raise NotBuilt(f"the compiler failed, see its messages above ({error})") from error

    def link(self, ext: Extension, objects: list[str], flags: list[str]) -> None:
        """Links an extension's object files."""
        try:
            target = self.get_ext_fullpath(ext.name)
            self.compiler.link_shared_object(
                objects, target, extra_postargs=flags, target_lang="c++"
            )
        except (BaseError, CCompilerError) as error:
            raise NotBuilt(f"the linker failed, see its messages above ({error})") from error

    def leave_out(self, ext: Extension, problem: str) -> None:
        """Takes an extension out of this build, and removes the result of an earlier one."""
        say("✗", f"C++ extension {ext.name}: not built: {problem}")
        if ext.name == NATIVE:
            without = "modeconn is installed as pure Python and works on PyTorch alone"
            say(" ", f"{without} (MODECONN_NATIVE=1 insists)")
        for folder in self.package_folders():
            folder.joinpath(Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        self.extensions = [other for other in self.extensions if other is not ext]
        self.write_note(ext, problem)

    def package_folders(self) -> list[Path]:
        """Lists the folders that an extension and its note are written to."""
        built = Path(self.build_lib, "modeconn")
        return [built, Path("modeconn")] if self.in_source else [built]

    def write_note(self, ext: Extension, problem: str | None) -> None:
        """Keeps the reason for run time, or removes that of an earlier build."""
        for folder in self.package_folders():
            note = folder / note_name(ext.name)
            if problem is None:
                note.unlink(missing_ok=True)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                note.write_text(problem + "\n", encoding="utf-8")


def in_parallel(compile_one: Callable[[str], list[str]], sources: list[str]) -> list[str]:
    """Compiles all sources on all cores; returns their object files."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return list(itertools.chain.from_iterable(pool.map(compile_one, sources)))


def extension(name: str, sources: list[Path], headers: list[Path]) -> Extension:
    """Declares an extension."""
    # Relative paths: object files of absolute ones would land outside the build folder.
    return Extension(
        name,
        sources=[p.as_posix() for p in sources],
        depends=[p.as_posix() for p in headers],
        language="c++",
    )


sources = sorted(
    path for path in Path("csrc").rglob("*.cpp") if not {"cuda", "tests"} & set(path.parts)
)
headers = sorted(Path("csrc").rglob("*.h"))
kernels = sorted(Path("csrc", "cuda").glob("*.cu"))
extensions = [extension(NATIVE, sources, headers)]
if kernels:
    extensions.append(extension(CUDA, [*kernels, Path("csrc", "cuda", "bindings.cpp")], headers))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
