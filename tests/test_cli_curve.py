"""`modeconn curve`, and `modeconn evaluate` of its file and with adaptive points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cli_cases
import modeconn as mc
from cli_cases import LIMIT, images, plain_loss, run
from modeconn import models
from modeconn.parameters import state

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here

DIGITS = ("--data", "digits", "--limit", LIMIT)
CONNECT = ("connect", "--target", "9", "--out", "c", *DIGITS, "a.safetensors", "b.safetensors")
CURVE = ("curve", "a.safetensors", "b.safetensors", *DIGITS, "--no-align")


def test_a_curve_is_trained_and_evaluated(here: Path, capsys):
    steps = ("--steps", "60", "--lr", "0.01", "--out", "new.safetensors")
    assert run(*CURVE, *steps, "--json", "new.json", "--plot", "new.png") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "60 steps done in" in printed.out
    assert "train" in printed.out and "test" in printed.out
    assert "wrote new.safetensors" in printed.out
    content = json.loads(Path("new.json").read_text())
    assert content["steps"] == "60" and content["aligned"] is False
    assert len(content["history"]) == 60
    path = mc.load_path("new.safetensors")
    for t, file in ((0.0, "a"), (1.0, "b")):
        one, other = path.at(t), state.load(f"{file}.safetensors")
        assert all(torch.equal(one[k], other[k]) for k in other)
    assert run("evaluate", "new.safetensors", *DIGITS, "--points", "adaptive", "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["info"]["points"] == "adaptive"
    assert max(result["values"]["loss"]) == pytest.approx(max(content["train"]["values"]["loss"]))
    assert run("explain", "new.safetensors", *DIGITS, "--points", "5") == 0
    assert "linear" in capsys.readouterr().out


def test_a_curve_of_several_bends_goes_on_after_an_interruption(here: Path, capsys, monkeypatch):
    steps = ("--epochs", "20", "--kind", "polychain", "--bends", "2", "-q")
    assert run(*CURVE, *steps, "--out", "whole.safetensors") == 0
    from modeconn.training.curves.loop import FitLoop

    take = FitLoop._take

    def stops(loop: FitLoop) -> None:
        if loop.step == 7:
            raise KeyboardInterrupt
        take(loop)

    monkeypatch.setattr(FitLoop, "_take", stops)
    assert run(*CURVE, *steps, "--out", "new.safetensors") == 130
    assert "new.safetensors.training keeps the fit" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(*CURVE, *steps, "--out", "new.safetensors", "--resume") == 0
    one, other = (state.load(f"{name}.safetensors") for name in ("whole", "new"))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*CURVE, "--steps", "2", "--out", "c.pt"), "must end in .safetensors"),
        ((*CURVE, "--steps", "2", "--out", "a.safetensors"), "would overwrite the input"),
        ((*CURVE, "--out", "new.safetensors"), "one of the arguments --steps --epochs is required"),
        ((*CURVE, "--steps", "0", "--out", "new.safetensors"), "not a whole number of at least 1"),
        ((*CURVE, "--steps", "2", "--out", "new.safetensors", "--resume"), "no fit to resume"),
        (
            ("plane", "a.safetensors", "b.safetensors", "c.safetensors", *DIGITS)
            + ("--points", "adaptive"),
            "adaptive",
        ),
        (
            ("evaluate", "a.safetensors", "b.safetensors", "c.safetensors", *DIGITS)
            + ("--path", "plane", "--points", "adaptive"),
            "--points adaptive is for curves",
        ),
        ((*CONNECT, "--curve-steps", "5"), "--curve-steps is for --compare curve"),
        (
            (*CONNECT, "c.safetensors", "--compare", "curve"),
            "--compare curve is for two networks, got 3",
        ),
        (
            ("explain", "a.safetensors", "b.safetensors", *DIGITS, "--points", "adaptive"),
            "a plan is for points that are given",
        ),
    ],
)
def test_bad_input(here: Path, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_curve_file_stands_alone_and_is_of_its_model(here: Path, capsys):
    path = mc.Bezier([f"{name}.safetensors" for name in "abc"])
    path.save("curve.safetensors", {"model": cli_cases.SPEC})
    for arguments, message in [
        (("curve.safetensors", "a.safetensors"), "is a whole path: expected it alone"),
        (("curve.safetensors", "--path", "bezier"), "is a whole path"),
        (("curve.safetensors", "--model", "mlp:64-8-10"), "does not fit mlp:64-8-10"),
    ]:
        assert run("evaluate", *arguments, *DIGITS) == 2
        assert message in capsys.readouterr().err
    assert run("evaluate", "curve.safetensors", *DIGITS, "--at", "0,0.5,1", "-q") == 0


def test_a_trained_curve_beside_the_certified_path(here: Path, capsys):
    pytest.importorskip("scipy")  # aligns
    steps = ("--curve-steps", "30", "--seed", "3")
    assert run(*CONNECT, "--compare", "curve", *steps, "--json", "c.json", "--plot", "c.png") == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if " proved " in line or " measured " in line]
    assert [" ".join(row.split()[:2]) for row in rows] == ["certified path", "trained curve"]
    content = json.loads(Path("c.json").read_text())
    path, curve = content["compared"]
    assert path["proved"] and path["loss"] == content["certificate"]["bound"]
    ends = [state.load(f"{name}.safetensors") for name in "ab"]
    assert min(path["loss"], curve["loss"]) >= max(map(plain_loss, ends)) - 1e-6

    # the curve is that of fit_curve, and its length that of a polygon of its points
    fit = mc.fit_curve(models.build(cli_cases.SPEC), *ends, images(), steps=30, seed=3)
    assert not curve["proved"] and curve["loss"] == fit.result.highest("loss")[1]
    assert curve["error"] == fit.result.highest("error")[1]
    points = [fit.path.at(t) for t in np.linspace(0, 1, 201)]
    flat = torch.stack([torch.cat([v.flatten().double() for v in p.values()]) for p in points])
    assert curve["length"] == pytest.approx(float(flat.diff(dim=0).norm(dim=1).sum()), rel=1e-3)
