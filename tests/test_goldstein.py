"""Goldstein's surfaces against plain PyTorch by its rules, in files that both fill in."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import modeconn as mc
from goldstein_cases import drawn, filled, moved
from modeconn.dropin import goldstein

h5py = pytest.importorskip("h5py")
X_RANGE, Y_RANGE = (-1.0, 0.5, 4), (-0.5, 0.5, 3)


def build(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        net[1].running_mean.uniform_(-0.3, 0.3)
        net[1].running_var.uniform_(0.5, 2.0)
        net[1].weight.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    return build(0)


@pytest.fixture(scope="module")
def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(9)
    return DataLoader(
        TensorDataset(torch.rand(22, 1, 6, 6, generator=generator), torch.arange(22) % 4),
        batch_size=8,
    )


def directions(net: nn.Module, kind: str = "weights", count: int = 2) -> list[list[torch.Tensor]]:
    torch.manual_seed(123)
    return [goldstein.create_random_direction(net, kind, "biasbn", "filter") for _ in range(count)]


@pytest.fixture
def dir_file(net, tmp_path) -> Path:
    goldstein.write_directions(tmp_path / "dirs.h5", directions(net))
    return tmp_path / "dirs.h5"


@pytest.mark.parametrize("kind", ["weights", "states"])
@pytest.mark.parametrize("ignore", ["", "biasbn"])
@pytest.mark.parametrize("norm", ["", "filter", "layer", "weight", "dfilter", "dlayer"])
def test_a_random_direction_is_the_original_s(net, kind, ignore, norm):
    torch.manual_seed(123)
    expected = drawn(net, kind, ignore, norm)
    torch.manual_seed(123)
    got = goldstein.create_random_direction(net, kind, ignore, norm)
    assert len(got) == len(expected) == (6 if kind == "weights" else 9)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs)


def test_files_of_directions(net, tmp_path):
    made = directions(net)
    goldstein.write_directions(tmp_path / "d.h5", made)
    with h5py.File(tmp_path / "d.h5") as opened:
        assert sorted(opened) == ["xdirection", "ydirection"]
        assert sorted(opened["xdirection"], key=int) == [str(i) for i in range(6)]
    read = goldstein.load_directions(tmp_path / "d.h5", net)
    for axis, expected in zip(read, made):
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(axis, expected))
    (one,) = goldstein.load_directions(_written(tmp_path, [directions(net, "states", 1)[0]]))
    assert one[6].shape == (), "the counter of batches"


def _written(folder: Path, made: list) -> Path:
    goldstein.write_directions(folder / "one.h5", made)
    return folder / "one.h5"


@pytest.mark.parametrize("loss_name", ["crossentropy", "mse"])
def test_a_surface_and_its_flat_order(net, loader, dir_file, tmp_path, loss_name):
    ours, theirs = tmp_path / "ours.h5", tmp_path / "theirs.h5"
    result = goldstein.surface(net, loader, ours, dir_file, X_RANGE, Y_RANGE, loss_name=loss_name)
    with h5py.File(theirs, "w") as opened:
        opened["xcoordinates"] = np.linspace(*X_RANGE)
        opened["ycoordinates"] = np.linspace(*Y_RANGE)
    read = goldstein.load_directions(dir_file)
    assert filled(theirs, net, read, loader, loss_name=loss_name) == 12
    with h5py.File(ours) as one, h5py.File(theirs) as other:
        assert one["train_loss"].shape == (4, 3)
        for key in ("xcoordinates", "ycoordinates", "train_loss", "train_acc"):
            np.testing.assert_allclose(one[key][:], other[key][:], rtol=2e-5)
        assert one["dir_file"][()].decode() == str(dir_file)
    # the fifth value of the flat order is the first of the second row: lowest x, second y
    assert result.t[4].tolist() == [-1.0, 0.0]
    at = moved(net, read, (-1.0, 0.0), "weights")
    x, y = loader.dataset.tensors
    error = float((at(x.double()).argmax(1) != y).double().mean())
    assert result.error[4] == pytest.approx(error)


def test_states_in_one_dimension_between_two_networks(net, loader, tmp_path):
    other = build(1)
    goldstein.write_directions(
        tmp_path / "d.h5", [goldstein.create_target_direction(net, other, "states")]
    )
    options = {"dir_type": "states", "split": "test"}
    with pytest.warns(UserWarning, match="interpolated running statistics"):
        result = goldstein.surface(
            net, loader, tmp_path / "s.h5", tmp_path / "d.h5", (0.0, 1.0, 3), **options
        )
    with h5py.File(tmp_path / "t.h5", "w") as opened:
        opened["xcoordinates"] = np.linspace(0, 1, 3)
    read = goldstein.load_directions(tmp_path / "d.h5")
    filled(tmp_path / "t.h5", net, read, loader, "states", keys=("test_loss", "test_acc"))
    with h5py.File(tmp_path / "t.h5") as opened:
        np.testing.assert_allclose(result.loss, opened["test_loss"][:], rtol=2e-5)
    x, y = loader.dataset.tensors
    assert result.loss[2] == pytest.approx(
        nn.functional.cross_entropy(other(x), y).item(), rel=1e-5
    )


def test_each_fills_in_what_the_other_left(net, loader, dir_file, tmp_path, monkeypatch):
    """Values that are there stay; what is missing (at most 0) is computed, and nothing else."""
    file = tmp_path / "s.h5"
    goldstein.surface(net, loader, file, dir_file, X_RANGE, Y_RANGE)
    with h5py.File(file, "r+") as opened:
        whole = opened["train_loss"][:]
        opened["train_loss"][1, 2] = -1.0
        opened["extra"] = [1, 2]
    read = goldstein.load_directions(dir_file)
    assert filled(file, net, read, loader) == 1
    with h5py.File(file, "r+") as opened:
        np.testing.assert_allclose(opened["train_loss"][:], whole, rtol=2e-5)
        opened["train_loss"][0, 0], opened["train_loss"][3, 1] = -1.0, 0.0
        opened["train_acc"][2, 2] = 77.0  # not computed anew
    points = []
    original = goldstein.evaluate
    monkeypatch.setattr(
        goldstein, "evaluate", lambda n, p, d, t, **k: points.append(t) or original(n, p, d, t, **k)
    )
    goldstein.surface(net, loader, file, dir_file, X_RANGE, Y_RANGE)
    assert len(points[0]) == 2 + 3, "two are missing, and three are looked at again"
    with h5py.File(file) as opened:
        np.testing.assert_allclose(opened["train_loss"][:], whole, rtol=2e-5)
        assert opened["train_acc"][2, 2] == 77.0 and opened["extra"][:].tolist() == [1, 2]
    goldstein.surface(net, loader, file, dir_file, X_RANGE, Y_RANGE)
    assert len(points) == 1, "nothing was missing"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dirs.h5", "s.h5"]


def test_a_script_with_one_import_changed(net, loader, tmp_path):
    """What plot_surface.py does around `crunch`, once with the original's rules, once with ours."""
    args = argparse.Namespace(dir_type="weights", loss_name="crossentropy", cuda=False, ngpu=1)

    def script(crunch, file):
        with h5py.File(file, "w") as opened:
            opened["dir_file"] = "dirs.h5"
            opened["xcoordinates"] = np.linspace(-1, 1, 3)
            opened["ycoordinates"] = np.linspace(-1, 1, 3)
        torch.manual_seed(123)
        d = [drawn(net, "weights", "biasbn", "filter") for _ in range(2)]
        w, s = [p.data for p in net.parameters()], net.state_dict()
        crunch(file, net, w, s, d, loader, "train_loss", "train_acc", None, 0, args)
        with h5py.File(file) as opened:
            return opened["train_loss"][:], opened["train_acc"][:]

    def theirs(file, net, w, s, d, loader, *rest):
        filled(file, net, [[each.numpy() for each in axis] for axis in d], loader)

    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected, got = script(theirs, tmp_path / "a.h5"), script(goldstein.crunch, tmp_path / "b.h5")
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-5)
    np.testing.assert_allclose(got[1], expected[1])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert (
        goldstein.crunch(tmp_path / "none.h5", net, [], {}, [], loader, "a", "b", None, 1) is None
    )


