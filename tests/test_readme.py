"""The README's code runs, and its first screen is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_is_on_the_first_screen():
    before = README[: README.index("```python")].count("\n") + 1
    assert before + BLOCKS[0].count("\n") <= 45


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_the_code_runs(code, capsys):
    pytest.importorskip("sklearn")
    exec(compile(code, "README.md", "exec"), {})
    assert "101 points" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from modeconn.cli import main

    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^modeconn +(\w.*)", README, re.MULTILINE)
    assert len(commands) >= 10
    # the demo is tests/test_cli.py's, smaller
    for command in commands:
        assert command == "demo" or main(command.split()) == 0, command
    assert {"barrier.png", "plane.png", "best.safetensors"} <= {p.name for p in tmp_path.iterdir()}
