"""Resources of the kernels, compiled without a GPU: none spills, all fit, tensor cores are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from modeconn.errors import ModeconnError
from modeconn.kernels.launch import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    import kernel_report as report
    from aot_cases import CASES, AotCase
    from kernel_report import LIMITS, Resources, blocks_at_a_time, table, written_into
finally:
    sys.path.remove(str(ROOT / "bench"))

DOCUMENT = ROOT / "docs" / "kernels.md"
ARCHS = (80, 90)
TOOLS = ("ptxas", "cuobjdump", "nvdisasm")
GOOD = Resources("path_x", "x", 80, 4, 3, True, 96, 0, 32768, 4, "shared memory", {"HMMA": 96})


def missing_tools() -> str:
    """The tools of Triton's package that are not there."""
    paths = {name: getattr(triton.knobs.nvidia, name).path for name in TOOLS}
    return ", ".join(name for name, path in paths.items() if not Path(path).is_file())


def rows_of_the_document() -> dict[tuple[str, int], list[str]]:
    """The cells of the document's table, by configuration and architecture."""
    text = DOCUMENT.read_text(encoding="utf-8").partition(report.BEGIN)[2].partition(report.END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], int(row[1])): row[2:] for row in rows}


def test_the_document_is_of_these_kernels():
    """The whole report is compiled where a kernel changes, and written down with their digest."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if triton.__version__ not in text.partition(report.BEGIN)[2]:
        pytest.skip("the report is of another version of Triton")
    assert report.digest() in text, "the kernels have changed: `make kernel-report`"


def test_no_default_configuration_spills_and_tensor_cores_are_used():
    rows = rows_of_the_document()
    made = [(case.name, arch) for case in defaults() for arch in LIMITS if arch in case.archs]
    assert sorted(rows) == sorted(made)
    for case in defaults():
        for arch in case.archs:
            _, _, spilled, _, blocks, _, instructions = rows[case.name, arch]
            assert spilled == "0" and int(blocks) >= 1, (case.name, arch)
            if case.tensor_cores:
                used = {80: "HMMA", 90: "HGMMA", 100: "MMA"}[arch]
                assert used in instructions, (case.name, arch)


@pytest.mark.slow
def test_the_document_is_what_the_compiler_makes(tmp_path):
    """One configuration of each file on two architectures, compiled anew."""
    if missing_tools():
        pytest.skip(f"Triton comes without {missing_tools()} here")
    file = tmp_path / "report.json"
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, str(ROOT / "bench" / "kernel_report.py"), "--sample"]
    done = subprocess.run(
        [*script, "--archs", *map(str, ARCHS), "--json", file],
        # compiled once until a kernel changes
        env={**kept, "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [Resources(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    assert {row.file for row in rows} == set(CASES) and len(rows) == len(ARCHS) * len(CASES)
    text = DOCUMENT.read_text(encoding="utf-8")
    if triton.__version__ in text.partition(report.BEGIN)[2]:
        assert all(line in text for line in table(rows).splitlines())


def test_the_digest_is_of_code_alone(tmp_path):
    code = "def f(x):\n    return x + 1\n"
    same = '"""Words."""\n\n\ndef f(x):\n    """More."""\n    return x + 1  # a comment\n'
    assert report._words(code) == report._words(same)
    assert report._words(code) != report._words(code.replace("1", "2"))


def defaults() -> list[AotCase]:
    """All default configurations."""
    return [CASES[file]()[place] for file, place in report.cases()]


def test_every_kernel_has_default_configurations():
    with_kernels = {file.stem for file in (ROOT / "kernels").glob("path_*.py")}
    assert {file for file, _ in report.cases()} >= with_kernels
    for arch in LIMITS:
        names = [case.name for case in defaults() if arch in case.archs]
        assert len(set(names)) == len(names)


def test_the_document_has_a_place_for_the_table():
    assert table([GOOD]) in written_into(DOCUMENT.read_text(encoding="utf-8"), table([GOOD]))


@pytest.mark.parametrize(
    "registers, warps, shared, tensor_memory, arch, expected",
    [
        (96, 4, 32768, 0, 80, (4, "shared memory")),
        (255, 8, 65536, 0, 80, (1, "registers")),
        (64, 4, 49152, 0, 90, (4, "shared memory")),
        (32, 4, 0, 0, 90, (16, "registers")),
        (16, 8, 0, 0, 90, (8, "warps")),
        (16, 1, 0, 0, 90, (32, "blocks")),
        (128, 4, 8192, 256, 100, (2, "tensor memory")),
        (128, 4, 170 << 10, 0, 80, (0, "shared memory")),
        (128, 4, 8192, 800, 100, (0, "tensor memory")),
    ],
)
def test_blocks_at_a_time(registers, warps, shared, tensor_memory, arch, expected):
    assert blocks_at_a_time(LIMITS[arch], registers, warps, shared, tensor_memory) == expected


def test_problems_are_named():
    bad = Resources(
        "path_x", "x", 90, 4, 3, True, 255, 24, 1 << 20, 0, "shared memory", {"FFMA": 9}
    )
    assert GOOD.problems == []
    assert bad.problems == [
        "path_x: x on sm_90 spills 24 bytes",
        "path_x: x on sm_90 does not fit: shared memory",
        "path_x: x on sm_90 has no tensor-core instruction",
    ]


def test_what_does_not_compile_is_a_problem_and_a_row():
    failed = Resources("path_x", "x", 100, 4, 3, True, failure="PassManager::run failed")
    assert failed.problems == ["path_x: x on sm_100 does not compile: PassManager::run failed"]
    assert "| x | 100 | 4 × 3 | | | | | | does not compile: PassManager::run failed |" in table(
        [failed]
    )


def test_the_table_goes_between_its_marks():
    text = written_into(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", table([GOOD]))
    assert text.startswith(f"before\n{report.BEGIN}\n| kernel |") and text.endswith(
        f"\n{report.END}\nafter\n"
    )
    assert (
        "| x | 80 | 4 × 3 | 96 | 0 | 32.0 | 4 | shared memory | 96 HMMA |" in text
        and "old" not in text
    )
    with pytest.raises(ModeconnError, match="no place for the report"):
        written_into("a document without marks", "table")


def test_the_interpreter_is_refused(capsys):
    if not report.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set")
    assert report.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
