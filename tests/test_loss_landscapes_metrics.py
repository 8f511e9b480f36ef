"""Metrics of all kinds through modeconn.dropin.loss_landscapes: values, and forwards that ran."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import landscape_cases
import modeconn as mc
import modeconn.dropin.loss_landscapes as loss_landscapes
from dropin_cases import KINDS, norm
from landscape_cases import (
    Oracle,
    accuracy,
    curvature,
    episode,
    gradient_norm,
    in_eval,
    loss,
    noisy,
    of_the_module,
    over_batches,
    own_loss,
    perturbed,
    plan_everything,
    shuffled,
    with_penalty,
)
from modeconn.dropin.loss_landscapes import values

# Fixtures.
networks = landscape_cases.networks


# By name: the metric, forwards per point, and how many of them run at each of 12 points; two of
# those points run in any case, and the losses that the evaluator has run there alone.
METRICS: dict[str, tuple[Any, int, int]] = {
    "loss": (loss(nn.CrossEntropyLoss()), 1, 0),
    "smoothing": (loss(nn.CrossEntropyLoss(label_smoothing=0.1)), 1, 0),
    "class weights": (loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]))), 1, 0),
    "own loss in Loss": (loss(lambda o, y: (o.logsumexp(1) - o[:, 0]).mean()), 1, 0),
    "own loss": (own_loss, 1, 0),
    "accuracy": (accuracy, 1, 0),
    "loader": (over_batches, 4, 0),
    "reads weights": (with_penalty, 1, 0),
    "modules[0](x)": (of_the_module, 1, 0),
    "pipeline": (loss_landscapes.metrics.MetricPipeline([accuracy, over_batches]), 5, 0),
    "eval inside": (in_eval, 1, 0),
    "noise": (noisy, 1, 1),
    "gradient": (gradient_norm, 1, 1),
    "curvature": (curvature, 1, 1),
    "shuffled": (shuffled, 1, 1),
    "episode": (episode, 3, 2),  # its first step is the same at every point
    "perturbations": (perturbed, 3, 2),
}


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """The forwards of all scans in the test, by what became of them."""
    counts = {"answered": 0, "run": 0}

    def mapped(*args: Any, **options: Any) -> Any:
        result = mc.map(*args, **options)
        for key in counts:
            counts[key] += result.info[key]
        return result

    value = values._Moved.value

    def moved(*args: Any) -> Any:
        counts["run"] += 1
        return value(*args)

    monkeypatch.setattr(values, "mapped", mapped)
    monkeypatch.setattr(values._Moved, "value", moved)
    return counts


@pytest.mark.filterwarnings("ignore:the function changes")
@pytest.mark.parametrize("name", METRICS)
def test_kinds_of_metric(name: str, networks, counted, monkeypatch):
    plan_everything(monkeypatch)
    metric, forwards, always = METRICS[name]
    a, b = networks
    torch.manual_seed(2)
    expected = Oracle().linear_interpolation(copy.deepcopy(a), b, metric_of(metric), 12)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    got = loss_landscapes.linear_interpolation(a, b, metric, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert counted["run"] == 2 * forwards + 10 * always


def metric_of(metric: Any) -> Any:
    """The metric in a loop that keeps no gradients off: those that need one turn it on."""

    def call(model: Any) -> Any:
        with torch.enable_grad():
            model.requires_grad_(False)
            return metric(model)

    return call


def test_norms_in_training_mode_run(counted, monkeypatch):
    plan_everything(monkeypatch)
    a, b = norm(0).train(), norm(1)
    inputs = KINDS["norm"][1]()
    metric = loss_landscapes.metrics.Loss(nn.CrossEntropyLoss(), inputs, torch.arange(20) % 3)
    expected = Oracle().linear_interpolation(copy.deepcopy(a), b, metric, 8)
    got = loss_landscapes.linear_interpolation(a, b, metric, 8)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert counted == {"answered": 0, "run": 8}
    assert a.training and a[1].num_batches_tracked == 0
