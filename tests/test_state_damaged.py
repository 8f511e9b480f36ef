"""Files that hold no checkpoint: refused in one line, and never run as code."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeconn.errors import ModeconnError
from modeconn.parameters import state
from refused import refused
from state_cases import assert_same, network, weights


class Loud:
    """An object whose unpickling writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


# -----------------------------------------------------------------------------------------------
# files


def packed(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def tar_of(content: bytes) -> bytes:
    def write(stream):
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"), io.BytesIO(content))

    return packed(write)


def zip_of(*names: str) -> bytes:
    def write(stream):
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return packed(write)


ZIP = packed(lambda stream: torch.save(weights(), stream))
OLD = packed(lambda stream: torch.save(weights(), stream, _use_new_zipfile_serialization=False))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty (0 bytes)"]),
        (LFS, ["git-lfs pointer", "git lfs pull"]),
        (b"<!DOCTYPE html><html>Sign in</html>", ["web page"]),
        (b"just some text", ["b'just some te'"]),
        (pickle.dumps({"w": np.ones(3)}, protocol=4), ["pickle", "run code"]),
        (tar_of(b"x"), ["tar archive"]),
        (
            packed(lambda stream: np.savez(stream, w=np.ones(3))),
            ["zip archive", "w.npy", "torch.save"],
        ),
        (zip_of("a/constants.pkl", "a/data.pkl"), ["TorchScript", "torch.jit.load"]),
        (ZIP[: len(ZIP) // 2], ["truncated", f"{len(ZIP) // 2:,} bytes"]),
        (ZIP[:-1], ["truncated", f"{len(ZIP) - 1:,} bytes"]),
        (OLD[:-1], ["truncated", f"{len(OLD) - 1:,} bytes"]),
        (OLD[:15] + b"\xff" * 20, ["truncated or damaged", "35 bytes", "cannot be decoded"]),
        (packed(lambda stream: torch.save([torch.ones(1)], stream)), ["list", "state dict"]),
        (packed(lambda stream: torch.save(torch.ones(1), stream)), ["Tensor", "state dict"]),
        (packed(lambda stream: torch.save({}, stream)), ["no entries"]),
        (packed(lambda stream: torch.save({"epoch": 3}, stream)), ["'epoch' is int"]),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, words: list[str]):
    file = tmp_path / "a.pt"
    file.write_bytes(content)
    with refused(str(file), *words):
        state.load(file)


@pytest.mark.parametrize("keep", [5, 20, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, keep: int):
    file = tmp_path / "a.safetensors"
    save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with refused(str(file), "expected a .safetensors" if keep == 5 else "truncated"):
        state.load(file)


def test_a_missing_file_is_refused(tmp_path: Path):
    with refused(str(tmp_path / "a.pt"), "no such file"):
        state.load(tmp_path / "a.pt")


def test_a_folder_is_refused_with_what_is_in_it(tmp_path: Path):
    with refused(str(tmp_path), "is a folder"):
        state.load(tmp_path)
    save_file(weights(), tmp_path / "best.safetensors")
    with refused(str(tmp_path), "is a folder", "best.safetensors"):
        state.load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused_and_the_recipe_in_the_message_works(
    tmp_path: Path, monkeypatch, zipped: bool
):
    monkeypatch.chdir(tmp_path)
    torch.save(network(), "module.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModeconnError, match=r"module\.pt: a whole module: reading torch\.nn\.modules"
    ) as caught:
        state.load("module.pt")
    recipe = str(caught.value).partition("convert it once: ")[2]
    eval(recipe, {"torch": torch})
    assert_same(state.load("weights.pt"), weights())


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, zipped: bool):
    mark = tmp_path / "mark"
    for content in ({"state_dict": weights(), "x": Loud(mark)}, Loud(mark)):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with refused(
            "a.pt", f"{os.mkdir.__module__}.mkdir", "can run code", "if you trust the file"
        ):
            state.load(tmp_path / "a.pt")
        assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()  # so the trap works


def test_objects_beside_the_weights_are_refused_and_the_recipe_works(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"state_dict": weights(), "hyper_parameters": argparse.Namespace(lr=0.1)}, "last.ckpt"
    )
    with pytest.raises(
        ModeconnError, match=r"not weights alone: reading argparse\.Namespace can run"
    ) as caught:
        state.load("last.ckpt")
    eval(str(caught.value).partition("convert it once: ")[2], {"torch": torch})
    assert_same(state.load("weights.pt"), weights())


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_any_damage_gives_a_state_or_one_clear_line(tmp_path_factory, data: st.DataObject):
    """No other exception, whatever bytes are lost or changed."""
    small = {"w": torch.ones(2)}
    form = data.draw(st.sampled_from(["zip", "old", "safetensors"]))
    file = tmp_path_factory.getbasetemp() / "damaged"
    if form == "safetensors":
        save_file(small, file)
    else:
        torch.save(small, file, _use_new_zipfile_serialization=form == "zip")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = state.load(file)
    except ModeconnError as error:
        message = str(error)
    else:
        message = (
            str(file) if all(isinstance(value, torch.Tensor) for value in found.values()) else ""
        )
    assert str(file) in message
    assert "\n" not in message


def test_the_real_checkpoints_load_and_match(shared: Path):
    files = sorted((shared / "checkpoints").glob("mnist-*.safetensors"))
    assert len(files) == 2
    states = [state.load(file) for file in files]
    state.match(states, [file.name for file in files])
    for one, file in zip(states, files, strict=True):
        state.check(one, file.name)
        assert_same(one, load_file(file))
    assert states[0]["0.weight"].shape == (245, 784)
    other = next((shared / "checkpoints").glob("cifar10-*.safetensors"))
    with refused(other.name, files[0].name, "'0.weight' is missing", "more"):
        state.match([states[0], state.load(other)], [files[0].name, other.name])
