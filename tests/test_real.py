"""Two trained networks on real MNIST: the barrier, exactness, one pass over 60,000 samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import modeconn as mc
from modeconn.models import build
from naive import pass_per_point
from policy import assert_within_policy

SPEC = "mlp:784-245x10-10"


@pytest.fixture(scope="module")
def line(shared: Path) -> mc.Line:
    return mc.Line(
        *(shared / "checkpoints" / f"mnist-fcn-10x245-seed{seed}.safetensors" for seed in (1, 2))
    )


def test_the_barrier_between_two_mnist_networks(line, mnist_root):
    got = mc.evaluate(build(SPEC), line, mc.datasets.load("mnist", root=mnist_root), 5)
    assert (got.samples, got.passes) == (60_000, 1)
    assert got.error[0] == got.error[-1] == 0, "both reach zero training error"
    assert got.barrier("loss") == pytest.approx(2.3, abs=0.05)
    assert got.error[2] > 0.85, "the midpoint is near chance"


def test_mnist_against_float64(line, mnist_root):
    x, y = mc.datasets.load("mnist", root=mnist_root).slice(0, 3000)
    model = build(SPEC)
    got = mc.evaluate(model, line, (x, y), 5)
    plain, exact = (
        pass_per_point(model, line, x, y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)
    np.testing.assert_allclose(got.error, exact["error"], atol=2 / 3000)  # ties, to rounding


def test_test_error(line, mnist_root):
    got = mc.evaluate(
        build(SPEC), line, mc.datasets.load("mnist", root=mnist_root, split="test"), 2
    )
    assert got.samples == 10_000 and np.all((got.error > 0.015) & (got.error < 0.022))


def test_a_convolutional_line_on_cifar10(shared, cifar10_root):
    from torch import nn

    widths, layers, before = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"], [], 3
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width

    class VGG(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Sequential(
                nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.features(x).flatten(1))

    model = VGG()
    files = [
        shared / "checkpoints" / f"cifar10-vgg11-w16-seed{seed}.safetensors" for seed in (1, 2)
    ]
    path = mc.Line(*files)
    x, y = mc.datasets.load("cifar10", root=cifar10_root, split="test").slice(0, 400)
    got = mc.evaluate(model, path, (x, y), 3)
    plain, exact = (
        pass_per_point(model, path, x, y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)
    assert got.error[1] > 0.85 and np.all(got.error[[0, 2]] < 0.3)
