"""Commands under faults: kills, closed streams, escape codes, pipes, locks."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import modeconn as mc
from modeconn import cli
from modeconn.files.writing import locked
from modeconn.models import build
from modeconn.parameters import state


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    """Two checkpoints that say which model they are of."""
    files = []
    for seed in (1, 2):
        files.append(str(tmp_path_factory.mktemp("ends") / f"{seed}.safetensors"))
        torch.manual_seed(seed)
        state.save(build("mlp:64-16x2-10").state_dict(), files[-1], {"model": "mlp:64-16x2-10"})
    return files


def line(ends: list[str], *more: str) -> list[str]:
    return ["evaluate", *ends, "--data", "digits", "--limit", "100", "--points", "3", *more]


def connecting(ends: list[str], folder: Path) -> list[str]:
    data = ["--data", "digits", "--limit", "100"]
    return ["connect", *ends, *data, "--target", "9", "--out", str(folder), "--quiet"]


def test_connect_finishes_after_a_kill_in_its_first_write_or_before_cleaning_up(
    ends: list[str], tmp_path: Path, monkeypatch
):
    folder, partial = tmp_path / "c", tmp_path / "c.partial"
    partial.mkdir()
    (partial / ".search.json.1234abcd.tmp").write_text("{")

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modeconn.cli.connect.remove_folder", killed)
        assert cli.main(connecting(ends, folder)) == 130
    assert folder.exists() and partial.exists()
    assert cli.main(connecting(ends, folder)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert mc.Connection.load(folder).model == "mlp:64-16x2-10"
    assert cli.main(connecting(ends, folder)) == 2  # now it is a folder of the user's


def test_escape_codes_in_names_are_shown(ends: list[str], tmp_path: Path, capsys):
    file = tmp_path / "\x1b[2Ja.npz"
    assert cli.main(line(ends, "--save", str(file))) == 0
    assert cli.main(line([f"{tmp_path}/\x1b]0;x\x07none", ends[0]])) == 2
    assert cli.main(["inspect", ends[0], "--\x1b[31m"]) == 2
    printed = capsys.readouterr()
    assert "wrote" in printed.out and r"\x1b[2Ja.npz" in printed.out
    assert r"\x1b]0;x\x07none" in printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize("closed", [None, "closed"])
def test_without_a_standard_output_the_work_is_done(
    ends: list[str], tmp_path: Path, monkeypatch, capsys, closed: str | None
):
    stream = None
    if closed:
        stream = io.StringIO()
        stream.close()
    file = tmp_path / "r.npz"
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(line(ends, "--save", str(file))) == 0
    assert cli.main(line(ends, "--json", "-")) == 1
    assert sys.stdout is stream
    assert "standard output is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(line(ends, "--save", str(file))) == 0
    assert mc.PathResult.load(file).samples == 100


def test_sigterm_is_taken_as_an_interrupt(ends: list[str], tmp_path: Path, monkeypatch, capsys):
    import signal

    from modeconn.evaluation import resume

    done, before = resume.Stage.done, signal.getsignal(signal.SIGTERM)

    def terminated(self, sums) -> None:
        done(self, sums)
        os.kill(os.getpid(), signal.SIGTERM)

    file = tmp_path / "r.npz"
    with monkeypatch.context() as patch:
        patch.setattr(resume.Stage, "done", terminated)
        assert cli.main(line(ends, "--save", str(file), "--batch-size", "50")) == 143
    text = capsys.readouterr().err
    assert f"what is done is in {file}.unfinished: the same command goes on from there" in text
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz.unfinished"]
    assert cli.main(line(ends, "--save", str(file), "--batch-size", "50")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_an_interrupt_says_what_was_written(ends: list[str], tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "r.npz"

    def interrupted(result) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeconn.cli.output.print_result", interrupted)
    assert cli.main(line(ends, "--save", str(file))) == 130
    assert f"interrupted; written: {file}" in capsys.readouterr().err


def test_json_onto_a_pipe_goes_into_it(ends: list[str], tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert cli.main(line(ends, "--json", str(pipe), "--quiet")) == 0
    reader.join()
    assert pipe.is_fifo() and json.loads(received[0])["samples"] == 100


def test_a_second_command_on_one_file_is_told_so(ends: list[str], tmp_path: Path, capsys):
    file = tmp_path / "r.npz"
    with locked(file):
        assert cli.main(line(ends, "--save", str(file))) == 2
    assert "is being written by another command" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
