"""`modeconn surface`, run as a user runs it, on digits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import modeconn as mc
from goldstein_cases import drawn, filled
from modeconn import models
from modeconn.cli import main
from modeconn.data import datasets
from modeconn.dropin import goldstein
from modeconn.parameters import state

h5py = pytest.importorskip("h5py")
SPEC, LIMIT = "mlp:64-9-10", 60
DATA = ("--data", "digits", "--limit", str(LIMIT))
NORMS = ("--xnorm", "filter", "--xignore", "biasbn", "--ynorm", "filter", "--yignore", "biasbn")
PLANE = ("--x=-1:1:3", "--y=0:1:2")


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        state.save(models.build(SPEC).state_dict(), f"{name}.safetensors", {"model": SPEC})
    return [f"{name}.safetensors" for name in "abc"]


def run(*arguments: object) -> int:
    return main(["surface", *map(str, arguments)])


def network(file: str) -> torch.nn.Module:
    net = models.build(SPEC).eval()
    net.load_state_dict(mc.load(file))
    return net


def batches() -> list:
    x, y = datasets.load("digits", limit=LIMIT).slice(0, LIMIT)
    return [(x, y)]


def test_a_surface_with_the_original_s_options_and_names(files, capsys):
    """Directions come from the same numbers: the seed, the network's first weights, then they."""
    pytest.importorskip("matplotlib")
    assert run("--model_file", files[0], *DATA, *PLANE, *NORMS, "--plot", "s.png") == 0
    directions = "a.safetensors_weights_xignore=biasbn_xnorm=filter_yignore=biasbn_ynorm=filter.h5"
    name = f"{directions}_[-1.0,1.0,3]x[0.0,1.0,2].h5"
    assert f"wrote {name}" in capsys.readouterr().out
    assert sorted(p.name for p in Path().glob("*.h5")) == sorted([directions, name])
    torch.manual_seed(123)
    models.build(SPEC)
    net = network(files[0])
    torch.manual_seed(123)
    models.build(SPEC)
    expected = [drawn(net, "weights", "biasbn", "filter") for _ in range(2)]
    read = goldstein.load_directions(directions, net)
    for axis, other in zip(read, expected):
        for one, value in zip(axis, other):
            np.testing.assert_allclose(one, value.numpy(), rtol=1e-5)
    with h5py.File("t.h5", "w") as opened:
        opened["xcoordinates"], opened["ycoordinates"] = np.linspace(-1, 1, 3), [0.0, 1.0]
    filled("t.h5", net, read, batches())
    with h5py.File(name) as ours, h5py.File("t.h5") as theirs:
        np.testing.assert_allclose(ours["train_loss"][:], theirs["train_loss"][:], rtol=2e-5)
    assert Path("s.png").stat().st_size


def test_between_networks(files, capsys):
    """x is one network, y the other: the corners are the networks themselves."""
    call = ("--model_file", files[0], "--model_file2", files[1], "--model_file3", files[2])
    assert run(*call, *DATA, "--x=0:1:2", "--y=0:1:2", "--surf_file", "s.h5", "-q") == 0
    assert Path("a.safetensors_b.safetensors_weights_c.safetensors.h5").exists()
    found = goldstein.read_surface("s.h5")
    for corner, file in (((0, 0), files[0]), ((1, 0), files[1]), ((0, 1), files[2])):
        (x, y), net = batches()[0], network(file)
        loss = torch.nn.functional.cross_entropy(net(x), y).item()
        row = found.t.tolist().index([float(c) for c in corner])
        assert found.loss[row] == pytest.approx(loss, rel=1e-5)
    assert capsys.readouterr().out == ""


def test_an_interrupted_surface_goes_on(files, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["modeconn.evaluation.passes"], "_FLOPS_OF_A_PART", 1)
    evaluate, calls = goldstein.evaluate, []

    def interrupted(*arguments, **options):
        def stop(done, total):
            if done > 32:
                raise KeyboardInterrupt

        calls.append(options)
        return evaluate(*arguments, **options | {"progress": stop})

    call = ("--model_file", files[0], *DATA, *PLANE, *NORMS, "--surf_file", "s.h5", "-q")
    monkeypatch.setattr(goldstein, "evaluate", interrupted)
    assert run(*call) == 130
    assert "what is done is in s.h5.unfinished" in capsys.readouterr().err
    assert not Path("s.h5").exists()
    monkeypatch.setattr(goldstein, "evaluate", evaluate)
    assert run(*call) == 0
    assert np.isfinite(goldstein.read_surface("s.h5").loss).all()
    assert not Path("s.h5.unfinished").exists()


def test_another_range_leaves_no_file_behind(files, capsys):
    call = ("--model_file", files[0], *DATA, "--surf_file", "s.h5", "-q")
    assert run(*call, "--x=-1:1:3", "--xnorm", "filter") == 0
    before = sorted(Path().iterdir())
    assert run(*call, "--x=-1:1:5", "--xnorm", "layer") == 2
    assert "its xcoordinates are -1:1:3, and -1:1:5 was asked for" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before
    assert run(*call, "--x=-1:1:3", "--xnorm", "layer", "--split", "test") == 2
    assert "is of another model, direction, loss or data" in capsys.readouterr().err
    assert run(*call, "--x=-1:1:3", "--xnorm", "filter", "--split", "test") == 0
    assert np.isfinite(goldstein.read_surface("s.h5", "test").loss).all()


@pytest.mark.parametrize(
    "says, arguments",
    [
        ("'-1:1' is no range such as -1:1:51", ("--x=-1:1",)),
        ("'1:0:5' is no range", ("--x=1:0:5",)),
        ("--xnorm rows: expected filter, layer", ("--xnorm", "rows")),
        ("--dir_type buffers: expected weights or states", ("--dir_type", "buffers")),
        ("--loss_name l1: expected crossentropy or mse", ("--loss_name", "l1")),
        ("--y is missing", ("--same_dir",)),
        ("b.pt: no such file", ("--model_file2", "b.pt")),
        ("the folder no does not exist", ("--surf_file", "no/s.h5")),
        ("'0.weight' is [8, 64], expected [9, 64]", ("--model_file2", "w.safetensors")),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(files, says, arguments, capsys):
    state.save(models.build("mlp:64-8-10").state_dict(), "w.safetensors")
    before = sorted(Path().iterdir())
    assert run("--model_file", files[0], *DATA, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert sorted(Path().iterdir()) == before
