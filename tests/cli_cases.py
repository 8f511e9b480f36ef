"""Checkpoints on digits, and calls of the command line, for its tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeconn import models
from modeconn.cli import main
from modeconn.data import datasets
from modeconn.parameters import state

SPEC = "mlp:64-16-10"
LIMIT = "200"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three trained checkpoints, and some that are not fit for use."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate("abc"):
        arguments = [
            "--data",
            "digits",
            "--limit",
            LIMIT,
            "--epochs",
            "3",
            "--lr",
            "0.05",
            "--seed",
            str(seed),
        ]
        assert (
            main(
                [
                    "train",
                    "--model",
                    SPEC,
                    *arguments,
                    "--quiet",
                    "--out",
                    f"{folder}/{name}.safetensors",
                ]
            )
            == 0
        )
    good = state.load(folder / "a.safetensors")
    torch.save({"state_dict": good}, folder / "a.pt")
    state.save(
        {**good, "0.bias": good["0.bias"] * float("nan")},
        folder / "nan.safetensors",
        {"model": SPEC},
    )
    state.save(good, folder / "factory.safetensors", {"model": "torch.nn:Identity"})
    state.save({key: value.half() for key, value in good.items()}, folder / "half.safetensors")
    state.save(models.build("mlp:64-17-10").state_dict(), folder / "wider.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-10])
    (folder / "empty.safetensors").write_bytes(b"")
    torch.save(models.build(SPEC), folder / "pickle.pt")
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """The current folder: empty but for links to the checkpoints."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


DATA = ("--data", "digits", "--limit", LIMIT)
LINE = ("evaluate", "a.safetensors", "b.safetensors", *DATA)


def images(split: str = "train") -> datasets.Images:
    return datasets.load("digits", split=split, limit=int(LIMIT))


def plain_loss(parameters: dict[str, torch.Tensor], split: str = "train") -> float:
    """The mean loss, by a plain float64 pass."""
    model = models.build(SPEC).double()
    model.load_state_dict(parameters)
    inputs, targets = images(split).slice(0, int(LIMIT))
    return float(torch.nn.functional.cross_entropy(model(inputs.double()), targets).detach())


# ---------------------------------------------------------------- train

TRAIN = ("train", "--model", SPEC, *DATA, "--lr", "0.05")


def started(folder: Path, *arguments: str, encoding: str = "utf-8") -> subprocess.Popen[str]:
    """The command in a process of its own, with its output piped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-u", "-m", "modeconn", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
