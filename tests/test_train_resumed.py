"""Trainings stopped and resumed: bitwise the uninterrupted one, and files that stay whole."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import train_cases
from modeconn import resuming
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.parameters import state
from modeconn.training import checkpoint as training_state
from modeconn.training.checkpoint import training_file
from modeconn.training.loop import Epoch, Stopped
from train_cases import SPEC, assert_same, network, noisy, run, weights

# Fixtures.
digits = train_cases.digits


# ---------------------------------------------------------------- files


def test_the_checkpoint_holds_the_weights_and_says_how_they_were_made(digits, tmp_path: Path):
    model, file = network(), tmp_path / "a.safetensors"
    report = run(model, digits, checkpoint=file, metadata={"model": SPEC})
    assert_same(load_file(file), weights(model))
    with safe_open(file, framework="pt") as archive:
        about = archive.metadata()
    assert about["model"] == SPEC
    assert about["seed"] == "3"
    assert float(about["loss"]) == report.loss
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


class Stop(Exception):
    """Ends a training from outside, as a crash would: no clean-up of the training's own."""


def stop_after(epochs: int, how: type[BaseException]) -> Callable[[Epoch], None]:
    def log(epoch: Epoch) -> None:
        if epoch.epoch == epochs:
            raise how

    return log


@pytest.mark.parametrize("make", [network, noisy])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resumed_is_bitwise_the_same_as_uninterrupted(digits, tmp_path: Path, make, momentum):
    whole = make()
    run(whole, digits, momentum=momentum)
    file = tmp_path / "a.safetensors"
    interrupted = make()
    with pytest.raises(
        KeyboardInterrupt, match=r"a\.safetensors\.training keeps the training up to epoch 2"
    ):
        run(
            interrupted,
            digits,
            momentum=momentum,
            checkpoint=file,
            log=stop_after(2, KeyboardInterrupt),
        )
    assert not file.exists()
    resumed = make()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.fill_(7)  # the initial weights must not matter
    seen: list[Epoch] = []
    run(resumed, digits, momentum=momentum, checkpoint=file, resume=True, log=seen.append)
    assert [epoch.epoch for epoch in seen] == [3, 4, 5, 6]
    assert_same(weights(resumed), weights(whole))
    assert_same(load_file(file), weights(whole))
    assert not training_file(file).exists()


