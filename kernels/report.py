"""What each kernel's default configurations take of a GPU, found without one: compiled ahead of time, machine code read.

    python -m modeconn.kernels.report [--archs 80 90 100] [--json FILE] [--write docs/kernels.md]
    (make kernel-report)

Per configuration and architecture: registers of a thread and bytes that it keeps in local memory
for want of them, shared memory of a block, how many blocks a multiprocessor holds at a time and
what bounds them (from the limits in NVIDIA's CUDA programming guide), tensor-core and other telling
instructions. Nothing is run. Exit code 1 if a configuration spills, does not fit, or lacks the
tensor-core instructions that it should have.

Triton brings the compiler and the disassemblers along. The interpreter's kernels cannot be
compiled, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import modeconn.kernels
from modeconn.errors import ModeconnError
from modeconn.kernels.launch import INTERPRETED, AotCase, triton

BEGIN, END = "<!-- make kernel-report: begin -->", "<!-- make kernel-report: end -->"

# Tensor-core instructions of Ampere, Hopper and Blackwell for floating-point operands.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
# Others that tell how a kernel works: multiply-adds on CUDA cores (single and paired), copies to
# shared memory in the background, local memory.
TELLING = ("FFMA", "FFMA2", "LDGSTS", "UTMALDG", "LDL", "STL")


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; `block` is the most shared memory of one block, of which the driver keeps 1 KiB more."""

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
    """A configuration compiled for one architecture.

    Attributes:
        file: the kernel's.
        spilled: bytes per thread in local memory.
        shared: bytes per block.
        blocks: at a time on a multiprocessor.
        bound: what keeps them from being more.
        instructions: how many of each telling kind the machine code has.
        tensor_cores: whether it should have some of theirs.
        failure: why Triton cannot compile it; the other numbers are 0 then.
    """

    file: str
    name: str
    arch: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    bound: str
    instructions: dict[str, int]
    tensor_cores: bool
    failure: str = ""

    @property
    def problems(self) -> list[str]:
        """What is wrong with the configuration, in words."""
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
    """Every kernel's default configurations: the file, and the place in its aot_cases()."""
    files = sorted(module.name for module in pkgutil.iter_modules(modeconn.kernels.__path__))
    return [(file, place) for file in files for place in range(len(configurations(file)))]


def configurations(file: str) -> list[AotCase]:
    """The default configurations of a file's kernels; none for a file without kernels."""
    find = getattr(importlib.import_module(f"modeconn.kernels.{file}"), "aot_cases", list)
    found: list[AotCase] = find()
    return found


def resources(file: str, place: int, arch: int) -> Resources:
    """Compile a configuration for an architecture and read what it takes.

    Raises:
        ModeconnError: Triton comes without its disassembler, or the configuration's arguments are
            not the kernel's.
    """
    case = configurations(file)[place]
    try:
        kernel = _compiled(case, arch)
    except RuntimeError as error:  # of the compiler itself
        failure = str(error).splitlines()[0]
        return Resources(
            file,
            case.name,
            arch,
            case.num_warps,
            case.num_stages,
            0,
            0,
            0,
            0,
            "",
            {},
            case.tensor_cores,
            failure,
        )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", binary)
    registers, stack = (
        max(map(int, re.findall(rf"\b{what}:(\d+)", usage))) for what in ("REG", "STACK")
    )
    mnemonics = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE
    )
    # Kernels whose warps have different tasks are launched with more of them than were asked for.
    threads = re.search(r"^\.(?:reqntid|maxntid)\s+(\d+)", kernel.asm["ptx"], re.MULTILINE)
    warps = int(threads[1]) // 32 if threads else case.num_warps
    shared = kernel.metadata.shared
    blocks, bound = blocks_at_a_time(
        LIMITS[arch], registers, warps, shared, getattr(kernel.metadata, "tmem_size", None) or 0
    )
    counts = {name: mnemonics.count(name) for name in TENSOR + TELLING if name in mnemonics}
    return Resources(
        file,
        case.name,
        arch,
        warps,
        case.num_stages,
        registers,
        stack,
        shared,
        blocks,
        bound,
        counts,
        case.tensor_cores,
    )


def _compiled(case: AotCase, arch: int) -> Any:
    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):  # within its autotuner
        kernel = kernel.fn
    unknown = {*case.signature, *case.constexprs} ^ set(kernel.arg_names)
    if unknown:
        raise ModeconnError(
            f"{case.name}: {', '.join(sorted(unknown))} is no argument of {kernel.__name__}, or has no type"
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
    """How many blocks a multiprocessor holds, and what keeps them from being more."""
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


def collect(archs: list[int], jobs: int, only: str = "") -> list[Resources]:
    """All configurations whose file or name contains `only`, in processes side by side."""
    if INTERPRETED:
        raise ModeconnError(
            "TRITON_INTERPRET is set, and the interpreter's kernels cannot be compiled: unset it"
        )
    wanted = [
        (file, place)
        for file, place in cases()
        if only in file or only in configurations(file)[place].name
    ]
    work = [
        (file, place, arch)
        for file, place in wanted
        for arch in archs
        if arch in configurations(file)[place].archs
    ]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(resources, *zip(*work))) if work else []


def table(rows: list[Resources]) -> str:
    """The rows in Markdown."""
    lines = [
        "| kernel | sm | warps × stages | registers | spilled bytes | shared KiB | blocks/SM | bound by | instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.failure:
            lines.append(
                f"| {r.name} | {r.arch} | {r.warps} × {r.stages} | | | | | | does not compile: {r.failure} |"
            )
            continue
        kinds = ", ".join(f"{count} {name}" for name, count in r.instructions.items())
        lines.append(
            f"| {r.name} | {r.arch} | {r.warps} × {r.stages} | {r.registers} | {r.spilled} | {r.shared / 1024:.1f} "
            f"| {r.blocks} | {r.bound} | {kinds} |"
        )
    return "\n".join(lines)


def written_into(text: str, report: str) -> str:
    """A document with what stands between the two marks replaced.

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


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeconn.kernels.report",
        description="what the kernels take of a GPU, without one",
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the table between its marks in this document",
    )
    options = parser.parse_args(arguments)
    try:
        rows = collect(options.archs, options.jobs, options.only)
        if options.write:
            document = written_into(
                options.write.read_text(encoding="utf-8"),
                f"Triton {triton.__version__}.\n\n{table(rows)}",
            )
            options.write.write_text(document, encoding="utf-8")
    except ModeconnError as error:
        print(f"kernel report: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(
            json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )
    print(table(rows))
    problems = [problem for row in rows for problem in row.problems]
    print(
        "\n".join(problems) if problems else f"{len(rows)} configurations: none spills, all fit",
        file=sys.stderr,
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
