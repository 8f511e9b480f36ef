"""Bad input to the command line: one clear line before the work, and no file left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cli_cases
from cli_cases import DATA, LINE, TRAIN, run
from modeconn import models
from modeconn.parameters import state

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here


# ---------------------------------------------------------------- bad input

AB = ("a.safetensors", "b.safetensors")
BAD = [
    # the command line itself
    (("evalute",), "invalid choice: 'evalute'"),
    ((*LINE, "--points", "0"), "'0' is not a whole number of at least 1"),
    ((*LINE, "--points", "many"), "'many' is not a whole number"),
    ((*LINE, "--at", "0,half"), "'0,half' is not numbers separated by commas"),
    ((*LINE, "--at", "0,nan"), "t must be finite"),
    ((*LINE, "--points", "3", "--at", "0,1"), "not allowed with argument --points"),
    ((*LINE, "--pointz", "3"), "unrecognized arguments: --pointz"),
    (("evaluate", *AB), "the following arguments are required: --data"),
    # which checkpoints
    (
        ("evaluate", "a.safetensors", *DATA),
        "a line goes through 2 checkpoints, got 1: a.safetensors",
    ),
    (
        ("evaluate", *AB, "c.safetensors", "--path", "line", *DATA),
        "a line goes through 2 checkpoints, got 3",
    ),
    (("evaluate", *AB, "--path", "plane", *DATA), "a plane goes through 3 checkpoints, got 2"),
    (
        ("evaluate", *AB, "c.safetensors", "--path", "plane", "--at", "0,1", *DATA),
        "--at takes points of a curve",
    ),
    (
        ("evaluate", "a.safetensors", "absent.safetensors", *DATA),
        "absent.safetensors: no such file",
    ),
    (("evaluate", "a.safetensors", ".", *DATA), ".: a folder, not a checkpoint"),
    (
        ("evaluate", "a.safetensors", "cut.safetensors", *DATA),
        "cut.safetensors: truncated or damaged",
    ),
    (("evaluate", "a.safetensors", "empty.safetensors", *DATA), "empty.safetensors"),
    (
        ("evaluate", "a.safetensors", "pickle.pt", *DATA),
        "pickle.pt: a whole module",
    ),
    (("evaluate", "a.safetensors", "nan.safetensors", *DATA), "nan.safetensors"),
    (
        ("evaluate", "a.safetensors", "wider.safetensors", *DATA),
        "wider.safetensors does not fit mlp:64-16-10",
    ),
    # the model
    ((*LINE, "--model", "mlp:64-17-10"), "a.safetensors does not fit mlp:64-17-10"),
    ((*LINE, "--model", "mlp:64-x-10"), "'x' is not a width"),
    ((*LINE, "--model", "no.such:model"), "cannot be imported"),
    (
        ("evaluate", "wider.safetensors", "wider.safetensors", *DATA),
        "--model is missing, and wider.safetensors does",
    ),
    (
        ("evaluate", "factory.safetensors", "a.safetensors", *DATA),
        "--model is missing, and factory.safetensors does",
    ),
    # data
    (("evaluate", *AB, "--data", "didgits"), "'didgits' is unknown"),
    (("evaluate", *AB, "--data", "mnist", "--data-root", "nowhere"), "nowhere"),
    ((*LINE, "--limit", "0"), "'0' is not a whole number of at least 1"),
    ((*LINE, "--mean", "1,2,3"), "mean"),
    ((*LINE, "--std", "0"), "std"),
    ((*LINE, "--split", "validation"), "invalid choice: 'validation'"),
    # how
    ((*LINE, "--loss", "hinge"), "hinge"),
    ((*LINE, "--metrics", "loss,accuracy"), "accuracy"),
    ((*LINE, "--metrics", ","), "metrics"),
    ((*LINE, "--backend", "abacus"), "abacus"),
    ((*LINE, "--precision", "float8"), "precision is 'float8'"),
    ((*LINE, "--device", "abacus:0"), "'abacus:0'"),
    # where to
    ((*LINE, "--plot", "r.bmp"), "--plot r.bmp: the name must end in .png, .svg, .pdf"),
    ((*LINE, "--plot", "absent/r.png"), "--plot absent/r.png: the folder absent does not exist"),
    ((*LINE, "--save", "r.csv"), "--save r.csv: the name must end in .npz or .json"),
    ((*LINE, "--json", "."), "--json .: is a folder"),
    (
        (*LINE, "--json", "a.safetensors"),
        "--json a.safetensors: would overwrite the input a.safetensors",
    ),
    ((*LINE, "--json", "r.json", "--save", "r.json"), "would overwrite the file of --save"),
    # the other commands
    (("explain", "a.safetensors", *DATA), "a line goes through 2 checkpoints"),
    (("inspect", "absent.safetensors"), "absent.safetensors: no such file"),
    (("inspect", "cut.safetensors"), "cut.safetensors: truncated or damaged"),
    (("inspect", "a.safetensors", "--json", "absent/i.json"), "the folder absent does not exist"),
    (("demo", "--plot", "r.gif"), "--plot r.gif: the name must end in"),
    ((*TRAIN, "--out", "t.pt"), "--out t.pt: the name must end in .safetensors"),
    ((*TRAIN, "--out", "absent/t.safetensors"), "the folder absent does not exist"),
    ((*TRAIN, "--out", "t.safetensors", "--resume"), "t.safetensors.training: no such file"),
    ((*TRAIN, "--out", "t.safetensors", "--lr", "-1"), "lr is -1.0"),
    ((*TRAIN, "--out", "t.safetensors", "--seed", "-1"), "seed is -1"),
    ((*TRAIN, "--out", "t.safetensors", "--device", "abacus"), "--device abacus"),
    (
        ("train", "--model", "mlp:63-10", *DATA, "--out", "t.safetensors"),
        r"inputs of shape [1, 8, 8] per sample",
    ),
    (("train", "--model", "mlp:64-9", *DATA, "--out", "t.safetensors"), "labels run from 0 to 9"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    BAD,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line_before_the_work_and_leaves_no_file(
    here: Path, capsys, arguments, message
):
    before = sorted(here.rglob("*"))
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" or arguments[0] == "train"
    assert "epoch" not in printed.out
    assert printed.err.startswith("modeconn: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert sorted(here.rglob("*")) == before


def test_data_that_does_not_fit_the_model_is_found(here: Path, capsys):
    state.save(models.build("mlp:63-10").state_dict(), "small.safetensors", {"model": "mlp:63-10"})
    assert run("evaluate", "small.safetensors", "small.safetensors", *DATA, "--save", "r.npz") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("modeconn: error: ")
    assert printed.err.count("\n") == 1
    assert not Path("r.npz").exists()


@pytest.mark.usefixtures("here")
def test_a_folder_without_write_permission_is_found_first(capsys, monkeypatch):
    Path("locked").mkdir()
    # Not by its mode: the superuser, as whom tests may run, can write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: (str(path), mode) != ("locked", os.W_OK))
    assert run(*LINE, "--json", "locked/r.json") == 1
    assert "the folder locked is not writable" in capsys.readouterr().err


def test_a_write_that_fails_leaves_no_file(here: Path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(here.iterdir())
    monkeypatch.setattr("os.fsync", full)
    assert run(*LINE, "--points", "2", "--plot", "r.png") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(here.iterdir()) == before
