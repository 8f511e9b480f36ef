"""Compiles the default configurations of the kernels and reads their resources out of machine code.

    python bench/kernel_report.py [--archs 80 90 100] [--json FILE] [--write docs/kernels.md]
    (make kernel-report)

Per configuration and architecture: registers of a thread and the bytes that it spills to local
memory, shared memory of a block, how many blocks a multiprocessor holds at a time and what bounds
them (by the limits in NVIDIA's CUDA programming guide), tensor-core and other telling instructions.
Nothing is run, and no GPU is needed. Exit code 1 if a configuration spills, does not fit, or lacks
the tensor-core instructions that it should have.

Triton brings the compiler and the disassemblers along. The interpreter's kernels cannot be
compiled, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aot_cases import CASES, AotCase

from modeconn.errors import ModeconnError
from modeconn.kernels.launch import INTERPRETED, triton

BEGIN, END = "<!-- make kernel-report: begin -->", "<!-- make kernel-report: end -->"

# Tensor-core instructions of Ampere, Hopper and Blackwell for floating-point operands.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
# Others that tell how a kernel works: multiply-adds on CUDA cores (single and paired), copies to
# shared memory in the background, local memory.
TELLING = ("FFMA", "FFMA2", "LDGSTS", "UTMALDG", "LDL", "STL")
COLUMNS = (
    "kernel",
    "sm",
    "warps × stages",
    "registers",
    "spilled bytes",
    "shared KiB",
    "blocks/SM",
    "bound by",
    "instructions",
)


@dataclass(frozen=True)
class Limits:
    """Limits of a multiprocessor.

    Attributes:
        block: the most shared memory of one block; the driver keeps 1 KiB more of it.
    """

    warps: int
    blocks: int
    shared: int
    block: int
    registers: int = 65536
    tensor_memory: int = 512


LIMITS = {
    80: Limits(64, 32, 164 << 10, 163 << 10),
    90: Limits(64, 32, 228 << 10, 227 << 10),
    100: Limits(64, 32, 228 << 10, 227 << 10),
}


@dataclass(frozen=True)
class Resources:
    """Resources of a configuration compiled for one architecture.

    Attributes:
        file: the kernel's.
        tensor_cores: whether it should have tensor-core instructions.
        registers: per thread.
        spilled: bytes per thread in local memory.
        shared: bytes per block.
        blocks: at a time on a multiprocessor.
        bound: the resource that keeps them from being more.
        instructions: how many of each telling kind the machine code has.
        failure: why Triton cannot compile it; the other numbers are 0 then.
    """

    file: str
    name: str
    arch: int
    warps: int
    stages: int
    tensor_cores: bool
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    blocks: int = 0
    bound: str = ""
    instructions: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def problems(self) -> list[str]:
        """Lists what is wrong with the configuration, in words."""
        found = []
        if self.failure:
            return [f"{self.file}: {self.name} on sm_{self.arch} does not compile: {self.failure}"]
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if not self.blocks:
            found.append(f"does not fit: {self.bound}")
        if self.tensor_cores and not any(name in self.instructions for name in TENSOR):
            found.append("has no tensor-core instruction")
        return [f"{self.file}: {self.name} on sm_{self.arch} {problem}" for problem in found]


def cases() -> list[tuple[str, int]]:
    """Lists every kernel's default configurations: the file, and the place in its table."""
    found: list[tuple[str, int]] = []
    for file, configurations in CASES.items():
        found += [(file, place) for place in range(len(configurations()))]
    return found


def resources(file: str, place: int, arch: int) -> Resources:
    """Compiles a configuration for an architecture and reads its resources.

    Raises:
        ModeconnError: Triton comes without its disassembler, or the configuration's arguments are
            not the kernel's.
    """
    case = CASES[file]()[place]
    about: dict[str, Any] = {"file": file, "name": case.name, "arch": arch}
    about |= {"stages": case.num_stages, "tensor_cores": case.tensor_cores}
    try:
        kernel = _compiled(case, arch)
    except RuntimeError as error:  # of the compiler itself
        return Resources(warps=case.num_warps, failure=str(error).splitlines()[0], **about)
    usage, code = _disassembled(kernel.asm["cubin"])
    registers, stack = (
        max(map(int, re.findall(rf"\b{what}:(\d+)", usage))) for what in ("REG", "STACK")
    )
    # Kernels whose warps have different tasks are launched with more of them than requested.
    threads = re.search(r"^\.(?:reqntid|maxntid)\s+(\d+)", kernel.asm["ptx"], re.MULTILINE)
    warps = int(threads[1]) // 32 if threads else case.num_warps
    shared = kernel.metadata.shared
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    blocks, bound = blocks_at_a_time(LIMITS[arch], registers, warps, shared, tensor_memory)
    return Resources(
        warps=warps,
        registers=registers,
        spilled=stack,
        shared=shared,
        blocks=blocks,
        bound=bound,
        instructions=_instructions(code),
        **about,
    )


def _compiled(case: AotCase, arch: int) -> Any:
    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):  # within its autotuner
        kernel = kernel.fn
    unknown = {*case.signature, *case.constexprs} ^ set(kernel.arg_names)
    if unknown:
        raise ModeconnError(
            f"{case.name}: {', '.join(sorted(unknown))} is no argument of {kernel.__name__}, "
            "or has no type"
        )
    types = {
        name: case.signature.get(name, "constexpr").partition(":")[0] for name in kernel.arg_names
    }
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if case.signature.get(name, "").endswith(":16")
    }
    source = triton.compiler.ASTSource(kernel, types, dict(case.constexprs), divisible)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(
        source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Returns the resource usage and the machine code of a compiled kernel, as text."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        return usage, _output(triton.knobs.nvidia.nvdisasm.path, "-c", binary)


def _instructions(code: str) -> dict[str, int]:
    """Counts the telling instructions of a disassembly."""
    mnemonics = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE
    )
    return {name: mnemonics.count(name) for name in TENSOR + TELLING if name in mnemonics}


