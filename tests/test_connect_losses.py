"""Networks connected and certified with any loss that is convex in the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.readout import _with_slopes
from modeconn.connection.subnetworks import initial
from modeconn.connection.targets import Targets
from modeconn.connection.training import measure
from modeconn.metrics.head import LOSSES
from naive import mlp

WEIGHT = torch.tensor([0.2, 1.0, 3.0])
X = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
LABELS = (X[:, :3] * X[:, 1:]).argmax(1)
NUMBERS = torch.stack([X[:, 0] * X[:, 1], X[:, 2].sin(), X[:, 3]], 1)
BITS = (NUMBERS > 0).float()
SOFT = 0.8 * F.one_hot(LABELS, 3) + 0.2 / 3
CASES = {
    "mse": ("mse", NUMBERS),
    "bce": ("bce", BITS),
    "soft": ("soft_cross_entropy", SOFT),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), LABELS),
    "l1": (nn.L1Loss(), NUMBERS),
}


def mean_loss(loss, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss as PyTorch has it."""
    if callable(loss):
        return loss(outputs, targets)
    functions = {
        "mse": F.mse_loss,
        "bce": F.binary_cross_entropy_with_logits,
        "soft_cross_entropy": F.cross_entropy,
    }
    return functions[loss](outputs, targets)


def fitted(loss, targets: torch.Tensor, seed: int) -> nn.Sequential:
    model = mlp(4, 24, 20, 3, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        mean_loss(loss, model(X), targets).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("case", CASES)
def test_bounds_hold_between_breakpoints(case: str) -> None:
    loss, targets = CASES[case]
    a, b = (fitted(loss, targets, seed) for seed in (1, 2))
    ends = [float(mean_loss(loss, net(X), targets).detach()) for net in (a, b)]
    data = (X, targets)
    found = mc.connect(a, a, b, data, target=max(ends) + 0.1, loss=loss)
    certificate = found.certificate
    assert certificate.losses[0] == pytest.approx(ends[0], rel=1e-5)
    assert certificate.losses[-1] == pytest.approx(ends[1], rel=1e-5)
    assert certificate.bound <= max(ends) + 0.1
    t = np.random.default_rng(0).random(200)
    result = mc.evaluate(a, found.path, data, points=t, loss=loss, metrics=("loss",))
    assert result.loss.max() <= certificate.bound * (1 + 1e-5)
    assert mc.verify(a, found, data, loss=loss).bound == certificate.bound
    assert found.details["loss"] == certificate.loss
    other = "bce" if case == "mse" else "mse"
    with pytest.raises(mc.FalseCertificate, match="and you verify"):
        mc.verify(a, found, data, loss=other)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_slopes_are_those_of_pytorch(case: str) -> None:
    loss, values = CASES[case]
    targets = Targets.with_loss(values, loss, 3)
    logits = torch.randn(90, 3, dtype=torch.float64, requires_grad=True)
    own = nn.CrossEntropyLoss(WEIGHT.double(), label_smoothing=0.1) if case == "weighted" else loss
    expected = mean_loss(own, logits, values.double() if values.is_floating_point() else values)
    (slope,) = torch.autograd.grad(expected, logits)
    total, slopes = _with_slopes(targets, logits.detach())
    assert total / 90 == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(slopes / 90, slope, rtol=1e-5, atol=1e-9)
    parts = [
        _with_slopes(targets[rows], logits.detach()[rows])[0] for rows in (slice(40), slice(40, 90))
    ]
    assert sum(parts) == pytest.approx(total, rel=1e-6)
    net = mlp(4, 7, 3)
    chain = LayerChain.of(net, X[:4])
    sub = initial(chain, 0, torch.arange(4), [7], torch.Generator().manual_seed(0))
    measured, error = measure(chain, sub, X, targets)
    outputs = F.linear(F.relu(F.linear(X, sub.weights[0])), sub.weights[1])
    assert measured == pytest.approx(float(mean_loss(loss, outputs, values)), rel=1e-4)
    assert np.isnan(error) != targets.has_error


def test_soft_labels_weigh_the_classes() -> None:
    outputs = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.rand(5, 3, dtype=torch.float64)
    expected = F.cross_entropy(outputs, weights, reduction="none")
    torch.testing.assert_close(LOSSES["soft_cross_entropy"](outputs, weights)["loss"], expected)
    net = mlp(4, 7, 3)
    with pytest.raises(mc.ModeconnError, match="weights of the classes, none below 0"):
        mc.evaluate(net, mc.Line(net, net), (X, SOFT - 0.5), 3, loss="soft_cross_entropy")


def test_losses_that_are_refused() -> None:
    net = mlp(4, 12, 12, 3)
    with pytest.raises(mc.ModeconnError, match=r"'separable' are for cross-entropy .* loss is mse"):
        mc.connect(net, net, net, (X, NUMBERS), loss="mse", subnetworks="separable")

    def focal(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none") ** 2

    with pytest.raises(mc.ModeconnError, match="loss is focal: expected one that is convex"):
        mc.connect(net, net, net, (X, LABELS), loss=focal)
    with pytest.raises(mc.ModeconnError, match="floating point of the outputs' shape"):
        mc.connect(net, net, net, (X, NUMBERS[:, :2]), loss="mse")
    with pytest.raises(mc.ModeconnError, match="class labels are integers"):
        mc.connect(net, net, net, (X, NUMBERS))