def test_tied_weights_move_together(loader, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 36))
    net[3].weight = net[1].weight
    made = [goldstein.create_random_direction(net, norm="layer")]
    assert len(made[0]) == 3
    at = goldstein.path_along(net, made).at(0.5)
    assert torch.equal(at["1.weight"], at["3.weight"])


# ---------------------------------------------------------------- refusals


def test_a_file_of_another_model(net, loader, dir_file, tmp_path):
    file = tmp_path / "s.h5"
    call = (loader, file, dir_file, X_RANGE, Y_RANGE)
    goldstein.surface(net, *call)
    with h5py.File(file, "r+") as opened:
        opened["train_loss"][0, 0] = -1.0
    before = file.read_bytes()
    with pytest.raises(mc.ModeconnError, match=r"s.h5 is of another model, .*it says so itself"):
        goldstein.surface(build(1), *call)
    with h5py.File(file, "r+") as opened:  # as the original writes it
        for name in list(opened.attrs):
            del opened.attrs[name]
    with pytest.raises(mc.ModeconnError, match=r"another model, .*a loss in it is \d"):
        goldstein.surface(build(1), *call)
    (tmp_path / "s.h5.unfinished").unlink()
    shifted = TensorDataset(
        *(part.roll(1, 0) for part in loader.dataset.tensors[:1]), loader.dataset.tensors[1]
    )
    file.write_bytes(before)
    with pytest.raises(mc.ModeconnError, match=r"another .*data \(a loss in it is \d"):
        goldstein.surface(net, DataLoader(shifted, batch_size=8), *call[1:])
    assert file.read_bytes() == before


