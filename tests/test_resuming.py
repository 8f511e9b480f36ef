"""Records of unfinished computations: equal settings continue, all else is one clear error."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from modeconn import resuming
from modeconn.parameters import state
from modeconn.resuming import Record, claim
from refused import refused

SETTINGS = {"lr": 0.1, "shape": (2, 3), "seed": 1}
TENSORS = {"sums": torch.arange(3.0, dtype=torch.float64)}


def older_sums(file: Path) -> None:
    with file.open("wb") as stream:
        np.savez(stream, meta=np.array("{}"))


def record(file: Path | None, **changes: object) -> Record:
    return Record(file, "unfinished training", {**SETTINGS, **changes})


def test_what_is_written_is_read_again(tmp_path: Path):
    file = tmp_path / "a"
    assert record(file).read() == ({}, {}) and not record(file).exists
    record(file).write(TENSORS, {"epoch": 3})
    tensors, kept = record(file).read()
    assert torch.equal(tensors["sums"], TENSORS["sums"]) and kept == {"epoch": 3}
    record(file).remove()
    assert not list(tmp_path.iterdir())


def test_without_a_file_nothing_is_kept():
    nothing = record(None)
    nothing.write(TENSORS, {})
    nothing.remove()
    assert not nothing.exists and not nothing.due and nothing.read() == ({}, {})


def test_the_first_write_is_due_at_once_and_the_next_one_later(tmp_path: Path, monkeypatch):
    kept = record(tmp_path / "a")
    assert kept.due
    kept.write(TENSORS, {})
    assert not kept.due
    monkeypatch.setattr(resuming, "SECONDS_BETWEEN_WRITES", 0.0)
    assert kept.due


def test_other_settings_are_named(tmp_path: Path):
    file = tmp_path / "a"
    record(file).write(TENSORS, {})
    with refused("holds another unfinished training, started with lr 0.1, not 0.2; seed 1, not 2"):
        record(file, lr=0.2, seed=2).read()
    with refused("started with other shape", str(file)):
        record(file, shape=(2, 4)).read()
    with refused("started with more None, not 5"):
        record(file, more=5).read()
    with refused("is no unfinished evaluation, it is a record of the kind 'unfinished training'"):
        Record(file, "unfinished evaluation", SETTINGS).read()


@pytest.mark.parametrize(
    ("version", "write"),
    [
        ("modeconn.training/1", lambda f: state.save(TENSORS, f, {"training": "{}"})),
        (
            "modeconn.record/1",
            lambda f: state.save(TENSORS, f, {"record": '{"format": "modeconn.record/1"}'}),
        ),
        ("modeconn.fit/1", lambda f: state.save(TENSORS, f, {"fit": "[]"})),
        (
            "modeconn.record/9",
            lambda f: state.save(TENSORS, f, {"record": '{"format": "modeconn.record/9"}'}),
        ),
        ("modeconn.unfinished/1", older_sums),
    ],
)
def test_other_versions_are_named(tmp_path: Path, version: str, write):
    file = tmp_path / "a"
    write(file)
    with refused(f"has format '{version}', expected 'modeconn.record/2'", str(file)):
        record(file).read()


@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x03\x04 no archive"])
def test_other_files_are_no_record(tmp_path: Path, content: bytes):
    file = tmp_path / "a"
    file.write_bytes(content)
    with refused("is no unfinished training", str(file)):
        record(file).read()
    state.save(TENSORS, file)
    with refused("is no unfinished training, it has no settings"):
        record(file).read()


def test_what_killed_writers_left_is_swept_and_what_others_write_is_not(tmp_path: Path):
    names = (".a.01234567.tmp", ".a.76543210.tmp", ".a.89abcdef.tmp", ".b.01234567.tmp")
    old, new, written, other = (tmp_path / name for name in names)
    for file in (old, new, written, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (0, 0))
    with written.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)  # as a living writer holds it
        record(tmp_path / "a")
        assert sorted(tmp_path.iterdir()) == sorted([written, other])
    record(tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == [other]


def test_a_folder_is_claimed_once(tmp_path: Path):
    folder = tmp_path / "new" / "search"
    settings = {"seed": 1, "sums": [1.0, 2.0]}
    claim(folder, "search.json", "search", settings)
    (folder / "fit").write_bytes(b"")
    claim(folder, "search.json", "search", {"seed": 1, "sums": (1.0, 2.0)})
    with refused(f"{folder} holds another search, started with seed 1, not 2"):
        claim(folder, "search.json", "search", {**settings, "seed": 2})
    near = {**settings, "sums": [1.0, 2.0 + 1e-7]}
    with refused("started with other sums"):
        claim(folder, "search.json", "search", near)
    claim(folder, "search.json", "search", near, approximate=("sums",))
    (folder / "search.json").write_text("[1]")
    with refused("does not describe a search"):
        claim(folder, "search.json", "search", settings)


def test_a_folder_of_something_else_is_not_claimed(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / ".search.json.01234567.tmp").write_bytes(b"left by a writer that was killed")
    claim(folder, "search.json", "search", {})
    (folder / "search.json").unlink()
    (folder / "file").write_bytes(b"")
    with refused("is there already and holds no search"):
        claim(folder, "search.json", "search", {})
