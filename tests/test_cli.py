"""The command line: what it prints and writes, and what bad input and Ctrl-C do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from modeconn import models
from modeconn.backends import NAMES as BACKENDS
from modeconn.cli import COMMANDS, demo, main, output
from modeconn.connection.search import METHODS
from modeconn.data import datasets
from modeconn.evaluation.arguments import BUFFERS, PRECISIONS
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.result import PathResult
from modeconn.experiments.settings import NAMES as EXPERIMENTS
from modeconn.metrics import LOSSES, METRICS
from modeconn.parameters import state
from modeconn.parameters.paths import Bezier, Line, Plane, PolyChain

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


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", [command.__name__.rpartition(".")[2] for command in COMMANDS])
def test_help_ends_with_an_example(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"\nexample:\n  modeconn {command}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_without_arguments_the_commands_are_listed(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.splitlines() if re.match(r"    [a-z]", line)]
    assert listed == [command.__name__.rpartition(".")[2] for command in COMMANDS]
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("modeconn ")


def test_every_option_has_a_help_text():
    from argparse import ArgumentParser

    for command in COMMANDS:
        parsers = ArgumentParser().add_subparsers()
        command.add(parsers)
        (parser,) = parsers.choices.values()
        assert all(action.help for action in parser._actions), command.__name__


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("evaluate", [*LOSSES, *METRICS, *BACKENDS, *PRECISIONS, *BUFFERS, *datasets.SOURCES]),
        ("connect", METHODS),
        ("reproduce", EXPERIMENTS),
    ],
)
def test_help_names_all_that_can_be_chosen(command, names, capsys):
    assert run(command, "--help") == 0
    text = re.sub(r"-?\n +", lambda end: end[0][:1].strip(), capsys.readouterr().out)
    assert [name for name in names if name not in text] == []


# ---------------------------------------------------------------- evaluate


def test_evaluate_writes_what_the_library_computes(here: Path, capsys):
    assert (
        run(*LINE, "--points", "5", "--save", "r.npz", "--json", "r.json", "--plot", "r.png") == 0
    )
    saved = PathResult.load("r.npz")
    expected = evaluate(
        models.build(SPEC),
        Line("a.safetensors", "b.safetensors"),
        images(),
        points=5,
        progress=False,
    )
    np.testing.assert_array_equal(saved.t, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(saved.loss, expected.loss, rtol=1e-6)
    np.testing.assert_array_equal(saved.error, expected.error)
    content = json.loads(Path("r.json").read_text())
    assert content["values"]["loss"] == saved.loss.tolist()
    assert content["barrier"]["loss"] == saved.barrier()
    assert content["info"]["model"] == SPEC
    assert content["info"]["data"] == "digits train"
    assert content["info"]["normalization"] == images().normalization
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("loss  ")]
    where, highest = saved.highest("loss")
    for number in (saved.loss[0], saved.loss[-1], highest, where, saved.barrier()):
        assert f"{number:.4g}" in row
    assert "200 samples, 5 points, 1 pass over the data in " in printed.out
    assert "backend, cpu, float32" in printed.out
    assert lines[-3:] == ["wrote r.png", "wrote r.npz", "wrote r.json"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluate_agrees_with_a_plain_pass(here: Path, split):
    assert (
        run(
            *LINE,
            "--at",
            "0,0.3,1",
            "--split",
            split,
            "--precision",
            "float64",
            "--save",
            "r.npz",
            "-q",
        )
        == 0
    )
    result = PathResult.load("r.npz")
    path = Line("a.safetensors", "b.safetensors")
    for t, loss in zip(result.t, result.loss, strict=True):
        assert loss == pytest.approx(plain_loss(path.at(t), split), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "make", "points"),
    [
        ((), PolyChain, 101),
        (("--path", "bezier", "--points", "7"), Bezier, 7),
        (("--path", "polychain", "--points", "3"), PolyChain, 3),
        (("--path", "plane", "--points", "4"), None, 16),
    ],
)
def test_paths_through_three_checkpoints(here: Path, capsys, arguments, make, points):
    files = ["a.safetensors", "b.safetensors", "c.safetensors"]
    outputs = ["--save", "r.npz", "--plot", "r.svg"]
    assert run("evaluate", *files, *DATA, *arguments, *outputs, "--metrics", "loss") == 0
    result = PathResult.load("r.npz")
    assert len(result.t) == points
    assert list(result.values) == ["loss"]
    path = make(files) if make else Plane.through(*files)
    row = len(result.t) // 2
    assert result.loss[row] == pytest.approx(plain_loss(path.at(result.t[row])), rel=1e-4)
    assert Path("r.svg").read_text().startswith("<?xml")
    printed = capsys.readouterr().out
    assert ("lowest" in printed) == (make is None)
    if make is None:
        assert result.info["control_points"] == "[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]"


def test_evaluate_takes_half_precision(here: Path):
    options = ("--model", SPEC, *DATA, "--points", "3", "--quiet", "--save", "out.json")
    losses = []
    for first in ("half.safetensors", "a.safetensors"):
        assert run("evaluate", first, "b.safetensors", *options) == 0
        losses.append(PathResult.load("out.json").loss)
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_evaluate_recomputes_the_statistics(tmp_path: Path, monkeypatch):
    """From the training split, also where the test split is evaluated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norms_for_test.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    layers = [nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)]\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    try:
        nets = [models.build("norms_for_test:make") for _ in range(2)]
    finally:
        sys.modules.pop("norms_for_test", None)
    for name, net in zip("ab", nets):
        state.save(state.load(net), tmp_path / f"{name}.safetensors")
    options = (
        "--model",
        "norms_for_test:make",
        "--points",
        "3",
        "--buffers",
        "recompute",
        "--split",
        "test",
        "--quiet",
    )
    assert run(*LINE, *options, "--save", "out.json") == 0
    sys.modules.pop("norms_for_test", None)
    got = PathResult.load("out.json")
    expected = evaluate(
        nets[0],
        Line(*nets),
        images("test"),
        points=3,
        buffers="recompute",
        recompute_data=images("train"),
    )
    np.testing.assert_array_equal(got.loss, expected.loss)
    assert got.passes == 2


