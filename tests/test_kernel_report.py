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


@pytest.mark.slow
def test_no_default_configuration_spills_and_tensor_cores_are_used(tmp_path):
    if missing_tools():
        pytest.skip(f"Triton comes without {missing_tools()} here")
    file = tmp_path / "report.json"
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "bench" / "kernel_report.py"),
            "--archs",
            *map(str, ARCHS),
            "--json",
            file,
        ],
        # compiled once until a kernel changes
        env={**kept, "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))
    made = [(case.name, arch) for case in defaults() for arch in ARCHS if arch in case.archs]
    assert [(row["name"], row["arch"]) for row in rows] == made
    for row in rows:
        assert row["spilled"] == 0 and row["blocks"] >= 1, row
        if row["tensor_cores"]:
            assert {80: "HMMA", 90: "HGMMA"}[row["arch"]] in row["instructions"], row


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
