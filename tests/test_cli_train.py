"""`modeconn train`: what it prints and writes, and what Ctrl-C keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import cli_cases
from cli_cases import TRAIN, plain_loss, run, started
from modeconn.parameters import state

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here


def test_train_prints_epochs_and_the_result(here: Path, capsys):
    assert (
        run(*TRAIN, "--epochs", "2", "--seed", "7", "--out", "new.safetensors", "--json", "t.json")
        == 0
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "epoch 1/2  loss " in printed.out
    assert "epoch 2/2  loss " in printed.out
    assert "2 epochs in " in printed.out
    content = json.loads(Path("t.json").read_text())
    assert content["loss"] == pytest.approx(plain_loss(state.load("new.safetensors")), rel=1e-4)
    assert content["test_loss"] > 0
    assert [epoch["epoch"] for epoch in content["history"]] == [1, 2]
    assert content["seed"] == 7
    (row,) = [line for line in printed.out.splitlines() if line.startswith("train ")]
    assert f"{content['loss']:.4g}" in row


def test_train_with_the_same_seed_gives_the_same_file(here: Path):
    for name, seed in (("one", "1"), ("two", "1"), ("other", "2")):
        assert (
            run(*TRAIN, "--epochs", "2", "--seed", seed, "--out", f"{name}.safetensors", "-q") == 0
        )
    one, two, other = (state.load(f"{name}.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_ctrl_c_saves_the_training_and_resume_completes_it(here: Path):
    steps = ("--epochs", "20", "--to-the-end", "--batch-size", "2", "--seed", "5")
    process = started(here, *TRAIN, *steps, "--out", "t.safetensors")
    while "epoch  2/20" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert err.count("\n") == 1
    assert err.startswith(
        "modeconn: interrupted; t.safetensors.training keeps the training up to epoch "
    )
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    assert not Path("t.safetensors").exists()

    assert run(*TRAIN, *steps, "--out", "t.safetensors", "--resume", "--quiet") == 0
    assert not Path("t.safetensors.training").exists()
    with safe_open("t.safetensors", framework="pt") as archive:
        assert archive.metadata()["epochs"] == "20"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_and_takes_it_away(here: Path):
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [
        sys.executable,
        "-m",
        "modeconn",
        *TRAIN,
        "--epochs",
        "30",
        "--to-the-end",
        "--out",
        "t.safetensors",
    ]
    with subprocess.Popen(
        command, cwd=here, stdout=follower, stderr=follower, close_fds=True
    ) as process:
        os.close(follower)
        chunks = []
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        os.close(leader)
        assert process.wait(timeout=600) == 0
    text = b"".join(chunks).decode()
    assert "/30 [" in text
    assert "epoch 1/30" not in text
    last = text.replace("\r\n", "\n").rpartition("\r")[2]
    assert last.startswith("30 epochs in ")