class Interrupting(nn.Module):
    """Raises KeyboardInterrupt in the middle of an epoch, behind some of its steps."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner, self.left = inner, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.inner(x)


# 300 samples in batches of 64 are five calls an epoch, after one that checks the shapes.
@pytest.mark.parametrize(("call", "finished"), [(2 + 5 * 2 + 3, 2), (1 + 5, 0)])
def test_an_interrupt_within_an_epoch_goes_back_to_the_last_whole_one(
    digits, tmp_path, call, finished
):
    reference = Interrupting(network(), -1)
    if finished:
        run(reference, digits, epochs=finished)
    model, file = Interrupting(network(), call), tmp_path / "a.safetensors"
    message = (
        f"the training up to epoch {finished}"
        if finished
        else "interrupted in the first epoch, nothing was saved"
    )
    with pytest.raises(KeyboardInterrupt, match=message):
        run(model, digits, checkpoint=file)
    assert_same(weights(model), weights(reference))
    assert training_file(file).exists() == bool(finished)
    assert not file.exists()


def test_an_interrupt_without_a_checkpoint_leaves_the_last_whole_epoch_in_the_model(digits):
    reference, model = network(), network()
    run(reference, digits, epochs=2)
    with pytest.raises(KeyboardInterrupt, match="the model has the weights after epoch 2"):
        run(model, digits, log=stop_after(2, KeyboardInterrupt))
    assert_same(weights(model), weights(reference))


def test_a_training_interrupted_after_its_last_epoch_ends_where_it_would_have(
    digits, tmp_path: Path
):
    """Zero error is decided by what is saved, so a resume does not train on past it."""
    settings = {"lr": 0.1, "epochs": 200}
    whole, file = network(), tmp_path / "a.safetensors"
    report = run(whole, digits, **settings)
    assert report.stopped is Stopped.ZERO_ERROR
    stopped = network()
    with pytest.raises(KeyboardInterrupt):
        run(
            stopped,
            digits,
            **settings,
            checkpoint=file,
            log=stop_after(report.epochs, KeyboardInterrupt),
        )
    resumed = network()
    assert run(resumed, digits, **settings, checkpoint=file, resume=True).epochs == report.epochs
    assert_same(weights(resumed), weights(whole))


def test_more_epochs_can_follow(digits, tmp_path: Path):
    whole, file = network(), tmp_path / "a.safetensors"
    run(whole, digits, epochs=4)
    first = network()
    with pytest.raises(Stop):
        run(first, digits, epochs=1, checkpoint=file, log=stop_after(1, Stop))
    again = network()
    run(again, digits, epochs=4, checkpoint=file, resume=True)
    assert_same(weights(again), weights(whole))


def unfinished(data, file: Path, **settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(network(), data, checkpoint=file, log=stop_after(2, KeyboardInterrupt), **settings)


def test_an_unfinished_training_is_not_overwritten(digits, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    unfinished(digits, file)
    before = training_file(file).read_bytes()
    with pytest.raises(
        ModeconnError, match=r"a\.safetensors\.training holds an unfinished training"
    ):
        run(network(), digits, checkpoint=file)
    assert training_file(file).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.06}, r"started with lr 0\.05, not 0\.06"),
        ({"seed": 4}, "started with seed 3, not 4"),
        ({"batch_size": 65}, "started with batch_size 64, not 65"),
        ({"epochs": 1}, "has 2 epochs, more than epochs = 1"),
        ({"data": "shorter"}, "started with samples 300, not 299"),
        ({"data": "other"}, "started with other data"),
        (
            {"model": "mlp:64-33-10"},
            r"does not match the model .* '0.weight' is \[32, 64\], expected \[33, 64\]",
        ),
    ],
)
def test_a_resume_with_other_settings_data_or_model_is_refused(
    digits, tmp_path: Path, change, message
):
    file = tmp_path / "a.safetensors"
    unfinished(digits, file)
    before = training_file(file).read_bytes()
    data = {
        "shorter": datasets.load("digits", limit=299),
        "other": datasets.load("digits", limit=300, mean=0.5),
    }.get(change.pop("data", ""), digits)
    model = network(spec=change.pop("model", SPEC))
    with pytest.raises(ModeconnError, match=message) as caught:
        run(model, data, checkpoint=file, resume=True, **change)
    assert "\n" not in str(caught.value)
    assert training_file(file).read_bytes() == before


def test_a_broken_or_missing_training_state_is_one_clear_line(digits, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(ModeconnError, match="no such file, so there is no training to resume"):
        run(network(), digits, checkpoint=file, resume=True)
    with pytest.raises(ModeconnError, match="resume needs a checkpoint"):
        run(network(), digits, resume=True)
    unfinished(digits, file)
    whole = training_file(file).read_bytes()
    for content in (b"", whole[:-1], whole[:100], b"\x80\x04\x95", b"not a training state"):
        training_file(file).write_bytes(content)
        with pytest.raises(ModeconnError, match="is no unfinished training"):
            run(network(), digits, checkpoint=file, resume=True)
    state.save(
        network().state_dict(), training_file(file), {"record": json.dumps({"format": "other"})}
    )
    with pytest.raises(ModeconnError, match="has format 'other', expected 'modeconn"):
        run(network(), digits, checkpoint=file, resume=True)


def train_for_ever(file: Path) -> None:
    """Train in a forked process, which begins at once, and save the state all the time."""
    try:
        torch.set_num_threads(1)
        resuming.SECONDS_BETWEEN_WRITES = 0.0
        data = torch.randn(300, 64), torch.randint(10, (300,))
        settings = {"lr": 0.001, "epochs": 10**6, "stop_at_zero_error": False}
        run(network(spec="mlp:64-400x3-10"), data, checkpoint=file, **settings)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_old_files_are_whole(tmp_path: Path):
    """A training that always saves its state: a kill leaves a whole one, and the old checkpoint."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"an older checkpoint")
    epochs = []
    for _ in range(2):
        training_file(file).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            train_for_ever(file)
        deadline = time.monotonic() + 600
        while not training_file(file).exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the training has ended"
            assert time.monotonic() < deadline, "no training state within ten minutes"
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert file.read_bytes() == b"an older checkpoint"
        with safe_open(training_file(file), framework="pt") as archive:
            about = json.loads(archive.metadata()["record"])
            for key in archive.keys():  # noqa: SIM118  # it is no dict
                assert archive.get_tensor(key).isfinite().all()
        epochs.append(about["state"]["epoch"])
    assert min(epochs) >= 1


def test_a_full_disk_leaves_the_old_files(digits, tmp_path: Path, monkeypatch):
    file = tmp_path / "a.safetensors"
    unfinished(digits, file)
    before = training_file(file).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises((OSError, ModeconnError), match="No space left"):
        run(network(), digits, checkpoint=file, resume=True)
    assert training_file(file).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [training_file(file).name]


def test_states_are_written_at_most_every_few_seconds(digits, tmp_path: Path, monkeypatch):
    written: list[int] = []
    save = training_state.save

    def counting(last: training_state.Snapshot, *rest) -> None:
        written.append(last.epoch)
        save(last, *rest)

    monkeypatch.setattr(training_state, "save", counting)
    run(network(), digits, checkpoint=tmp_path / "a.safetensors")
    assert written == [1], "six short epochs take less than the time between saves"
    monkeypatch.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", 0.0)
    run(network(), digits, checkpoint=tmp_path / "b.safetensors")
    assert written[1:] == [1, 2, 3, 4, 5, 6]
