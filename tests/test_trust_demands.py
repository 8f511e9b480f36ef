"""Small files and names that ask for gigabytes are refused before anything is built."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
import torch

from file_cases import TENSORS
from modeconn import cli
from modeconn.data import datasets
from modeconn.models import build
from modeconn.parameters import state
from refused import refused


def test_a_packed_file_is_not_unpacked_beyond_its_header(tmp_path: Path):
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 2, 1, 2)))
    file.write_bytes(gzip.compress(header + bytes(50_000_000)))
    with refused("more bytes; expected 1,584", str(file)):
        datasets.load("mnist", tmp_path)
    huge = bytes((0, 0, 8, 3)) + b"\xff" * 12
    file.write_bytes(gzip.compress(huge + bytes(100)))
    with refused("at most", str(file)):
        datasets.load("mnist", tmp_path)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path):
    torch.save(TENSORS, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as given,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in given.namelist():
            packed.writestr(name, given.read(name))
    with refused("compressed members"):
        state.load(tmp_path / "b.pt")


def test_an_expanded_tensor_is_refused_by_its_storage(tmp_path: Path):
    torch.save({"weight": torch.zeros(1).expand(1 << 20, 1 << 12)}, tmp_path / "a.pt")
    with refused("'weight' [1048576, 4096]", "expanded from 4 in the file"):
        state.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "spec",
    ["mlp:1x9999999999-3", "mlp:99999-90000-10", "gpt:layers=99999999", "vit:layers=1000000"],
)
def test_specs_of_gigabytes_are_refused_with_the_reason(spec: str):
    with refused("expected at most", repr(spec)):
        build(spec)


def test_a_checkpoint_that_names_a_larger_model_is_refused_before_it_is_built(
    tmp_path: Path, capsys, monkeypatch
):
    small = {"0.weight": torch.zeros(3, 64), "0.bias": torch.zeros(3)}
    state.save(small, tmp_path / "a.safetensors", {"model": "mlp:64-5000x8-10"})
    monkeypatch.chdir(tmp_path)
    devices: list[str] = []

    def noting(spec: str) -> torch.nn.Module:
        devices.append(torch.get_default_device().type)
        return build(spec)

    monkeypatch.setattr("modeconn.models.build", noting)
    assert cli.main(["evaluate", "a.safetensors", "a.safetensors", "--data", "digits"]) == 2
    assert "'0.weight' is [3, 64], expected [5000, 64]" in capsys.readouterr().err
    assert devices == ["meta"]
