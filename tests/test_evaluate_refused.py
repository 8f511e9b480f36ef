"""Bad input to mc.evaluate: one clear line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import evaluate_cases
import modeconn as mc
from evaluate_cases import X, Y
from naive import mlp

# Fixtures.
nets = evaluate_cases.nets


# -- bad input -------------------------------------------------------------------------------------


def bad(nets: list[nn.Sequential], says: str, **changes: object) -> None:
    arguments: dict[str, object] = {
        "model": nets[0],
        "path": mc.Line(*nets[:2]),
        "data": (X, Y),
        "points": 3,
        **changes,
    }
    with pytest.raises(mc.ModeconnError, match=says) as caught:
        mc.evaluate(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "says, changes",
    [
        ("loss is 'hinge'.*cross_entropy", {"loss": "hinge"}),
        ("metric 'accuracy' is unknown", {"metrics": ("loss", "accuracy")}),
        ("metrics is empty", {"metrics": ()}),
        ("metrics has 'loss' twice", {"metrics": ("loss", "loss")}),
        ("backend 'fast' is unknown", {"backend": "fast"}),
        ("buffers is 'mean'", {"buffers": "mean"}),
        ("precision is 'half'", {"precision": "half"}),
        ("batch_size is 0", {"batch_size": 0}),
        ("memory_budget is -1", {"memory_budget": -1}),
        ("points is 0", {"points": 0}),
        ("device 'nowhere'", {"device": "nowhere"}),
        ("no samples", {"data": (X[:0], Y[:0])}),
        ("no samples", {"data": []}),
        (r"label 11 is out of range: the model has 10 classes", {"data": (X, Y + 2)}),
        (r"label -1 is out of range", {"data": (X, Y - 1)}),
        ("class labels are integers", {"data": (X, Y.float())}),
        ("expects floating point", {"data": (X, Y), "loss": "mse"}),
        (r"does not run on inputs of shape \['N', 19\]", {"data": (X[:, 1:], Y)}),
        (
            "does not run on inputs of shape.*int64",
            {"data": (torch.ones(5, 20, dtype=torch.int64), Y[:5])},
        ),
        ("does not match the model Sequential in .*'0.weight' is", {"model": mlp(20, 30, 17, 10)}),
        (
            "in 2 entries: '5.weight' is missing",
            {"model": mlp(20, 33, 17, 10).append(nn.Linear(10, 10))},
        ),
        ("loss gives \\[\\] for 130 samples", {"loss": lambda o, y: o.mean()}),
        ('for classes, and loss="mse" has none', {"loss": "mse", "metrics": ("error",)}),
    ],
)
def test_bad_input_is_one_clear_line(nets, says, changes):
    bad(nets, says, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(nets):
    bad(nets, "device 'cuda' cannot be used", device="cuda")


def test_a_generator_is_spent_after_one_pass(nets):
    data = ((X[i : i + 9], Y[i : i + 9]) for i in range(0, 130, 9))
    mc.evaluate(nets[0], mc.Line(*nets[:2]), data, 3)
    bad(nets, "iterator can be read only once", data=data)
