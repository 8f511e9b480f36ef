"""Training: the steps of SGD, reports, zero error, seeds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import train_cases
from modeconn import models
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.training.labelled import measure
from modeconn.training.loop import Epoch, Stopped
from modeconn.training.train import train
from train_cases import SPEC, assert_same, network, noisy, run, weights

# Fixtures.
digits = train_cases.digits


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
