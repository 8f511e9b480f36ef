"""`modeconn verify`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from modeconn import models
from modeconn.cli import main
from modeconn.connection.certificate import Certificate
from modeconn.connection.connection import BREAKPOINTS, CONTENT, Connection
from modeconn.connection.verification import certify
from modeconn.data import datasets
from modeconn.parameters import state
from walk import KINDS, Walk, walk

SPEC = "mlp:64-12-10-10"
DATA = ("--data", "digits", "--limit", "200")


def images(split: str = "train") -> datasets.Images:
    return datasets.load("digits", split=split, limit=200)


@pytest.fixture(scope="module")
def made() -> tuple[Walk, Connection]:
    """A certified path on digits."""
    torch.manual_seed(0)
    w = walk(models.build(SPEC), (1, 8, 8))
    return w, Connection(w.path, KINDS, certify(w.model, w.chain, w.path, images()), model=SPEC)


@pytest.fixture
def here(made, tmp_path: Path, monkeypatch) -> Path:
    w, connection = made
    monkeypatch.chdir(tmp_path)
    connection.save("c")
    state.save(w.points[0], "a.safetensors")
    state.save(w.points[-1], "b.safetensors")
    return tmp_path


def run(*arguments: str) -> int:
    return main(["verify", *map(str, arguments)])


def test_verify_confirms_and_writes(here: Path, made, capsys):
    certificate = made[1].certificate
    outputs = ("--json", "v.json", "--plot", "v.png")
    assert run("c", *DATA, "--a", "a.safetensors", "--b", "b.safetensors", *outputs) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == "verified: the weights and digits train bear out the certificate"
    assert f"loss at most {certificate.bound:.4g} and error at most" in printed.out
    assert certificate.advice in printed.out
    assert sum(line.endswith("<- bound") for line in lines) == 1
    assert lines[-2:] == ["wrote v.png", "wrote v.json"]
    content = json.loads(Path("v.json").read_text())
    assert Certificate.from_dict(content) == certificate
    assert content["same_data"] is True
    assert content["data"] == "digits train"
    assert Path("v.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("here")
def test_json_on_stdout_stands_alone_and_quiet_prints_nothing(capsys):
    assert run("c", *DATA, "--json", "-", "--batch-size", "64", "--model", SPEC) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 200
    assert run("c", *DATA, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("here")
def test_other_data_are_said_to_be_others(capsys):
    assert run("c", *DATA, "--split", "test", "--json", "v.json") == 3
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("OTHER DATA: nothing stored was compared, for digits test are not")
    assert json.loads(Path("v.json").read_text())["same_data"] is False
    assert run("c", *DATA, "--split", "test", "--require-same-data", "--json", "w.json") == 2
    assert "are not those that the main certificate was made from" in capsys.readouterr().err
    assert not Path("w.json").exists()


@pytest.mark.usefixtures("here")
def test_the_target_is_the_callers(made, capsys):
    bound = made[1].certificate.bound
    for target, words in ((bound / 2, "target not met"), (bound * 2, "certified: ")):
        assert run("c", *DATA, "--target", str(target)) == 0
        assert words in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_the_test_certificate_is_compared_with_the_test_split(made, capsys):
    w, connection = made
    test = certify(w.model, w.chain, w.path, images("test"))
    both = dataclasses.replace(connection, test_certificate=test)
    both.save("both")
    assert run("both", *DATA, "--json", "v.json") == 0
    printed = capsys.readouterr().out
    assert f"test data: loss at most {test.bound:.4g}" in printed
    assert "test certificate: all losses" in printed
    assert Certificate.from_dict(json.loads(Path("v.json").read_text())["test_certificate"]) == test
    assert run("both", *DATA, "--split", "test") == 2
    assert "are those of the test certificate" in capsys.readouterr().err
    dataclasses.replace(both, test_certificate=dataclasses.replace(test, bound=0.5)).save("lie")
    assert run("lie", *DATA) == 2
    assert "test certificate: the certificate's bound is 0.5" in capsys.readouterr().err


def lie(**changes) -> None:
    connection = Connection.load("c")
    dataclasses.replace(
        connection, certificate=dataclasses.replace(connection.certificate, **changes)
    ).save("c")


@pytest.mark.usefixtures("here")
def test_a_false_certificate_ends_in_one_line(capsys):
    lie(bound=0.5)
    assert run("c", *DATA, "--json", "v.json", "--plot", "v.png") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(
        "modeconn: error: the certificate's bound is 0.5, and the largest of its own values is "
    )
    assert printed.err.count("\n") == 1
    assert not Path("v.json").exists()
    assert not Path("v.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none",), "none: no such folder"),
        ((BREAKPOINTS,), "breakpoints.safetensors: no such folder"),
        (("c", "--a", "none.safetensors"), "none.safetensors: no such file"),
        (("c", "--a", "b.safetensors"), "the path does not end in a: "),
        (("c", "--b", "wider.safetensors"), "does not match b"),
        (("c", "--model", "mlp:64-13-10-10"), "does not match"),
        (("c", "--model", "mlp:banana"), "'banana' is not a width"),
        (("c", "--plot", "x.gif"), "the name must end in .png"),
        (("c", "--json", "no/where.json"), "the folder no does not exist"),
        (("cut",), "connection.json: truncated or damaged"),
        (("factory",), "--model is missing, and factory does not say which built-in model it is"),
        (("nameless",), "--model is missing, and nameless does not say which built-in model it is"),
    ],
)
def test_bad_input_ends_in_one_line(here: Path, made, capsys, arguments, message):
    connection = made[1]
    dataclasses.replace(connection, model="torch.nn:Identity").save("factory")
    dataclasses.replace(connection, model=None).save("nameless")
    connection.save("cut")
    Path("cut", CONTENT).write_text(Path("cut", CONTENT).read_text()[:-9])
    state.save(models.build("mlp:64-13-10-10").state_dict(), "wider.safetensors")
    before = sorted(here.iterdir())
    assert run(*arguments, *DATA) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(here.iterdir()) == before
