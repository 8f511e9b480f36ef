"""Files of every released version open, with what was in them, or are refused by their version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import modeconn as mc
from compat import make
from modeconn.resuming import FORMAT, Record

VERSIONS = sorted(path for path in make.HERE.iterdir() if path.is_dir() and path.name[0].isdigit())
every_version = pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)


def content(folder: Path) -> dict:
    return json.loads((folder / "content.json").read_text())


def test_this_version_has_its_files():
    assert make.HERE / mc.__version__ in VERSIONS, "python tests/compat/make.py writes them"


@every_version
@pytest.mark.parametrize("name", ["result.npz", "result.json"])
def test_results(folder: Path, name: str):
    result = mc.PathResult.load(folder / name)
    assert result.loss.tolist() == content(folder)["loss"]
    np.testing.assert_allclose(result.loss, make.evaluated().loss, rtol=1e-5)
    assert result.samples == 24 and result.t.tolist() == np.linspace(0, 1, make.POINTS).tolist()


@every_version
def test_checkpoints(folder: Path):
    state = mc.load(folder / "net.safetensors")
    for name, value in make.network(0).state_dict().items():
        torch.testing.assert_close(state[name], value)


@every_version
def test_connections(folder: Path):
    connection = mc.Connection.load(folder / "connection")
    expected = content(folder)
    assert connection.model == make.SPEC
    assert len(connection.path.control_points) == expected["breakpoints"]
    found = mc.verify(make.network(0), connection, make.data())
    assert found.bound == pytest.approx(expected["bound"], rel=1e-5)


def opened(file: Path) -> dict | None:
    """The settings of a record, read with them; None for one that is refused by its version."""
    with safe_open(file, framework="pt") as archive:
        about = json.loads(archive.metadata().get("record", "{}"))
    record = Record(file, about.get("kind", ""), about.get("settings", {}))
    if about.get("format") == FORMAT:
        tensors, _ = record.read()
        assert tensors
        return about["settings"]
    with pytest.raises(mc.ModeconnError, match=r"has format .*: remove it to start anew"):
        record.read()
    return None


@every_version
def test_unfinished_evaluations(folder: Path, tmp_path: Path):
    """The same call goes on from it; with another PyTorch, whose graph differs, it says so."""
    file = tmp_path / "sums.safetensors"
    shutil.copy(folder / file.name, file)
    known = opened(file) is not None
    try:
        result = make.evaluated(resume=file)
    except mc.ModeconnError as error:
        refusal = str(error)
    else:
        refusal = ""
        np.testing.assert_allclose(result.loss, content(folder)["loss"], rtol=1e-5)
    same = known and content(folder)["torch"] == torch.__version__
    assert (refusal == "" and known) or (not same and str(file) in refusal)


@every_version
def test_unfinished_trainings(folder: Path, tmp_path: Path):
    for name in ("trained.safetensors.training",):
        shutil.copy(folder / name, tmp_path / name)
    known = opened(tmp_path / "trained.safetensors.training") is not None
    try:
        make.train_on(tmp_path / "trained.safetensors", resume=True)
    except mc.ModeconnError as error:
        refusal = str(error)
    else:
        refusal = ""
        make.train_on(tmp_path / "again.safetensors")
        again, resumed = (mc.load(tmp_path / f"{n}.safetensors") for n in ("again", "trained"))
        for key, value in again.items():
            torch.testing.assert_close(resumed[key], value)
    same = known and content(folder)["torch"] == torch.__version__
    assert (refusal == "" and known) or (not same and "trained.safetensors" in refusal)