def test_directions_of_another_model(net, dir_file, loader, tmp_path):
    wider = nn.Sequential(nn.Conv2d(1, 4, 3), *list(build(0))[1:])
    with pytest.raises(mc.ModeconnError, match=r"xdirection/0 is \[3, 1, 3, 3\], expected \[4, 1"):
        goldstein.surface(wider, loader, tmp_path / "s.h5", dir_file)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(mc.ModeconnError, match=r"has 6 tensors, expected 2 \(weights\)"):
        goldstein.load_directions(dir_file, flat)
    assert not (tmp_path / "s.h5").exists()


def test_what_cannot_be_a_surface(net, loader, dir_file, tmp_path):
    file = tmp_path / "s.h5"
    goldstein.surface(net, loader, file, dir_file, X_RANGE, Y_RANGE)
    with pytest.raises(mc.ModeconnError, match=r"its xcoordinates are -1:0.5:4, and -1:1:51 was"):
        goldstein.surface(net, loader, file, dir_file, y=Y_RANGE)
    with pytest.raises(mc.ModeconnError, match=r"its ycoordinates are -0.5:0.5:3, and none was"):
        goldstein.surface(net, loader, file, dir_file, X_RANGE)
    with pytest.raises(
        mc.ModeconnError, match="has no table 'test_loss'; its tables are train_acc"
    ):
        goldstein.read_surface(file, "test")
    with pytest.raises(mc.ModeconnError, match="has no 'xcoordinates'"):
        goldstein.read_surface(dir_file)
    with pytest.raises(mc.ModeconnError, match="has no group 'xdirection'"):
        goldstein.load_directions(file)
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(file.read_bytes()[:500])
    with pytest.raises(mc.ModeconnError, match="no HDF5 file, or a damaged one"):
        goldstein.read_surface(damaged)
    with pytest.raises(mc.ModeconnError, match="no such file"):
        goldstein.load_directions(tmp_path / "none.h5")
    with h5py.File(file, "r+") as opened:
        del opened["train_loss"]
        opened["train_loss"] = np.ones((2, 2))
    with pytest.raises(
        mc.ModeconnError, match=r"'train_loss' is \(2, 2\), expected numbers \(4, 3"
    ):
        goldstein.read_surface(file)
    one = _written(tmp_path, directions(net, count=1))
    with pytest.raises(mc.ModeconnError, match="has one direction: expected two"):
        goldstein.surface(net, loader, tmp_path / "t.h5", one, X_RANGE, Y_RANGE)
    with pytest.raises(mc.ModeconnError, match="norm is 'rows': expected one of"):
        goldstein.create_random_direction(net, norm="rows")
    with pytest.raises(mc.ModeconnError, match="dir_type is 'buffers'"):
        goldstein.create_random_direction(net, "buffers")


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_on_one_file(net, loader, dir_file, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".s.h5.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(mc.ModeconnError, match="is being written by another command"):
            goldstein.surface(net, loader, tmp_path / "s.h5", dir_file, X_RANGE, Y_RANGE)
        other.stdin.close()
    assert not (tmp_path / "s.h5").exists()


def test_a_file_that_the_original_is_writing(net, loader, dir_file, tmp_path):
    file = tmp_path / "s.h5"
    goldstein.surface(net, loader, file, dir_file, X_RANGE, Y_RANGE)
    hold = (
        "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(mc.ModeconnError, match="is open in another program"):
            goldstein.read_surface(file)
        other.stdin.close()


def test_a_surface_is_drawn_without_a_count_of_samples(net, loader, dir_file, tmp_path):
    pytest.importorskip("matplotlib")
    result = goldstein.surface(net, loader, tmp_path / "s.h5", dir_file, X_RANGE, Y_RANGE)
    assert result.plot().get_title() == "Loss on a plane: 12 points"


def test_without_h5py(net, loader, dir_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(mc.ModeconnError, match=r"pip install 'modeconn\[h5\]'"):
        goldstein.surface(net, loader, tmp_path / "s.h5", dir_file)
