"""Saved results: drawn again, as tables, and found by the command that computed them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import cli_cases
from cli_cases import DATA, LINE, SPEC, run
from modeconn.evaluation.result import PathResult

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here

FILES = ("a.safetensors", "b.safetensors", "c.safetensors")


def table(file: str) -> dict[str, list[float]]:
    """The columns of a table of numbers."""
    with Path(file).open(encoding="utf-8", newline="") as stream:
        names, *rows = csv.reader(stream)
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(names)}


def test_a_saved_curve_is_drawn_again(here: Path, capsys):
    assert run(*LINE, "--points", "5", "--save", "r.npz", "--csv", "r.csv") == 0
    computed = capsys.readouterr().out
    outputs = ("--plot", "p.svg", "--csv", "p.csv", "--json", "p.json")
    assert run("plot", "r.npz", *outputs) == 0
    drawn = capsys.readouterr().out
    assert computed[: computed.index("wrote")] == drawn[: drawn.index("wrote")]
    assert Path("p.csv").read_bytes() == Path("r.csv").read_bytes()
    result = PathResult.load("r.npz")
    columns = table("p.csv")
    assert [*columns] == ["t", "loss", "error"]
    for name, column in {"t": result.t, **result.values}.items():
        np.testing.assert_array_equal(columns[name], column)
    assert json.loads(Path("p.json").read_text())["values"]["loss"] == result.loss.tolist()
    assert "Loss along the path: 5 points" in Path("p.svg").read_text()
    assert run("plot", "p.json", "--metric", "error", "--plot", "e.svg", "-q") == 0
    assert "Error along the path" in Path("e.svg").read_text()
    assert capsys.readouterr() == ("", "")


def test_a_saved_plane_is_drawn_again(here: Path):
    plane = ("plane", *FILES, *DATA, "--points", "3", "--quiet", "--save", "r.json")
    assert run(*plane) == 0
    assert run("plot", "r.json", "--surface", "s.png", "--csv", "r.csv") == 0
    assert [*table("r.csv")] == ["t0", "t1", "loss", "error"]
    assert Path("s.png").stat().st_size > 1000


def test_results_without_a_loss_are_drawn_by_their_first_metric(here: Path, capsys):
    only = ("--metrics", "error", "--points", "3", "--save", "r.npz", "--plot", "r.svg")
    assert run(*LINE, *only) == 0
    assert run("plot", "r.npz") == 0
    assert "Error along the path" in Path("r.svg").read_text()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.npz",), "none.npz: no such file"),
        (("a.safetensors",), "a result is saved as .npz or .json"),
        (("r.npz", "--metric", "accuracy"), "'accuracy' is not in this result, which has loss"),
        (("r.npz", "--csv", "r.npz"), "would overwrite the input r.npz"),
        (("r.npz", "--surface", "s.png"), "a surface needs t with two coordinates"),
        (("r.npz", "--plot", "s.bmp"), "must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(here: Path, capsys, arguments, words: str):
    PathResult([0.0, 1.0], {"loss": [1.0, 2.0]}, 1, 1, "", 0.0).save("r.npz")
    assert run("plot", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# -- the same command again ------------------------------------------------------------------------


@pytest.fixture
def evaluations(monkeypatch) -> list[object]:
    """The evaluations that commands make."""
    from modeconn.evaluation import evaluator

    made: list[object] = []
    evaluate = evaluator.evaluate

    def noting(*args: object, **options: object) -> object:
        made.append(options["points"])
        return evaluate(*args, **options)

    monkeypatch.setattr(evaluator, "evaluate", noting)
    return made


SAVE = (*LINE, "--points", "3", "--save", "r.npz")


def test_a_finished_result_is_not_computed_anew(here: Path, capsys, evaluations):
    assert run(*SAVE) == 0
    first = PathResult.load("r.npz").to_dict()
    capsys.readouterr()
    assert run(*SAVE, "--plot", "r.png", "--csv", "r.csv") == 0
    assert "r.npz is the result of this command: remove it" in capsys.readouterr().out
    assert len(evaluations) == 1
    assert PathResult.load("r.npz").to_dict() == first
    assert Path("r.png").stat().st_size > 1000 and len(table("r.csv")["t"]) == 3
    assert run(*SAVE, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["values"] == first["values"]
    assert len(evaluations) == 1


@pytest.mark.parametrize(
    "other",
    [
        ("--points", "4"),
        ("--at", "0,0.3,1"),
        ("--loss", "mse"),
        ("--metrics", "loss"),
        ("--precision", "float64"),
        ("--backend", "reference"),
        ("--batch-size", "7"),
        ("--limit", "100"),
        ("--split", "test"),
        ("--mean", "0.5"),
        ("--buffers", "start"),
    ],
    ids=lambda other: other[0],
)
def test_another_command_computes_its_own(here: Path, evaluations, other, monkeypatch):
    from modeconn.evaluation import evaluator

    result = PathResult([0.0, 1.0], {"loss": [1.0, 2.0]}, 1, 1, "", 0.0)
    monkeypatch.setattr(evaluator, "evaluate", lambda *a, **o: evaluations.append(1) or result)
    plain = (*LINE, "--points", "3") if other[0] != "--at" else LINE
    for count in (1, 1):
        assert run(*plain, "--save", "r.npz", "--quiet") == 0
        assert len(evaluations) == count
    assert run(*plain, *other, "--save", "r.npz", "--quiet") == 0
    assert len(evaluations) == 2
    assert run(*plain, "--save", "r.npz", "--quiet") == 0
    assert len(evaluations) == 3


def test_other_networks_and_models_of_the_users_are_computed(here: Path, evaluations, monkeypatch):
    assert run(*SAVE, "-q") == 0
    ends = ("evaluate", *FILES[1:], *DATA, "--points", "3", "--save", "r.npz", "-q")
    assert run(*ends) == 0
    assert len(evaluations) == 2
    monkeypatch.setattr("modeconn.models.is_builtin", lambda spec: False)
    for count in (3, 4):
        assert run(*ends, "--model", SPEC) == 0
        assert len(evaluations) == count


def test_a_file_that_is_no_result_or_damaged_is_replaced(here: Path, evaluations):
    for content in (b"", b"{}", b"PK\x03\x04"):
        Path("r.npz").write_bytes(content)
        assert run(*SAVE, "-q") == 0
        PathResult.load("r.npz")
    assert len(evaluations) == 3