def test_evaluate_reads_torch_files_and_takes_the_model_from_the_option(here: Path):
    assert (
        run(
            "evaluate",
            "a.pt",
            "b.safetensors",
            "--model",
            SPEC,
            *DATA,
            "--at",
            "0,1",
            "--json",
            "r.json",
            "-q",
        )
        == 0
    )
    (first, _) = json.loads(Path("r.json").read_text())["values"]["loss"]
    assert first == pytest.approx(plain_loss(state.load("a.pt")), rel=1e-5)


def test_quiet_prints_nothing_and_json_on_stdout_stands_alone(here: Path, capsys):
    assert run(*LINE, "--points", "3", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(*LINE, "--points", "3", "--json", "-") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["t"]) == 3
    assert printed.err == ""


@pytest.mark.filterwarnings("default")
def test_a_loss_that_is_not_finite_is_reported(here: Path, capsys):
    huge = {key: value * 1e30 for key, value in state.load("b.safetensors").items()}
    state.save(huge, "huge.safetensors")
    assert (
        run(
            "evaluate",
            "a.safetensors",
            "huge.safetensors",
            *DATA,
            "--at",
            "0,0.5,1",
            "--json",
            "r.json",
        )
        == 0
    )
    printed = capsys.readouterr()
    assert "modeconn: warning: loss is not finite at t = 0.5" in printed.err
    assert "× where not finite" in printed.out
    assert json.loads(Path("r.json").read_text())["values"]["loss"][1] in ("nan", "inf")


# ---------------------------------------------------------------- explain, inspect, demo


def test_explain_prints_the_plan(here: Path, capsys):
    assert (
        run(
            "explain",
            "a.safetensors",
            "b.safetensors",
            *DATA,
            "--points",
            "11",
            "--json",
            "plan.json",
        )
        == 0
    )
    assert capsys.readouterr().out.strip()
    assert json.loads(Path("plan.json").read_text())
    assert run("explain", "a.safetensors", "b.safetensors", *DATA, "--json", "-") == 0
    json.loads(capsys.readouterr().out)


def test_inspect_lists_entries_and_metadata(here: Path, capsys):
    assert run("inspect", "a.safetensors", "--json", "i.json") == 0
    text = capsys.readouterr().out
    (row,) = [line.split() for line in text.splitlines() if line.startswith("0.weight")]
    assert row[:6] == ["0.weight", "16", "×", "64", "float32", "1,024"]
    assert ["model", SPEC] in [line.split() for line in text.splitlines()]
    assert "4 tensors, 1,210 elements, 4.73 KiB" in text
    content = json.loads(Path("i.json").read_text())
    assert content["numbers"] == 64 * 16 + 16 + 16 * 10 + 10
    assert content["entries"]["2.weight"]["shape"] == [10, 16]
    weight = state.load("a.safetensors")["2.weight"].double()
    assert content["entries"]["2.weight"]["rms"] == pytest.approx(
        float(weight.square().mean().sqrt())
    )
    assert content["metadata"]["seed"] == "0"


