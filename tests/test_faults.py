"""The n-th allocation, write, rename, data item or call of the engine fails, for every n."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from fault_cases import MEMORY, Rows, Survival, contents, failing
from fuzz.check import described, digest
from modeconn import cli, resuming
from modeconn.backends.native import extension as native
from modeconn.capture import export
from modeconn.capture.optimisations import without
from modeconn.errors import OutOfMemory
from modeconn.models import build
from modeconn.parameters import state
from modeconn.training.train import train
from naive import mlp

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 3
A, B = mlp(6, 8, 3), mlp(6, 8, 3, seed=1)
DATA = Rows(X, Y)
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ extension")
LAUNCH = pytest.param("launch", marks=needs_native)
DISK = ["write", "fsync", "rename", "open"]


@pytest.fixture(autouse=True)
def writes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "SECONDS_BETWEEN_WRITES", 0.0)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """What is there before."""
    folder = tmp_path / "before"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    return folder


def user_state() -> object:
    tensors = [*A.state_dict().values(), *B.state_dict().values(), X, Y]
    return digest(tensors), [described(module) for module in (*A.modules(), *B.modules())]


def evaluated(folder: Path) -> mc.PathResult:
    line = mc.Line(A, B)
    backend = "native" if native.available() else "reference"
    return mc.evaluate(
        A, line, DATA, 3, resume=folder / "sums", batch_size=24, backend=backend, progress=False
    )


def same_result(folder: Path) -> None:
    np.testing.assert_array_equal(evaluated(folder).loss, EXPECTED)


EXPECTED = mc.evaluate(A, mc.Line(A, B), (X, Y), 3, batch_size=24).loss


@pytest.mark.parametrize("kind", ["allocation", *DISK, "item", LAUNCH])
def test_evaluate_with_resume(kind: str, template: Path, tmp_path: Path):
    survival = Survival(
        same_result,
        (mc.ModeconnError, MemoryError, OSError, RuntimeError),
        lambda file: file.name == "mine.txt",
        ("sums", ".sums"),
        user_state,
        limit=30,
    )
    steps = survival.of(kind, template, tmp_path, DATA)
    assert steps >= {"allocation": 30, "item": 48}.get(kind, 2)


@pytest.mark.parametrize("kind", DISK)
@pytest.mark.parametrize("name", ["result.npz", "result.json"])
def test_save(kind: str, name: str, template: Path, tmp_path: Path):
    result = mc.evaluate(A, mc.Line(A, B), (X, Y), 3)
    mc.PathResult(t=[0.0], values={"loss": [1.0]}, samples=1, passes=1, backend="", seconds=0).save(
        template / name
    )
    old = contents(template)[name]
    seen = []

    def whole(file: Path) -> None:
        if file.name == name:
            seen.append(mc.PathResult.load(file).loss.tolist())

    survival = Survival(
        lambda folder: result.save(folder / name), (mc.ModeconnError,), whole, same=user_state
    )
    assert survival.of(kind, template, tmp_path) >= 1
    # every new file was the complete one, and the old one was there otherwise
    assert seen and all(losses == result.loss.tolist() for losses in seen)
    assert contents(template)[name] == old


SETTINGS = {"lr": 0.1, "epochs": 2, "batch_size": 24, "stop_at_zero_error": False}


def trained(folder: Path) -> None:
    model = build("mlp:6-8-3")
    model.load_state_dict(A.state_dict())
    resume = (folder / "net.safetensors.training").exists()
    file = folder / "net.safetensors"
    train(model, (X, Y), checkpoint=file, resume=resume, **SETTINGS)
    found = state.load(file)
    assert all(torch.equal(found[name], value) for name, value in TRAINED.items())


def weights_after_two_epochs() -> dict[str, torch.Tensor]:
    model = build("mlp:6-8-3")
    model.load_state_dict(A.state_dict())
    train(model, (X, Y), **SETTINGS)
    return model.state_dict()


TRAINED = weights_after_two_epochs()


@pytest.mark.parametrize("kind", ["allocation", *DISK])
def test_train(kind: str, template: Path, tmp_path: Path):
    survival = Survival(
        trained,
        (mc.ModeconnError, RuntimeError),
        lambda file: file.suffix == ".safetensors" and state.load(file),
        ("net.safetensors.training", ".net.safetensors.training"),
        user_state,
        limit=20,
    )
    assert survival.of(kind, template, tmp_path) >= 3


def connected(folder: Path) -> None:
    connection = mc.connect(
        A, A, B, (X, Y), subnetworks="readout", target=9.0, folder=folder / "search"
    )
    connection.save(folder / "connection")


@pytest.mark.parametrize("kind", ["allocation", *DISK, "mkdir"])
def test_connect(kind: str, template: Path, tmp_path: Path):
    survival = Survival(
        connected,
        (mc.ModeconnError, RuntimeError),
        lambda file: mc.Connection.load(file.parent) if file.parent.name == "connection" else None,
        ("search", ".search", ".connection.lock"),
        user_state,
        limit=8,
    )
    assert survival.of(kind, template, tmp_path) >= 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, files = tmp_path_factory.mktemp("ends"), []
    for seed in range(3):
        torch.manual_seed(seed)
        files.append(str(folder / f"{seed}.safetensors"))
        state.save(build("mlp:64-8-10").state_dict(), files[-1], {"model": "mlp:64-8-10"})
    return files


MIX = ["--grid", "2", "--out", "best.safetensors", "--save", "r.npz", "--json", "r.json"]
PLANE = ["--points", "2", "--save", "r.npz", "--json", "r.json"]


@pytest.mark.parametrize("kind", [*DISK, LAUNCH])
@pytest.mark.parametrize("words", [["mix", *MIX], ["plane", *PLANE]], ids=["mix", "plane"])
def test_commands(words, kind: str, checkpoints, template, tmp_path, monkeypatch, capsys):
    command = [words[0], *checkpoints, "--data", "digits", "--limit", "40", "--quiet", *words[1:]]

    def operation(folder: Path) -> None:
        monkeypatch.chdir(folder)
        code = cli.main(command)
        said = capsys.readouterr()
        assert said.out == "" and "Traceback" not in said.err
        if code:
            assert said.err.startswith("modeconn: error: ") and said.err.count("\n") == 1
            raise mc.ModeconnError(said.err.strip())

    def whole(file: Path) -> None:
        if file.suffix == ".safetensors":
            state.load(file)
        elif file.name.startswith("r."):
            assert np.isfinite(mc.PathResult.load(file).loss).all()

    survival = Survival(operation, (mc.ModeconnError,), whole, ("r.npz.", ".r.npz."), limit=4)
    survival.of(kind, template, tmp_path)


def test_memory_that_runs_out_in_a_capture_is_not_taken_for_a_model_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
):
    model = mlp(6, 7, 3)
    with monkeypatch.context() as patch:

        def no_memory(*args: object) -> None:
            raise RuntimeError(MEMORY)

        patch.setattr(export, "_export", no_memory)
        with without("direct"), pytest.raises(RuntimeError, match="allocate memory"):
            mc.evaluate(model, mc.Line(model, mlp(6, 7, 3, seed=1)), (X, Y), 3)
    result = mc.evaluate(model, mc.Line(model, mlp(6, 7, 3, seed=1)), (X, Y), 3)
    assert result.info["fallback"] == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("buffers", ["interpolate", "recompute"])
def test_what_asked_for_how_much_memory_is_said(buffers: str):
    """A network whose forward wants a petabyte, once it has been captured."""

    class Hungry(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 4 and float(x.sum()) > -1e30:
                return super().forward(x) + torch.empty(1 << 50).sum()
            return super().forward(x)

    model = nn.Sequential(Hungry(6, 3), nn.BatchNorm1d(3))
    path, words = mc.Line(model, mc.load(model)), f"with 24 rows: .*allocate {4 << 50} bytes"
    with pytest.raises(OutOfMemory, match=words) as caught:
        mc.evaluate(model, path, (X, Y), 2, batch_size=24, buffers=buffers)
    # as handlers of Python's, PyTorch's and our own errors expect it
    assert isinstance(caught.value, mc.ModeconnError) and isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, RuntimeError) and "\n" not in str(caught.value)


def test_the_command_line_says_that_memory_ran_out(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["evaluate", *checkpoints[:2], "--data", "digits", "--limit", "40", "--points", "2"]
    with failing("launch", 1) if native.available() else pytest.skip("no C++ extension"):
        assert cli.main(line) == 1
    error = capsys.readouterr().err
    words = "out of memory while 2 points were evaluated with 40 rows: std::bad_alloc: expected a "
    assert error.startswith(f"modeconn: error: {words}smaller batch_size (--batch-size)")
