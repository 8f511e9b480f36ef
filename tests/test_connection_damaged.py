"""Folders of connections: damaged ones are refused, interrupted saves change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import connection_cases
from connection_cases import names_in
from modeconn.connection.connection import BREAKPOINTS, CONTENT, Connection
from modeconn.errors import ModeconnError
from modeconn.files import writing as files
from modeconn.parameters import state as states
from walk import KINDS

# Fixtures.
made = connection_cases.made
saved = connection_cases.saved


# ---------------------------------------------------------------- damaged folders


def content_of(folder: Path) -> dict:
    return json.loads((folder / CONTENT).read_text())


def rewrite(folder: Path, **changes) -> None:
    content = content_of(folder) | changes
    (folder / CONTENT).write_text(
        json.dumps({key: value for key, value in content.items() if value != "REMOVED"})
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "modeconn.Connection/9"},
            "format is 'modeconn.Connection/9', expected 'modeconn.Connection/1'",
        ),
        ({"format": "REMOVED"}, "format is None"),
        ({"breakpoints": "REMOVED"}, "connection.json has no 'breakpoints'"),
        ({"breakpoints": 1}, "breakpoints is 1"),
        ({"breakpoints": "7"}, "breakpoints is '7'"),
        ({"breakpoints": 5, "kinds": ["swing"] * 4}, "is no part of a path of 5 breakpoints"),
        ({"kinds": ["swing"]}, "kinds is not a list of 6 words"),
        ({"kinds": ["swing"] * 5 + ["jump"]}, "'jump'"),
        ({"certificate": {}}, "not a certificate: KeyError: 'format'"),
        ({"test_certificate": 3}, "not a certificate"),
        ({"model": 3}, "model is no text"),
        ({"details": []}, "details are no table"),
        (
            {"sha256": "0"},
            "breakpoints.safetensors is not the file that connection.json was written with",
        ),
    ],
)
def test_a_changed_connection_json(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ModeconnError, match=message.replace(".", r"\.").replace("[", r"\[")):
        Connection.load(saved)


def test_truncated_and_missing_files(saved, tmp_path):
    text, weights = (saved / CONTENT).read_bytes(), (saved / BREAKPOINTS).read_bytes()
    for name, content, message in [
        (CONTENT, text[:-20], "connection.json: truncated or damaged"),
        (CONTENT, b"\xff\xfe", "connection.json: truncated or damaged"),
        (CONTENT, b"[1]", "holds a list, expected a table"),
        (BREAKPOINTS, weights[:-4], "breakpoints.safetensors: truncated or damaged"),
        (BREAKPOINTS, b"", "breakpoints.safetensors: is empty"),
    ]:
        (saved / CONTENT).write_bytes(text)
        (saved / BREAKPOINTS).write_bytes(weights)
        (saved / name).write_bytes(content)
        with pytest.raises(ModeconnError, match=message):
            Connection.load(saved)
    for name in (BREAKPOINTS, CONTENT):
        (saved / name).unlink()
        with pytest.raises(ModeconnError, match=f"has no {name}"):
            Connection.load(saved)
    for folder, problem in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "is a file"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(ModeconnError, match=problem):
            Connection.load(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / BREAKPOINTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


ROWS, COLUMNS, VALUES = (f"1/{part}/4.weight" for part in ("rows", "columns", "values"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {ROWS: p[ROWS] + 100}, "rows go from 103 to 105, expected 0 to 6"),
        (lambda p: {ROWS: -p[ROWS]}, "rows go from -5 to -3"),
        (lambda p: {COLUMNS: p[COLUMNS] + 4}, "columns go from"),
        (lambda p: {ROWS: p[ROWS].float()}, r"rows are torch.float32"),
        (lambda p: {ROWS: p[ROWS][:2]}, "values have shape"),
        (
            lambda p: {VALUES: p[VALUES].double()},
            "values are torch.float64, expected torch.float32",
        ),
        (lambda p: {COLUMNS: None}, "has rows, which do not fit 4 dimensions"),
        (lambda p: {VALUES: None}, "the values are missing"),
        (
            lambda p: {"1/values/new": torch.zeros(2)},
            "changes 'new', which the first breakpoint does not have",
        ),
        (lambda p: {"1/power/4.weight": torch.zeros(2)}, "is no part of a path"),
        (lambda p: {"x/values/4.weight": torch.zeros(2)}, "is no part of a path"),
        (
            lambda p: {name: None for name in p if name.startswith("0/")},
            "the first breakpoint is missing",
        ),
        (lambda p: {VALUES: p[VALUES] * math.nan}, "breakpoint 1: weights must be finite"),
    ],
)
def test_breakpoints_that_do_not_fit_together(saved, change, message):
    from modeconn.connection.connection import _sha256

    packed = tensors_of(saved)
    assert packed[ROWS].tolist() == [3, 4, 5]
    packed = {name: value for name, value in (packed | change(packed)).items() if value is not None}
    states.save(packed, saved / BREAKPOINTS)
    rewrite(saved, sha256=_sha256(saved / BREAKPOINTS))
    with pytest.raises(ModeconnError, match=message):
        Connection.load(saved)


def test_where_a_connection_is_not_written(made, tmp_path):
    _, connection = made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for target, message in [
        ("full", "holds something else than a connection"),
        ("file", "holds something else than a connection"),
        ("no/where", "there is no folder"),
    ]:
        with pytest.raises(ModeconnError, match=message):
            connection.save(tmp_path / target)
    assert sorted(names_in(tmp_path)) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    connection.save(tmp_path / "empty")
    assert Connection.load(tmp_path / "empty").kinds == KINDS


@pytest.mark.parametrize(
    "broken", ["modeconn.parameters.state.save", "modeconn.connection.connection.atomic_write"]
)
@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_save_leaves_what_was_there(made, tmp_path, monkeypatch, broken, before):
    _, connection = made
    target = tmp_path / "c"
    if before:
        connection.save(target)
    changed = dataclasses.replace(connection, model="other")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        changed.save(target)
    monkeypatch.undo()
    assert names_in(tmp_path) == (["c"] if before else [])
    if before:
        assert Connection.load(target).model == "mine:net"


def test_a_replacement_that_fails_puts_the_old_one_back(made, tmp_path, monkeypatch):
    _, connection = made
    connection.save(tmp_path / "c")
    real = Path.rename

    def rename(self, target):
        if self.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(files, "_swapped", lambda one, other: False)  # as not on Linux
    with pytest.raises(ModeconnError, match="cannot be written: No space left on device"):
        dataclasses.replace(connection, model="other").save(tmp_path / "c")
    monkeypatch.undo()
    assert names_in(tmp_path) == ["c"]
    assert Connection.load(tmp_path / "c").model == "mine:net"