@pytest.mark.usefixtures("here")
def test_inspect_lists_layers_in_their_order(capsys):
    state.save(models.build("mlp:4-3x5-2").state_dict(), "deep.safetensors")
    assert run("inspect", "deep.safetensors") == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:13]]
    assert rows == [f"{2 * layer}.{kind}" for layer in range(6) for kind in ("bias", "weight")]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (4840, "4.73 KiB"), (2**20, "1 MiB")],
)
def test_sizes_are_short(count, text):
    assert output.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00123, "1.23 ms"),
        (0.9, "900 ms"),
        (5.678, "5.68 s"),
        (99.4, "99.4 s"),
        (126, "2 min 6 s"),
        (7325, "2 h 2 min"),
    ],
)
def test_durations_are_short(seconds, text):
    assert output.seconds_text(seconds) == text


def test_inspect_flags_what_is_not_finite(here: Path, capsys):
    assert run("inspect", "nan.safetensors", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["not_finite"] == content["entries"]["0.bias"]["not_finite"] == 16
    assert content["entries"]["0.bias"]["rms"] == "nan"
    assert run("inspect", "nan.safetensors") == 0
    text = capsys.readouterr().out
    assert "16 not finite" in next(line for line in text.splitlines() if line.startswith("0.bias"))
    assert "16 elements not finite" in text


def test_inspect_reads_torch_files_and_half_precision(here: Path, capsys):
    assert run("inspect", "a.pt") == 0
    assert run("inspect", "half.safetensors") == 0
    assert "float16" in capsys.readouterr().out


def test_demo_measures_and_agrees(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", "mlp:64-32-10")
    monkeypatch.setattr(demo, "POINTS", 5)
    monkeypatch.setattr(demo, "LR", 0.1)
    assert run("demo", "--json", "d.json", "--plot", "d.png") == 0
    printed = capsys.readouterr()
    content = json.loads(Path("d.json").read_text())
    result = PathResult.load("d.json")
    measured = content["demo"]
    assert len(result.t) == 5
    assert result.passes == 1
    assert result.samples == 1437
    assert result.error[[0, -1]].tolist() == [0, 0]
    assert result.barrier() > 0.1
    assert measured["largest_difference_in_loss"] < 1e-5
    assert len(measured["seconds"]) == 4
    ours = measured["seconds"]["modeconn, one pass"]
    for name, seconds in measured["seconds"].items():
        (row,) = [line for line in printed.out.splitlines() if line.startswith(name)]
        assert seconds > 0
        assert row.endswith(f" {seconds / ours:.2f}")
    assert f"barrier in loss {result.barrier():.3g}" in printed.out
    assert printed.out.count("zero training error") == 2
    assert Path("d.png").stat().st_size > 1000
    assert printed.err == ""


# ---------------------------------------------------------------- train

TRAIN = ("train", "--model", SPEC, *DATA, "--lr", "0.05")


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


def test_ctrl_c_saves_the_training_and_resume_completes_it(here: Path):
    steps = ("--epochs", "40", "--to-the-end", "--batch-size", "2", "--seed", "5")
    process = started(here, *TRAIN, *steps, "--out", "t.safetensors")
    while "epoch  2/40" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
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
        assert archive.metadata()["epochs"] == "40"


def test_ctrl_c_in_an_evaluation_says_that_nothing_was_saved(here: Path, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = sorted(here.iterdir())
    monkeypatch.setattr(sys.modules["modeconn.evaluation.evaluator"], "evaluate", interrupted)
    assert run(*LINE, "--save", "r.npz", "--json", "r.json", "--plot", "r.png") == 130
    assert capsys.readouterr().err == "modeconn: interrupted, nothing was saved\n"
    assert sorted(here.iterdir()) == before


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
        "wider.safetensors does not match a.safetensors",
    ),
    # the model
    ((*LINE, "--model", "mlp:64-17-10"), "a.safetensors does not match the model MLP"),
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
    assert run(*LINE, "--json", "locked/r.json") == 2
    assert "the folder locked is not writable" in capsys.readouterr().err


def test_a_write_that_fails_leaves_no_file(here: Path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(here.iterdir())
    monkeypatch.setattr("os.fsync", full)
    assert run(*LINE, "--points", "2", "--plot", "r.png") in (1, 2)
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_a_closed_pipe_is_no_error(here: Path):
    process = started(here, "inspect", "a.safetensors")
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert err == ""


def test_a_pipe_gets_plain_text_and_any_encoding_will_do(here: Path):
    process = started(here, "inspect", "a.safetensors", encoding="ascii")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == ""
    assert "\x1b" not in out
    assert "\r" not in out
    assert "4 entries, 1,210 numbers" in out
    assert "?" in out, "what the encoding lacks is replaced"


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
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        os.close(leader)
        assert process.wait(timeout=60) == 0
    text = b"".join(chunks).decode()
    assert "/30 [" in text
    assert "epoch 1/30" not in text
    last = text.replace("\r\n", "\n").rpartition("\r")[2]
    assert last.startswith("30 epochs in ")
