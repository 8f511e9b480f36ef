"""The README's code runs, and its first screen is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzz.check import digest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_is_on_the_first_screen():
    before = README[: README.index("```python")].count("\n") + 1
    assert before + BLOCKS[0].count("\n") <= 45


def test_the_code_runs_block_by_block(capsys):
    pytest.importorskip("sklearn")
    first, training = BLOCKS
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(first, "README.md", "exec"), names)
    assert "101 points" in capsys.readouterr().out
    ends = digest([*names["a"].parameters(), *names["b"].parameters()])
    middle = digest(names["path"].at(0.5).values())
    exec(compile(training, "README.md", "exec"), names)
    trained, on_the_line = map(float, re.findall(r"\d\.\d+", capsys.readouterr().out))
    assert trained < 0.7 * on_the_line
    assert digest([*names["a"].parameters(), *names["b"].parameters()]) == ends
    assert digest(tensor.detach() for tensor in names["middle"].values()) != middle
    assert all(tensor.is_leaf and tensor.grad is not None for tensor in names["middle"].values())


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
