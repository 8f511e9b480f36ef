"""The experiments, small: tables and figures are written, runs go on, and bad input is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modeconn.cli import main
from modeconn.connection.recipe import Recipe
from modeconn.errors import ModeconnError
from modeconn.experiments import settings
from modeconn.experiments.estimate import estimate
from modeconn.experiments.run import reproduce
from modeconn.stability.table import StabilityTable

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = settings.Experiment(
    "digits",
    "mlp:64-12x2-10",
    settings.Solution(lr=0.01, epochs=15),
    Recipe(lr=0.01, epochs=8, schedule="onecycle"),
    draws=2,
    dropout_draws=4,
    limit=400,
)
TINY = {
    "mnist-fcn": replace(SMALL, recipes={1: Recipe(lr=0.02, epochs=8)}, fractions=(2, 4)),
    "widths": settings.Sweep(SMALL, (8, 12)),
    # Wide enough for the target to be reached in the first round of the search.
    "path": settings.Join(replace(SMALL, model="mlp:64-24x2-10"), target=1.0),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", TINY)


def test_entry_layers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = reproduce("mnist-fcn", out)
    assert [(line["fraction"], line["entry"]) for line in result["lines"]] == [
        (f, e) for f in (2, 4) for e in (0, 1, 2)
    ]
    table = StabilityTable.load(out / "subnetworks-2.csv")
    assert (
        len(table) == 6
        and result["lines"][1]["subnetwork_loss"] == table.column("train_loss", 1).min()
    )
    dropout = StabilityTable.load(out / "dropout-4.json")
    assert (
        len(dropout) == 12
        and result["lines"][3]["dropout_loss"] == dropout.column("train_loss", 0).min()
    )
    assert (out / "mnist-fcn.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "result.json").read_text()) == result
    # A second run reads everything: bitwise the same, and nothing is trained.
    before = (out / "solution.safetensors").stat().st_mtime_ns
    assert reproduce("mnist-fcn", out) == result
    assert (out / "solution.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ModeconnError, match="started with seed 1, not 2"):
        reproduce("mnist-fcn", out, seed=2)


def test_interrupted(tmp_path: Path) -> None:
    whole = reproduce("mnist-fcn", tmp_path / "whole")

    def interrupt(line: str) -> None:
        if line.startswith("entry layer 2: epoch 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("mnist-fcn", tmp_path / "parts", log=interrupt)
    assert reproduce("mnist-fcn", tmp_path / "parts")["lines"] == whole["lines"]


def test_widths_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = reproduce("widths", tmp_path / "widths")
    assert [(line["width"], line["entry"]) for line in result["lines"]] == [
        (w, e) for w in (8, 12) for e in (0, 1, 2)
    ]
    assert (tmp_path / "widths" / "widths.png").exists()
    assert main(["reproduce", "path", "--out", str(tmp_path / "path")]) == 0
    assert "tables and figure in" in capsys.readouterr().out
    line = json.loads((tmp_path / "path" / "result.json").read_text())["lines"][0]
    assert (
        line["bound"] > 0
        and line["straight_line"] > 0
        and (tmp_path / "path" / "path.png").exists()
    )


def test_estimates_grow_with_the_work() -> None:
    one, sweep, path = (estimate(name) for name in ("mnist-fcn", "widths", "path"))
    assert one.solutions > 0 and one.subnetworks > 0 and sweep.subnetworks > 0
    assert path.solutions > 0 and path.subnetworks == 0
    assert estimate("mnist-fcn", solutions=1).solutions == 0


def test_the_estimate_is_printed_for_the_full_size(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "FULL", TINY)
    assert main(["reproduce", "mnist-fcn", "--full", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().err
    assert "training takes at most about" in printed and "for the subnetworks" in printed


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ModeconnError, match="experiment 'x' is unknown"):
        reproduce("x", tmp_path / "a")
    with pytest.raises(ModeconnError, match="takes 1"):
        reproduce("mnist-fcn", tmp_path / "a", solutions=["a", "b"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("mine")
    with pytest.raises(ModeconnError, match="holds no experiment"):
        reproduce("mnist-fcn", tmp_path / "b")


@pytest.mark.parametrize("name", settings.NAMES)
def test_settings_are_complete(name: str) -> None:
    """Both sizes exist, the full one has the paper's draws."""
    full = settings.FULL[name]
    base = full if isinstance(full, settings.Experiment) else full.base
    assert (base.draws, base.dropout_draws, base.limit) == (20, 200, None)
    assert base.recipe.epochs in (200, 400) and base.recipe.optimizer == "sgd"
