"""Commands and evaluations under torchrun: processes that share one, and a rank that is killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import modeconn as mc

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs signals")]


def torchrun(ranks: int, *command: str) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, f"--nproc-per-node={ranks}", *command]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    from modeconn.models import build
    from modeconn.parameters.state import save

    folder, files = tmp_path_factory.mktemp("networks"), []
    for seed in (0, 1):
        import torch

        torch.manual_seed(seed)
        files.append(str(folder / f"{seed}.safetensors"))
        save(build("mlp:64-16-10").state_dict(), files[-1])
    return files


def test_a_command_in_two_processes(checkpoints, tmp_path: Path):
    command = ["-m", "modeconn", "evaluate", *checkpoints, "--model", "mlp:64-16-10"]
    command += ["--data", "digits", "--points", "3", "--save"]
    done = subprocess.run(
        torchrun(2, *command, str(tmp_path / "two.npz"), "--json", "-"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # once, by the first rank alone
    assert printed["info"]["ranks"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["two.npz"]
    two = mc.PathResult.load(tmp_path / "two.npz")
    from modeconn.cli import main

    assert main([*command[2:], str(tmp_path / "one.npz"), "--quiet"]) == 0
    one = mc.PathResult.load(tmp_path / "one.npz")
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-9)
    assert two.samples == one.samples


# Each rank writes its process id; the batches go on for longer than the test.
KILLED = """
import os, sys, time
import torch, torch.distributed as dist
import modeconn as mc

dist.init_process_group("gloo")
net = lambda: torch.nn.Linear(3, 2)
a, b = net(), net()
for one, other in ((a, 0.1), (b, 0.2)):
    for p in one.parameters():
        p.data.fill_(other)

def batches():
    open(f"{sys.argv[1]}/{dist.get_rank()}", "w").write(str(os.getpid()))
    for number in range(10_000):
        time.sleep(0.01)
        yield torch.ones(4, 3), torch.zeros(4, dtype=torch.long)

mc.evaluate(a, mc.Line(a, b), batches(), 3, batch_size=4, progress=False)
"""


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path):
    # Started by hand: torchrun would end the others itself, at times before they say why they end.
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in range(2):
        variables = {**os.environ, **place, "RANK": str(rank), "WORLD_SIZE": "2"}
        with (tmp_path / f"said{rank}").open("w") as stream:
            command = [sys.executable, str(script), str(tmp_path)]
            ranks.append(subprocess.Popen(command, stderr=stream, env=variables))
    try:
        files = [tmp_path / "0", tmp_path / "1"]
        until = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < until and ranks[0].poll() is None
            time.sleep(0.1)
        ranks[1].kill()
        assert ranks[0].wait(timeout=10)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert "a rank other than 0 is gone" in (tmp_path / "said0").read_text()


def test_other_commands_are_for_one_process(monkeypatch, capsys):
    from modeconn.cli import main

    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert main(["demo"]) == 2
    assert "modeconn demo runs in one process" in capsys.readouterr().err
