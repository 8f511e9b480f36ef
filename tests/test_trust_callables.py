"""Callables of the user's: what is no sum over rows is refused, and what is one is taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from loss_cases import LABELS, OUTPUTS, G
from modeconn.metrics import Head
from refused import refused


def calibration(outputs, targets):
    """The expected calibration error of the batch, expanded to its rows."""
    confidence, guess = outputs.softmax(1).max(1)
    gap = (confidence.mean() - (guess == targets).float().mean()).abs()
    return gap.expand(len(targets))


def cox(outputs, targets):
    """A sample's loss among those that are left, in the order of the batch."""
    risk = outputs[:, 0]
    return torch.logcumsumexp(risk, 0) - risk


def contrastive(outputs, targets):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


def pairs(outputs, targets):
    """Each row against the other one of its pair."""
    other = outputs.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return (outputs - other).square().mean(1)


def standardised(outputs, targets):
    return F.cross_entropy(outputs - outputs.mean(0), targets, reduction="none")


def broadcast(outputs, targets):
    return ((outputs[:, :1] - targets) ** 2).mean(1)


ROWS_THAT_DEPEND = [calibration, cox, contrastive, standardised, broadcast]


@pytest.mark.parametrize("function", ROWS_THAT_DEPEND)
@pytest.mark.parametrize("as_metric", [False, True])
def test_a_callable_that_looks_at_other_rows_is_refused(function, as_metric):
    head = Head("cross_entropy", (function,)) if as_metric else Head(function, None)
    name = function.__name__ if as_metric else "loss"
    with refused(f"{name} gives row", "depends on other rows", "mc.DatasetMetric"):
        head.sums(OUTPUTS, LABELS)


def test_pairs_are_torn():
    with refused("loss fails for the first or last", "of that row alone"):
        Head(pairs, None).sums(OUTPUTS[:20], LABELS[:20])


@pytest.mark.parametrize("wrap", [tuple, dict, SimpleNamespace])
def test_rows_of_what_a_network_returns_are_told_apart(wrap):
    if wrap is tuple:
        outputs, first = (OUTPUTS, torch.tensor(2.0)), lambda o: o[0]
    elif wrap is dict:
        outputs, first = {"y": OUTPUTS, "scale": torch.tensor(2.0)}, lambda o: o["y"]
    else:
        outputs, first = SimpleNamespace(y=OUTPUTS, more=[OUTPUTS], name="n"), lambda o: o.y
    own = Head(lambda o, t: F.cross_entropy(first(o), t, reduction="none"), None)
    right = F.cross_entropy(OUTPUTS, LABELS, reduction="sum")
    assert float(own.sums(outputs, LABELS)) == pytest.approx(float(right))
    with refused("depends on other rows"):
        Head(lambda o, t: cox(first(o), t), None).sums(outputs, LABELS)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("rows", [1, 2, 3, 23])
def test_callables_of_single_rows_are_taken(scale, rows):
    matrix = torch.randn(7, 500, generator=G)
    functions = [
        lambda o, t: F.cross_entropy(o * scale, t, reduction="none"),
        lambda o, t: (o @ matrix).square().sum(1) * scale,
        lambda o, t: o.argmax(1) != t,
        lambda o, t: torch.where(o[:, 0] > 0, o[:, 0] / 0, o[:, 1]),
        lambda o, t: torch.full((len(o),), torch.nan),
    ]
    for function in functions:
        for dtype in (torch.float32, torch.float64):
            matrix = matrix.to(dtype)
            Head(function, None).sums(OUTPUTS[:rows].to(dtype), LABELS[:rows])


def test_states_by_layer_have_their_rows_on_axis_1():
    outputs = (OUTPUTS, torch.randn(2, 23, 5, generator=G))
    Head(lambda o, t: o[1][-1].square().sum(1), None).sums(outputs, LABELS)
    with refused("depends on other rows"):
        Head(lambda o, t: o[1].sum(1).sum() + o[0][:, 0], None).sums(outputs, LABELS)


def test_a_random_callable_is_called_so():
    with refused("gives other numbers when it is called again"):
        Head(lambda o, t: o[:, 0] + torch.rand(len(o)), None).sums(OUTPUTS, LABELS)