def _output(*command: str | Path) -> str:
    try:
        return subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ModeconnError(f"cannot read machine code: {error}") from error


def blocks_at_a_time(
    limits: Limits, registers: int, warps: int, shared: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """Returns how many blocks a multiprocessor holds, and which resource bounds them."""
    # compiling does not fail on these, a launch does
    if shared > limits.block or tensor_memory > limits.tensor_memory:
        return 0, "shared memory" if shared > limits.block else "tensor memory"
    # A warp's registers come in units of 256, from one of four partitions; shared memory in units
    # of 128 bytes.
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    rooms = {
        "registers": limits.registers // 4 // per_warp * 4 // warps,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "shared memory": limits.shared // (-(-shared // 128) * 128 + 1024),
    }
    if tensor_memory:
        rooms["tensor memory"] = limits.tensor_memory // tensor_memory
    bound = min(rooms, key=lambda name: rooms[name])
    return rooms[bound], bound


def collect(archs: list[int], jobs: int, only: str = "", sample: bool = False) -> list[Resources]:
    """Reports on configurations whose file or name contains `only`, in parallel processes.

    Args:
        sample: of each file for each architecture only one, another one from one to the next.
    """
    if INTERPRETED:
        raise ModeconnError(
            "TRITON_INTERPRET is set, and the interpreter's kernels cannot be compiled: unset it"
        )
    work: list[tuple[str, int, int]] = []
    for file, place in cases():
        case = CASES[file]()[place]
        if only in file or only in case.name:
            work += [(file, place, arch) for arch in archs if arch in case.archs]
    if sample:
        work = [
            _one_of(work, file, arch) for file, arch in dict.fromkeys((f, a) for f, _, a in work)
        ]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(resources, *zip(*work))) if work else []


def _one_of(work: list[tuple[str, int, int]], file: str, arch: int) -> tuple[str, int, int]:
    own = [each for each in work if (each[0], each[2]) == (file, arch)]
    return own[sorted(LIMITS).index(arch) * (len(own) // 2) % len(own)]


def digest() -> str:
    """Returns what the report depends on, as a digest: the kernels, their cases, Triton's version.

    Comments, docstrings and layout do not count.
    """
    root = Path(__file__).resolve().parent.parent
    key = hashlib.sha256(triton.__version__.encode())
    for file in [*sorted((root / "kernels").glob("*.py")), root / "bench" / "aot_cases.py"]:
        key.update(b"\0".join([b"", file.name.encode(), *_words(file.read_text(encoding="utf-8"))]))
    return key.hexdigest()[:32]


def _words(code: str) -> list[bytes]:
    """Returns the tokens of a Python source without comments, docstrings and layout."""
    layout = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    words: list[bytes] = []
    begins = True  # a statement
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NEWLINE:
            begins = True
        elif token.type not in layout:
            if not (begins and token.type == tokenize.STRING):
                words.append(token.string.encode())
            begins = False
    return words


def table(rows: list[Resources]) -> str:
    """Formats the rows in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for r in rows:
        line = f"| {r.name} | {r.arch} | {r.warps} × {r.stages} "
        if r.failure:
            lines.append(f"{line}| | | | | | does not compile: {r.failure} |")
            continue
        kinds = ", ".join(f"{count} {name}" for name, count in r.instructions.items())
        line += f"| {r.registers} | {r.spilled} | {r.shared / 1024:.1f} "
        lines.append(f"{line}| {r.blocks} | {r.bound} | {kinds} |")
    return "\n".join(lines)


def about(report: str) -> str:
    """Returns a report with what it is of in front."""
    return f"Triton {triton.__version__}. Digest of the kernels: {digest()}.\n\n{report}"


def written_into(text: str, report: str) -> str:
    """Returns the document with the report between its two marks.

    Raises:
        ModeconnError: the document does not have both marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ModeconnError(
            f"the document has no place for the report: expected the lines {BEGIN} and {END}"
        )
    return f"{before}{BEGIN}\n{report}\n{END}{after}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python bench/kernel_report.py",
        description="compile the GPU kernels, without a GPU, and report the resources they take",
    )
    parser.add_argument(
        "--archs",
        nargs="+",
        type=int,
        choices=LIMITS,
        default=list(LIMITS),
        help="compute capabilities (default: all)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="configurations with this in their file's or their own name",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)"
    )
    parser.add_argument(
        "--sample", action="store_true", help="one configuration of each file and architecture"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the table between its marks in this document",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        rows = collect(options.archs, options.jobs, options.only, options.sample)
        report = table(rows)
        if options.write:
            document = options.write.read_text(encoding="utf-8")
            document = written_into(document, about(report))
            options.write.write_text(document, encoding="utf-8")
    except ModeconnError as error:
        print(f"kernel report: {error}", file=sys.stderr)
        return 2
    if options.json:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(report)
    problems: list[str] = []
    for row in rows:
        problems += row.problems
    verdict = "\n".join(problems) or f"{len(rows)} configurations: none spills, all fit"
    print(verdict, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
