"""Checkpoints written: bit for bit, in place of what was there, or not at all."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modeconn.files.writing import atomic_write
from modeconn.parameters import state
from refused import refused
from state_cases import assert_same, network

# ------------------------------------------------------------------------------------------------
# save

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_saved_is_loaded(tmp_path_factory, shapes):
    generator = torch.Generator().manual_seed(0)
    given = {}
    for name, (shape, dtype, transposed) in shapes.items():
        value = torch.randint(0, 2, shape, generator=generator).to(dtype)
        given[name] = value.mT if transposed and value.ndim >= 2 else value
    file = tmp_path_factory.getbasetemp() / "saved.safetensors"
    state.save(given, file)
    found = load_file(file)
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_special_values_keep_their_bits(tmp_path: Path):
    given = {"w": torch.tensor([-0.0, 1e-45, float("inf"), float("nan")])}
    state.save(given, tmp_path / "a.safetensors")
    assert_same(state.load(tmp_path / "a.safetensors"), given)


def test_tied_and_strided_tensors_are_saved_in_full(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"all": base, "again": base, "row": base[1], "turned": base.t(), "odd": base[:, ::2]}
    state.save(given, tmp_path / "a.safetensors")
    for name, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(value, given[name])


def test_parameters_are_saved_and_metadata_kept(tmp_path: Path):
    state.save(
        dict(network().named_parameters()), tmp_path / "a.safetensors", {"model": "mlp:4-3-2"}
    )
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        about = dict(file.metadata())
    assert len(about.pop("modeconn.sha256")) == 64
    assert about == {"format": "pt", "model": "mlp:4-3-2"}


def test_what_is_no_state_is_not_saved(tmp_path: Path):
    with refused("'epoch' is int"):
        state.save({"epoch": 3}, tmp_path / "a.safetensors")
    with refused("no entries"):
        state.save({}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- atomic
# writing


def test_a_file_is_replaced_by_the_new_content(tmp_path: Path):
    file = tmp_path / "a"
    atomic_write(file, lambda stream: stream.write(b"old"))
    with file.open("rb") as reader:
        atomic_write(file, lambda stream: stream.write(b"new and longer"))
        assert reader.read() == b"old"  # a reader in the middle of the file sees no mixture
    assert file.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException]
):
    file = tmp_path / "a"
    file.write_bytes(b"old")

    def write(stream):
        stream.write(b"half of the new")
        stream.flush()
        assert file.read_bytes() == b"old"
        raise error

    with pytest.raises(error):
        atomic_write(file, write)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    def write(stream):
        raise OSError(28, "No space left on device")

    with refused(str(tmp_path / "a"), "No space left on device"):
        atomic_write(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path):
    def write(stream):
        pytest.fail("nothing can be written here")

    with refused(str(tmp_path), "is a folder"):
        atomic_write(tmp_path, write)
    with refused("no folder", str(tmp_path / "missing")):
        atomic_write(tmp_path / "missing" / "a", write)
    (tmp_path / "file").touch()
    with refused("no folder", str(tmp_path / "file")):
        atomic_write(tmp_path / "file" / "a", write)


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk" / "a"
    target.write_bytes(b"old")
    link.symlink_to(target)
    atomic_write(link, lambda stream: stream.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    (tmp_path / "usual").write_bytes(b"")
    atomic_write(tmp_path / "a", lambda stream: stream.write(b""))
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
