"""`modeconn layerwise`, searches of `modeconn mix`, ensembles: run as a user runs them."""

from __future__ import annotations

import json

import numpy as np
import pytest

import cli_cases
import modeconn as mc
from cli_cases import DATA, LINE, images, plain_loss, run
from modeconn import models
from modeconn.parameters import state

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here
PAIR = ("layerwise", "a.safetensors", "b.safetensors", *DATA)


def test_a_table_of_layers_is_printed_drawn_and_kept(here, capsys):
    pytest.importorskip("matplotlib")
    files = ("--save", "t.json", "--json", "r.json", "--plot", "t.png", "--csv", "t.csv")
    assert run(*PAIR, "--points", "3", *files) == 0
    text = capsys.readouterr().out
    assert "barrier" in text and "200 samples, 6 points, 1 pass" in text and "wrote t.png" in text
    table = mc.LayerTable.load("t.json")
    a, b = state.load("a.safetensors"), state.load("b.safetensors")
    assert len(table.layers) == 2 and (here / "t.png").stat().st_size > 0
    mixed = {name: (a[name] + b[name]) / 2 if name.startswith("0.") else a[name] for name in a}
    expected = plain_loss({name: value.double() for name, value in mixed.items()})
    assert table.values["loss"][0, 1] == pytest.approx(expected, rel=1e-5)
    ends = [plain_loss({k: v.double() for k, v in each.items()}) for each in (a, b)]
    np.testing.assert_allclose(table.ends["loss"], ends, rtol=1e-5)
    assert json.loads((here / "r.json").read_text())["layers"] == list(table.layers)
    names, *rows = (here / "t.csv").read_text().splitlines()
    assert names == "layer,t,loss,error" and len(rows) == 6
    assert [float(row.split(",")[2]) for row in rows] == table.values["loss"].ravel().tolist()


def test_layers_may_be_patterns(here, capsys):
    last = mc.layerwise(models.build(cli_cases.SPEC), "a.safetensors", "b.safetensors", images(), 2)
    layers = f"{last.layers[1]},*"
    options = ("--points", "2", "--mode", "cumulative", "--layers", layers, "--save", "t.json")
    assert run(*PAIR, *options, "--quiet") == 0 and capsys.readouterr().out == ""
    table = mc.LayerTable.load("t.json")
    np.testing.assert_allclose(table.values["loss"][0], last.values["loss"][1], rtol=1e-5)
    assert table.values["loss"][1, 1] == pytest.approx(table.ends["loss"][1], rel=1e-6)


def test_an_ensemble_is_printed_and_kept(here, capsys):
    assert run(*LINE, "--points", "3", "--ensemble", "--json", "r.json") == 0
    assert "ensemble of 3: loss" in capsys.readouterr().out
    path = mc.Line("a.safetensors", "b.safetensors")
    expected = mc.ensemble(models.build(cli_cases.SPEC), path, images(), 3)
    info = json.loads((here / "r.json").read_text())["info"]
    assert info["ensemble_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert info["ensemble_ece"] == pytest.approx(expected.ece, rel=1e-6)


@pytest.mark.parametrize("strategy", ["random", "grid", "greedy"])
def test_a_mixture_is_searched(strategy: str, here, capsys):
    files = ("a.safetensors", "b.safetensors", "c.safetensors", *DATA)
    search = ("--search", strategy, "--budget", "12", "--by", "loss")
    assert run("mix", *files, *search, "--out", "best.safetensors", "--save", "r.npz") == 0
    result = mc.PathResult.load("r.npz")
    assert 5 <= len(result.t) <= 12 and result.info["search"] == strategy
    best = state.load("best.safetensors")
    expected = plain_loss({name: value.double() for name, value in best.items()})
    assert result.loss.min() == pytest.approx(expected, rel=1e-5)
    assert sorted(p.name for p in here.glob("r.npz*")) == ["r.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*PAIR, "--points", "1"), "--points 1: expected at least 2"),
        ((*PAIR, "--layers", "nowhere"), "'nowhere' matches no entry"),
        ((*PAIR, "--save", "t.npz"), "must end in .json"),
        ((*LINE, "--ensemble", "--loss", "mse"), "--ensemble is for class labels"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message: str, here, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
