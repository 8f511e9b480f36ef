"""Losses that certificates may rest on: convex ones pass, the others are refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.metrics.convexity import check_convex, name_of
from modeconn.metrics.head import Head

CONVEX = {
    "cross_entropy": "cross_entropy",
    "mse": "mse",
    "bce": "bce",
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2, weight=torch.tensor([1.0, 0.0, 2.0])),
    "nll": F.nll_loss,
    "l1": nn.L1Loss(),
    "smooth l1": functools.partial(F.smooth_l1_loss, beta=0.5),
    "huber": nn.HuberLoss(delta=0.3),
    "weighted bits": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5, 1.0])),
}


@pytest.mark.parametrize("name", CONVEX)
@settings(max_examples=25)
@given(seed=st.integers(0, 1000), t=st.floats(0, 1))
def test_a_convex_loss_is_below_its_chord(name, seed, t):
    loss = CONVEX[name]
    assert check_convex(loss)
    generator = torch.Generator().manual_seed(seed)
    first, last = 3 * torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (5,), generator=generator)
    head = Head(loss, ("loss",))
    targets = labels if head.of_classes else torch.rand(5, 3, generator=generator).double()
    fitted = head.fit(first, targets)
    at = [float(head.sums(torch.lerp(first, last, c), fitted)[0]) for c in (0.0, t, 1.0)]
    assert at[1] <= (1 - t) * at[0] + t * at[2] + 1e-9


def focal(outputs, targets):
    return (1 - outputs.softmax(1)[:, 0]) ** 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (focal, "loss is focal: expected one that is convex .*: nothing is known"),
        (nn.GaussianNLLLoss(reduction="none"), "loss is GaussianNLLLoss: .*nothing is known"),
        (nn.BCELoss(), "loss is nn.BCELoss: .*takes probabilities"),
        ("next_token", "loss is next_token: .*several outputs"),
        ("banana", "loss is banana"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, -0.5])), "its weight holds -0.5, below zero"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, torch.nan])), "its weight holds nan"),
        (nn.CrossEntropyLoss(label_smoothing=float("nan")), "its label_smoothing is nan"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(-1.0)), "its pos_weight holds -1"),
    ],
)
def test_other_losses_are_refused_by_name(loss, message):
    with pytest.raises(ModeconnError, match=message):
        check_convex(loss)


def test_names_have_the_options():
    assert name_of("mse") == "mse"
    assert name_of(nn.CrossEntropyLoss()) == name_of("cross_entropy") == "cross_entropy"
    smoothed = nn.CrossEntropyLoss(torch.tensor([1.0, 0.5]), label_smoothing=0.1)
    assert name_of(smoothed) == "nn.CrossEntropyLoss(label_smoothing=0.1, weight=[1.0, 0.5])"
    assert name_of(focal) == "focal"
