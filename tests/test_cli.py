"""The command line: help, explain, inspect, demo, and plain text in a pipe."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import cli_cases
from cli_cases import DATA, LINE, SPEC, run, started
from modeconn import models
from modeconn.backends import NAMES as BACKENDS
from modeconn.cli import COMMANDS, demo, output
from modeconn.connection.rounds import METHODS
from modeconn.data import datasets
from modeconn.evaluation.arguments import BUFFERS, PRECISIONS
from modeconn.evaluation.result import PathResult
from modeconn.experiments.settings import NAMES as EXPERIMENTS
from modeconn.metrics import LOSSES, METRICS
from modeconn.parameters import state

# Fixtures.
folder = cli_cases.folder
here = cli_cases.here


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


def test_ctrl_c_in_an_evaluation_says_that_nothing_was_saved(here: Path, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = sorted(here.iterdir())
    monkeypatch.setattr(sys.modules["modeconn.evaluation.evaluator"], "evaluate", interrupted)
    assert run(*LINE, "--save", "r.npz", "--json", "r.json", "--plot", "r.png") == 130
    assert capsys.readouterr().err == "modeconn: interrupted, nothing was saved\n"
    assert sorted(here.iterdir()) == before


def test_a_closed_pipe_is_no_error(here: Path):
    process = started(here, "inspect", "a.safetensors")
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=600)
    assert err == ""


def test_a_pipe_gets_plain_text_and_any_encoding_will_do(here: Path):
    process = started(here, "inspect", "a.safetensors", encoding="ascii")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0
    assert err == ""
    assert "\x1b" not in out
    assert "\r" not in out
    assert "4 tensors, 1,210 elements" in out
    assert "?" in out, "what the encoding lacks is replaced"
