"""`modeconn plane` and `modeconn mix`, run as a user runs them, on digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import modeconn as mc
from modeconn import models
from modeconn.cli import main
from modeconn.data import datasets
from modeconn.evaluation.evaluator import evaluate
from modeconn.parameters import state

SPEC, LIMIT = "mlp:64-12x2-10", 150
DATA = ("--data", "digits", "--limit", str(LIMIT))


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    names = []
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        names.append(f"{name}.safetensors")
        state.save(models.build(SPEC).state_dict(), names[-1], {"model": SPEC})
    return names


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def images() -> datasets.Images:
    return datasets.load("digits", limit=LIMIT)


@pytest.mark.parametrize("kind", ["random", "through", "trajectory"])
def test_planes(files, kind, capsys):
    pytest.importorskip("matplotlib")
    given = files[:1] if kind == "random" else files
    options = {"random": ["--seed", 3, "--norm", "layer"], "trajectory": ["--trajectory"]}.get(
        kind, []
    )
    pictures = ["--plot", "p.png", "--surface", "s.png"]
    assert run("plane", *given, *DATA, "--points", 4, *options, "--save", "r.npz", *pictures) == 0
    text = capsys.readouterr().out
    assert "16 points, 1 pass" in text and "wrote s.png" in text
    plane = {
        "random": lambda: mc.Plane.random(files[0], seed=3, norm="layer"),
        "through": lambda: mc.Plane.through(*files),
        "trajectory": lambda: mc.Plane.trajectory(files),
    }[kind]()
    expected = evaluate(models.build(SPEC), plane, images(), 4)
    got = mc.PathResult.load("r.npz")
    np.testing.assert_array_equal(got.t, expected.t)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(json.loads(str(got.info["control_points"])), plane.marks)
    assert (
        Path("p.png").stat().st_size
        and Path("s.png").stat().st_size
        and not Path("r.npz.unfinished").exists()
    )


def test_a_part_of_a_plane(files):
    assert (
        run(
            "plane",
            *files,
            *DATA,
            "--points",
            3,
            "--x=-1,2",
            "--y",
            "0.5,0.75",
            "--json",
            "r.json",
            "-q",
        )
        == 0
    )
    t = np.array(json.loads(Path("r.json").read_text())["t"])
    assert sorted(set(t[:, 0])) == [-1.0, 0.5, 2.0] and sorted(set(t[:, 1])) == [0.5, 0.625, 0.75]


def test_an_interrupted_plane_goes_on(files, monkeypatch, capsys):
    """Ctrl-C says what is kept; the same command then does only the rest."""
    from modeconn.backends.native.backend import NativeBackend
    from modeconn.backends.reference import ReferenceBackend

    # parts of 32 rows
    monkeypatch.setattr(sys.modules["modeconn.evaluation.passes"], "_FLOPS_OF_A_PART", 1)
    calls: list[int] = []

    def interrupt(original, after):
        def sums(self, segment, values, targets, head, tick):
            calls.append(len(targets))
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(self, segment, values, targets, head, tick)

        return sums

    command = ("plane", *files, *DATA, "--points", 3, "--save", "r.npz", "-q")
    originals = {backend: backend.sums for backend in (ReferenceBackend, NativeBackend)}
    for after, code in ((2, 130), (100, 0)):
        calls.clear()
        for backend, original in originals.items():
            monkeypatch.setattr(backend, "sums", interrupt(original, after))
        assert run(*command) == code
        if code:
            assert (
                "what is done is in r.npz.unfinished" in capsys.readouterr().err
                and Path("r.npz.unfinished").exists()
            )
    assert calls == [32, 32, 22], "64 of the 150 rows were done"
    expected = evaluate(models.build(SPEC), mc.Plane.through(*files), images(), 3)
    np.testing.assert_allclose(mc.PathResult.load("r.npz").loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize(
    "options, sums",
    [
        ([], 7),
        (["--grid", 4], 15),
        (["--random", 9, "--seed", 5], 10),
        (["--greedy"], 5),
        (["--weights", "w.txt"], 2),
    ],
    ids=["subsets", "grid", "random", "greedy", "weights"],
)
def test_mixtures(files, options, sums, capsys):
    Path("w.txt").write_text("0.5 0.25 0.25\n1, 0, 0\n")
    assert (
        run(
            "mix",
            *files,
            *DATA,
            *options,
            "--by",
            "loss",
            "--out",
            "best.safetensors",
            "--save",
            "r.json",
        )
        == 0
    )
    result = mc.PathResult.load("r.json")
    assert result.t.shape == (sums, 3)
    best = int(result.loss.argmin())
    assert json.loads(str(result.info["best"])) == result.t[best].tolist()
    x, y = images().slice(0, LIMIT)
    for row in {0, best, sums - 1}:
        model = models.build(SPEC).double()
        model.load_state_dict(
            {k: v.double() for k, v in mc.Mixture(files).at(result.t[row]).items()}
        )
        assert result.loss[row] == pytest.approx(
            torch.nn.functional.cross_entropy(model(x.double()), y).item(), rel=1e-5
        )
    written, expected = mc.load("best.safetensors"), mc.Mixture(files).at(result.t[best])
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    assert "a" in capsys.readouterr().out.splitlines()[0]


def test_task_arithmetic(files):
    assert (
        run(
            "mix",
            *files[:2],
            "--base",
            files[2],
            "--scales=-1,0,1",
            *DATA,
            "--json",
            "r.json",
            "-q",
        )
        == 0
    )
    t = np.array(json.loads(Path("r.json").read_text())["t"])
    assert t.shape == (9, 3) and t[0].tolist() == [-1, -1, 3] and t[4].tolist() == [0, 0, 1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_best_is_written_with_its_own_statistics(tmp_path, monkeypatch):
    """With recomputed statistics the checkpoint alone gives the loss that made it the best."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = [nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 10)]\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    model = models.build("normed:net")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        nets = models.build("normed:net")
        state.save(nets.state_dict(), f"{name}.safetensors")
    options = (
        "--model",
        "normed:net",
        *DATA,
        "--buffers",
        "recompute",
        "--batch-size",
        50,
        "--grid",
        2,
    )
    assert (
        run(
            "mix",
            "a.safetensors",
            "b.safetensors",
            *options,
            "--by",
            "loss",
            "--out",
            "m.safetensors",
            "--save",
            "r.npz",
        )
        == 0
    )
    result = mc.PathResult.load("r.npz")
    alone = evaluate(model, mc.Mixture(["m.safetensors"]), images(), [[1.0]])
    assert alone.loss[0] == pytest.approx(result.loss.min(), rel=1e-5)


