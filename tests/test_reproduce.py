"""The experiments, small: tables and figures are written, runs go on, and bad input is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeconn.cli import main
from modeconn.connection.recipe import Recipe
from modeconn.errors import ModeconnError
from modeconn.experiments import settings
from modeconn.experiments.estimate import estimate
from modeconn.experiments.run import reproduce
from modeconn.experiments.tables import Interval, dropout_level
from modeconn.stability.table import Level, Row, StabilityTable

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = settings.Experiment(
    "digits",
    "mlp:64-12x2-10",
    settings.Solution(lr=0.01, epochs=15),
    Recipe(lr=0.01, epochs=8, schedule="onecycle"),
    draws=2,
    first_draws=2,
    dropout_draws=4,
    limit=400,
)
TINY = {
    "mnist-fcn": replace(
        SMALL,
        others=(settings.OtherRecipe((1,), Recipe(lr=0.02, epochs=8)),),
        fractions=(2, 4),
    ),
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
    lines, place = result["lines"], out / "solution-1"
    assert [(line["fraction"], line["entry"]) for line in lines] == [
        (f, e) for f in (2, 4) for e in (0, 1, 2)
    ]
    table = StabilityTable.load(place / "subnetworks-2.csv")
    assert len(table) == 6
    assert lines[1]["subnetwork_loss"] == table.summary()[1].best_by_error.train_loss
    dropout = StabilityTable.load(place / "dropout-4.json")
    assert len(dropout) == 8 and dropout.entries == [1, 2]
    assert lines[3]["dropout_loss"] is None and lines[3]["better"] is None
    assert lines[4]["dropout_error"] == dropout.column("train_error", 1).min()
    assert (out / "mnist-fcn.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "result.json").read_text()) == result
    # A second run reads everything: bitwise the same, and nothing is trained.
    before = (place / "solution.safetensors").stat().st_mtime_ns
    assert reproduce("mnist-fcn", out) == result
    assert (place / "solution.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ModeconnError, match="started with seed 1, not 2"):
        reproduce("mnist-fcn", out, seed=2)


def test_means_over_solutions(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(TINY, "mnist-fcn", SMALL)
    out = tmp_path / "run"
    assert main(["reproduce", "mnist-fcn", "--solutions", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert " ± " in printed and "of 2 entry layers that have dropout networks" in printed
    lines = json.loads((out / "result.json").read_text())["lines"]
    for kind, name in (("subnetworks", "subnetwork"), ("dropout", "dropout")):
        best = []
        for i in (1, 2, 3):
            table = StabilityTable.load(out / f"solution-{i}" / f"{kind}-2.json")
            rows = [row for row in table.rows if row.entry == 2]
            best.append(min(rows, key=lambda row: (row.train_error, row.train_loss)).test_error)
        assert len(set(best)) > 1
        assert lines[2][f"{name}_test_error"] == pytest.approx(np.mean(best))
        half = 4.303 * np.std(best, ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
        assert lines[2][f"{name}_test_error_interval"] == pytest.approx(half)
    assert main(["reproduce", "path", "--solutions", "3", "--out", str(tmp_path / "p")]) == 2
    assert "path takes 2" in capsys.readouterr().err
    given = ["--solution", str(out / "solution-1" / "solution.safetensors"), "--solutions", "2"]
    assert main(["reproduce", "mnist-fcn", *given, "--out", str(tmp_path / "q")]) == 2
    assert "--solutions is 2, and --solution is given 1 times" in capsys.readouterr().err


def test_intervals() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert Interval.of([3.0]) == Interval(3.0, 0.0)
    for count in (2, 3, 10, 30, 200):
        values = np.random.default_rng(count).random(count)
        low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
        found = Interval.of(list(values))
        assert found.mean == pytest.approx((low + high) / 2)
        assert found.half == pytest.approx((high - low) / 2, rel=7e-3 if count > 30 else 1e-3)


def test_level_of_a_path_by_dropout() -> None:
    """The least over draws of the largest over layers, the larger of both networks."""
    own = Level(0.0, 0.0, 0.0, 0.0)
    losses = {(1, 0): 3.0, (1, 1): 1.0, (2, 0): 1.0, (2, 1): 2.0}
    one = StabilityTable([Row(e, d, v, 0.1, v, 0.2) for (e, d), v in losses.items()], own)
    two = StabilityTable([Row(e, d, 0.5 * v, 0.3, v, 0.1) for (e, d), v in losses.items()], own)
    assert dropout_level([one, two]) == Level(2.0, 0.3, 2.0, 0.2)


def test_interrupted(tmp_path: Path) -> None:
    whole = reproduce("mnist-fcn", tmp_path / "whole")

    def interrupt(line: str) -> None:
        if line.startswith("entry layer 2: epoch 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("mnist-fcn", tmp_path / "parts", log=interrupt)
    assert reproduce("mnist-fcn", tmp_path / "parts")["lines"] == whole["lines"]


def test_widths_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = reproduce("widths", tmp_path / "widths", solutions=2)
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
    assert estimate("mnist-fcn", given=1).solutions == 0


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
    with pytest.raises(ModeconnError, match="widths trains its own, of every width"):
        reproduce("widths", tmp_path / "a", solutions=["a", "b"])
    with pytest.raises(ModeconnError, match="solutions is 0"):
        reproduce("mnist-fcn", tmp_path / "a", solutions=0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("mine")
    with pytest.raises(ModeconnError, match="holds no experiment"):
        reproduce("mnist-fcn", tmp_path / "b")


@pytest.mark.parametrize("name", settings.NAMES)
def test_settings_are_complete(name: str) -> None:
    """Both sizes exist, the full one has the paper's draws and epochs."""
    full = settings.FULL[name]
    base = full if isinstance(full, settings.Experiment) else full.base
    assert (base.draws, base.first_draws, base.dropout_draws, base.limit) == (20, 1, 200, None)
    assert base.recipe.epochs in (200, 400) and base.recipe.optimizer == "sgd"


def test_published_settings() -> None:
    """Those that the published code has beyond the paper's text."""
    vgg = settings.FULL["cifar10-vgg11"]
    assert vgg.solution.nesterov and vgg.solutions == 5
    rates = [vgg.recipe_of(2, 0).rate(epoch, 200) / 5e-3 for epoch in (0, 19, 20, 40)]
    assert rates == [1, 1, 0.5, 0.25]
    assert vgg.recipe_of(4, 0).rate(199, 200) == 5e-3
    assert vgg.recipe_of(4, 2) == vgg.recipe_of(2, 2) == vgg.recipe
    assert vgg.recipe_of(4, 1).rate(10, 200) == pytest.approx(0.9 * 5e-3)
    fcn = settings.FULL["cifar10-fcn"]
    assert fcn.recipe.min_epochs == 100 and fcn.recipe.stop_together and fcn.solutions == 10
    assert [fcn.recipe_of(2, entry).lr for entry in (0, 1, 2)] == [1e-3, 1e-3, 3e-3]
    widths = settings.FULL["widths-cifar10"]
    assert len(widths.widths) == 25 and (widths.widths[0], widths.widths[-1]) == (50, 3000)
    assert [widths.at(50).recipe_of(2, entry).lr for entry in (0, 1)] == [1e-3, 5e-3]
    assert settings.FULL["widths"].base.solution.epochs == 400
