"""Training: deterministic, stops at zero error, survives interruption, resumes bitwise."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from modeconn import models
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.parameters import state
from modeconn.training import checkpoint as training_state
from modeconn.training.checkpoint import training_file
from modeconn.training.labelled import measure
from modeconn.training.loop import Epoch, Stopped
from modeconn.training.train import TrainReport, train

SPEC = "mlp:64-32-10"


@pytest.fixture(scope="module")
def digits() -> datasets.Images:
    return datasets.load("digits", limit=300)


def network(seed: int = 1, spec: str = SPEC) -> nn.Module:
    model = models.build(spec)
    models.initialise(model, torch.Generator().manual_seed(seed))
    return model


def run(model: nn.Module, data, **settings) -> TrainReport:
    return train(model, data, **{"lr": 0.05, "epochs": 6, "batch_size": 64, "seed": 3} | settings)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


class Noisy(nn.Module):
    """Make a network whose buffers and random draws must survive a resume: batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return Noisy()


# ---------------------------------------------------------------- what it computes


def test_the_steps_are_those_of_torch_sgd(digits):
    """Compare with Nesterov momentum and weight decay, written out in float64."""
    inputs, targets = digits.slice(0, 10)
    inputs = inputs.double()
    model, twin = network().double(), network().double()
    train(
        model, (inputs, targets), lr=0.1, momentum=0.9, weight_decay=0.01, batch_size=10, epochs=3
    )
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for _ in range(3):  # one batch holds all, so their order matters only to rounding
        loss = nn.functional.cross_entropy(twin(inputs), targets)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), gradients, strict=True):
                g = g + 0.01 * p
                velocity[name] = 0.9 * velocity[name] + g
                p -= 0.1 * (g + 0.9 * velocity[name])
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-13)


def test_the_report_measures_the_final_weights(digits):
    model = network()
    test = datasets.load("digits", split="test")
    report = run(model, digits, test=test, epochs=2)
    model.eval()
    for images, loss, error in (
        (digits, report.loss, report.error),
        (test, report.test_loss, report.test_error),
    ):
        inputs, targets = images.slice(0, len(images))
        logits = model.double()(inputs.double()).detach()
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)
        assert error == pytest.approx(
            float((logits.argmax(1) != targets).double().mean()), abs=1e-9
        )
        model.float()
    assert report.epochs == 2
    assert report.stopped is Stopped.EPOCHS


def test_measure_splits_the_data_without_changing_the_result():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(2345, 64, generator=generator),
        torch.randint(10, (2345,), generator=generator),
    )
    model = network().double()
    loss, error = measure(model, (inputs.double(), targets))
    logits = model(inputs.double()).detach()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-12)
    assert error == int((logits.argmax(1) != targets).sum()) / 2345


def test_it_stops_at_zero_training_error():
    data, model = datasets.load("digits"), network()
    seen: list[Epoch] = []
    report = train(model, data, lr=0.1, seed=1, log=seen.append)
    assert report.stopped is Stopped.ZERO_ERROR
    assert report.error == 0
    assert report.epochs == len(seen) < 200
    inputs, targets = data.slice(0, len(data))
    assert torch.equal(model(inputs).argmax(1), targets)
    assert [epoch.epoch for epoch in seen] == list(range(1, report.epochs + 1))
    assert seen[0].loss > seen[-1].loss > 0


def test_it_need_not_stop_at_zero_training_error(digits):
    report = run(network(), digits, epochs=60, lr=0.1, stop_at_zero_error=False)
    assert report.error == 0
    assert report.epochs == 60
    assert report.stopped is Stopped.EPOCHS


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(digits):
    one, two, other = (network() for _ in range(3))
    run(one, digits)
    torch.manual_seed(99)  # the state of the global generator must not matter
    run(two, digits)
    run(other, digits, seed=4)
    assert_same(weights(one), weights(two))
    assert not torch.equal(one.state_dict()["0.weight"], other.state_dict()["0.weight"])


def test_images_and_tensors_are_the_same_data(digits):
    one, two = network(), network()
    run(one, digits, epochs=2)
    run(two, digits.slice(0, len(digits)), epochs=2)
    assert_same(weights(one), weights(two))


def test_the_users_generator_and_modes_are_left_alone(digits):
    model = noisy()
    model.body[4].eval()
    before = torch.random.get_rng_state()
    run(model, digits, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not model.body[4].training


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


KILLED = """
import sys, torch
from modeconn import models, resuming
from modeconn.training import train
resuming.SECONDS_BETWEEN_WRITES = 0
model = models.build("mlp:64-400x3-10")
models.initialise(model, torch.Generator().manual_seed(1))
torch.set_num_threads(1)
data = torch.randn(300, 64), torch.randint(10, (300,))
train.train(model, data, lr=0.001, batch_size=64, seed=3, epochs=10**6,
            stop_at_zero_error=False, checkpoint=sys.argv[1])
"""


def test_killed_at_any_moment_old_files_are_whole(tmp_path: Path):
    """A training that always saves its state: a kill leaves a whole one, and the old checkpoint."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"an older checkpoint")
    epochs = []
    for _ in range(2):
        training_file(file).unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(file)], stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while not training_file(file).exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "no training state within a minute"
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
        process.communicate()
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


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0: expected a positive number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0: expected at least 0 and below 1"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"epochs": 0}, "epochs is 0: expected at least 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_named(digits, tmp_path: Path, settings, message):
    with pytest.raises(ModeconnError, match=message):
        run(network(), digits, checkpoint=tmp_path / "a.safetensors", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "spec", "message"),
    [
        ((torch.zeros(5, 64), torch.zeros(4, dtype=torch.int64)), SPEC, "5 inputs and 4 targets"),
        ((torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64)), SPEC, "0 inputs and 0 targets"),
        (
            (torch.zeros(5, 63), torch.zeros(5, dtype=torch.int64)),
            SPEC,
            r"inputs of shape \[63\] per sample",
        ),
        (
            (torch.zeros(5, 64), torch.full((5,), 10)),
            SPEC,
            "labels run from 10 to 10: expected 0 to 9, as the model has 10 outputs",
        ),
        ((torch.zeros(5, 64), torch.full((5,), -1)), SPEC, "labels run from -1 to -1"),
        ((torch.zeros(5, 64), torch.zeros(5)), SPEC, "expected int64 class numbers"),
        (
            (torch.zeros(5, 64), torch.zeros(5, dtype=torch.int64)),
            "torch.nn:Flatten",
            "Flatten has no parameters",
        ),
        (
            (torch.zeros(5, 64), torch.zeros(5, dtype=torch.int64)),
            "torch.nn:LazyLinear0",
            "cannot be imported",
        ),
    ],
)
def test_data_that_does_not_fit_the_model_is_named(data, spec, message):
    with pytest.raises(ModeconnError, match=message) as caught:
        run(models.build(spec), data)
    assert "\n" not in str(caught.value)


def test_a_training_that_diverges_says_so_and_leaves_nothing(digits, tmp_path: Path):
    with pytest.raises(
        ModeconnError, match=r"the loss is (nan|inf) in epoch \d+: lr 3e\+38 is too large"
    ):
        run(network(spec="mlp:64-10"), digits, lr=3e38, checkpoint=tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