@pytest.mark.parametrize(
    "says, arguments",
    [
        (
            "a plane goes through 3 checkpoints, or around 1, got 2",
            ("plane", "a.safetensors", "b.safetensors"),
        ),
        (
            "a trajectory needs at least 3",
            ("plane", "a.safetensors", "b.safetensors", "--trajectory"),
        ),
        ("--x is 1.0,0.0: expected LOW,HIGH", ("plane", "a.safetensors", "--x", "1,0")),
        ("--surface s.txt: the name must end in", ("plane", "a.safetensors", "--surface", "s.txt")),
        ("needs at least 2 checkpoints", ("mix", "a.safetensors")),
        (
            "--base and --scales go together",
            ("mix", "a.safetensors", "b.safetensors", "--scales", "0,1"),
        ),
        (
            "--by top5_error: expected one of",
            ("mix", "a.safetensors", "b.safetensors", "--by", "top5_error"),
        ),
        (
            "--out best.pt: the name must end",
            ("mix", "a.safetensors", "b.safetensors", "--out", "best.pt"),
        ),
        (
            "expected a line of 2 numbers",
            ("mix", "a.safetensors", "b.safetensors", "--weights", "w.txt"),
        ),
        (
            "would overwrite the input",
            ("mix", "a.safetensors", "b.safetensors", "--out", "a.safetensors"),
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(files, says, arguments, capsys):
    Path("w.txt").write_text("1 2 3\n")
    before = sorted(Path().iterdir())
    assert run(*arguments, *DATA) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert sorted(Path().iterdir()) == before
