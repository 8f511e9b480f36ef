"""Files of curves: read as they were written, and refused where they are something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn.parameters import state
from modeconn.parameters.path_files import NETWORK, digest_of_architecture, metadata_of
from naive import mlp


@pytest.fixture
def nets() -> list[nn.Module]:
    return [mlp(4, 5, 3, seed=k) for k in range(3)]


@pytest.mark.parametrize("kind", [mc.Bezier, mc.PolyChain, mc.Line])
def test_a_path_is_read_as_it_was_written(nets, tmp_path: Path, kind):
    path = kind(*nets[:2]) if kind is mc.Line else kind(nets)
    file = tmp_path / "c.safetensors"
    path.save(file, {"model": "mine"})
    for again in (kind.load(file), mc.load_path(file), mc.load_path(file, model=nets[0])):
        assert type(again) is kind
        for one, other in zip(again.control_points, path.control_points, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    about = metadata_of(file)
    assert about["model"] == "mine" and about["kind"] == kind.__name__
    assert about["bends"] == str(len(path.control_points) - 2)
    others = {mc.Bezier: mc.PolyChain, mc.PolyChain: mc.Line, mc.Line: mc.Bezier}
    with pytest.raises(mc.ModeconnError, match=f"holds a {kind.__name__}, expected a"):
        others[kind].load(file)


def test_a_path_of_another_network_is_refused(nets, tmp_path: Path):
    file = tmp_path / "c.safetensors"
    mc.Bezier(nets).save(file, {NETWORK: digest_of_architecture(nets[0])})
    mc.load_path(file, model=mlp(4, 5, 3, seed=9))
    with pytest.raises(mc.ModeconnError, match="does not match"):
        mc.load_path(file, model=mlp(4, 6, 3))
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(mc.ModeconnError, match="is a path of another network"):
        mc.load_path(file, model=other)


def test_other_files_are_refused(nets, tmp_path: Path):
    file = tmp_path / "c.safetensors"
    state.save(nets[0].state_dict(), file)
    with pytest.raises(mc.ModeconnError, match="holds no path"):
        mc.load_path(file)
    points = {f"{k}/w": torch.ones(2) * k for k in range(3)}
    good = {"format": "modeconn.curve/1", "kind": "Bezier", "bends": "1"}
    for tensors, about, message in [
        ({**points, "w": torch.ones(1)}, good, "entry 'w' is of no control point"),
        ({k: v for k, v in points.items() if k != "1/w"}, good, r"control points \[0, 2\]"),
        (points, {**good, "bends": "2"}, "tell of '2' bends"),
        (points, {**good, "kind": "Spline"}, "of the kind 'Spline'"),
        ({**points, "1/w": torch.ones(3)}, good, "does not match"),
    ]:
        state.save(tensors, file, about)
        with pytest.raises(mc.ModeconnError, match=message):
            mc.load_path(file)
    with pytest.raises(mc.ModeconnError, match="no such file"):
        mc.load_path(tmp_path / "none.safetensors")
