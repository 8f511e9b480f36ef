"""What an evaluation must not touch, and models that bring surprises of their own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from naive import pass_per_point
from policy import assert_within_policy
from refused import refused

X, Y = torch.randn(21, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(21) % 4


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("buffers", ["interpolate", "start", "recompute"])
@pytest.mark.filterwarnings("ignore:control point .* computes something else:UserWarning")
def test_the_model_and_the_control_points_are_left_as_they_were(buffers, precision):
    model, a, b = net(0), net(1), net(2)
    model.train()
    model[1].eval()
    model[1].momentum = 0.3
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    model[6].weight.grad = torch.ones(4, 5)
    model[6].bias.requires_grad_(False)

    def everything(module: nn.Module) -> list[object]:
        kept: list[object] = [torch.get_rng_state().tolist(), torch.is_grad_enabled()]
        for name, part in module.named_modules():
            plain = {
                key: value
                for key, value in vars(part).items()
                if isinstance(value, (bool, int, float, str, tuple))
            }
            kept += [
                name,
                plain,
                list(part._forward_hooks),
                list(part._buffers),
                list(part._parameters),
                sorted(vars(part)),
            ]
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            gradient = None if tensor.grad is None else tensor.grad.tolist()
            kept += [
                name,
                tensor.data_ptr(),
                tensor.dtype,
                tensor.requires_grad,
                tensor._version,
                tensor.tolist(),
                gradient,
            ]
        return kept

    before = [everything(module) for module in (model, a, b)]
    mc.evaluate(model, mc.Line(a, b), (X, Y), 3, buffers=buffers, precision=precision, batch_size=8)
    assert [everything(module) for module in (model, a, b)] == before


@pytest.mark.filterwarnings("ignore:control point .* computes something else:UserWarning")
def test_hooks_count():
    """A model with a hook is evaluated with it, at ends that have none, too."""
    model, other = net(0), net(1)
    path = mc.Mixture([model, other])
    model[2].register_forward_hook(lambda module, args, output: 2 * output)
    t = np.array([[1.0, 0.0], [0.0, 1.0]])
    got = mc.evaluate(model, path, (X, Y), t)
    plain, exact = (
        pass_per_point(model, path, X, Y, t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)


class OwnLoss(nn.Module):
    """Returns its loss alone, or beside the logits."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = net(0), how

    def forward(self, x: Tensor, y: Tensor) -> object:
        logits = self.inner(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        return {"mean": losses.mean(), "each": losses, "pair": (losses.mean(), logits)}[self.how]


@pytest.mark.filterwarnings("ignore:the model's output for a sample depends")
@pytest.mark.parametrize(
    "how, words",
    [
        ("mean", ("outputs have shape",)),
        ("each", ("outputs have shape ['N']",)),
        ("pair", ("the model's output is a tuple",)),
    ],
)
def test_models_that_return_a_loss_of_their_own(how, words):
    a, b = OwnLoss(how), OwnLoss(how)
    b.inner = a.inner  # one network, so that no norm is between two
    with refused(*words, "callable"):
        mc.evaluate(a, mc.Line(a, b), ((X, Y), Y), 3)
    if how != "mean":
        own = {
            "each": lambda outputs, targets: outputs,
            "pair": lambda outputs, targets: F.cross_entropy(outputs[1], targets, reduction="none"),
        }[how]
        got = mc.evaluate(a, mc.Line(a, b), ((X, Y), Y), 3, loss=own)
        expected = F.cross_entropy(copy.deepcopy(a.inner).eval()(X), Y).item()
        np.testing.assert_allclose(got.loss, expected, rtol=1e-5)
    else:
        with refused("expected one number per sample"):
            mc.evaluate(a, mc.Line(a, b), ((X, Y), Y), 3, loss=lambda outputs, targets: outputs)


def test_entries_on_no_device_or_on_two():
    with torch.device("meta"):
        nowhere = net(0)
    with refused("meta"):
        mc.evaluate(net(0), mc.Line(net(1), nowhere), (X, Y), 3)
    with refused("meta"):
        mc.evaluate(nowhere, mc.Line(net(1), net(1)), (X, Y), 3)
    mixed = net(0)
    mixed[6].weight = nn.Parameter(mixed[6].weight.detach().to("meta"))
    with refused("6.weight"):
        mc.Line(net(1), mixed)


def test_shapes_that_change_with_the_batch():
    batches = [(X[:7], Y[:7]), (X[7:, :, :5, :5], Y[7:])]
    with refused("batch 1: rows of inputs are [3, 5, 5]", "expected [3, 8, 8]"):
        mc.evaluate(net(0), mc.Line(net(1), net(1)), batches, 3)
