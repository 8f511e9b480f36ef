"""`modeconn evaluate`: the numbers of the library, files and pictures, quiet and plain output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import cli_cases
from cli_cases import DATA, LINE, SPEC, images, plain_loss, run
from modeconn import models
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.result import PathResult
from modeconn.parameters import state
from modeconn.parameters.paths import Bezier, Line, PolyChain
from modeconn.parameters.planes import Plane

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here


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
