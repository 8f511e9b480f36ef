"""The script for the first GPU that turns up, run dry on a CPU: every part of it, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


def check(*options: str) -> tuple[int, dict, str]:
    """Run the script; its exit code, report and output."""
    folder = Path(options[options.index("--out") + 1])
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_check.sh"), "--dry-run", *options],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    (file,) = folder.glob("*.json")
    return done.returncode, json.loads(file.read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_rates_and_kernels(tmp_path):
    code, report, output = check(
        "--out", str(tmp_path), "--only", "build,machine,kernels", "--seconds", "200"
    )
    assert code == 0, output
    cases = {(r["part"], r["case"]): r for r in report["results"]}
    assert {"copy", "float32", "tf32", "bf16", "device"} == {
        case for part, case in cases if part == "machine"
    }
    kernels = [r for (part, _), r in cases.items() if part == "kernels"]
    assert len(kernels) > 10
    assert all(r["ms"] > 0 and r["floor_ms"] > 0 for r in kernels)
    assert output.strip().splitlines()[-1].startswith("0 failed")


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import sys\n"
        "if len(sys.argv) > 1 and sys.argv[1] == 'machine':\n    import os; os._exit(9)\n"
    )
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import argparse

        import gpu_check
    finally:
        sys.path.remove(str(ROOT / "bench"))
    options = argparse.Namespace(dry_run=True, seconds=60.0)
    run = gpu_check.Check(gpu_check.checkout(_folder(tmp_path)), options)
    run.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "broken"), run.env["PYTHONPATH"]])
    run.run("machine")
    run.begin_build()
    assert [("error" in r, r["part"]) for r in run.results] == [(True, "machine"), (False, "build")]
    assert "exit code 9" in run.results[0]["error"]
    assert any("FAILED" in line for line in gpu_check.table(run.results))


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    return folder
