"""The scripts in examples/, each run as a program in an empty folder."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
# A line of each script's output, or how one begins.
EXPECTED = {
    "two_networks": "barrier in loss ",
    "own_model": "t = 1.0  loss ",
    "plane": "441 points in 1 pass",
    "batch_norm": "passes over the data: 2",
    "connect": "verified: loss at most ",
}
LINES = 60


def test_every_example_is_listed():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    if name == "plane":
        pytest.importorskip("matplotlib")
    script = FOLDER / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= LINES
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert any(line.startswith(EXPECTED[name]) for line in printed.splitlines()), printed
    assert [path.name for path in tmp_path.iterdir()] == ["plane.png"] * (name == "plane")
