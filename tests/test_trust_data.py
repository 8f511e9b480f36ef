"""Data that are read as they come, and may not be meant so: pixels, augmentation, samplers."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import modeconn as mc

X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
PIXELS = (255 * X).round()


class Net(nn.Module):
    """A convolution and a norm, behind an own scaling of the inputs or none."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale != 1.0:
            x = x / self.scale
        return self.last(self.norm(self.conv(x)).relu().flatten(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def warned(data: Any, make: Any = Net, **options: Any) -> list[str]:
    """What an evaluation warns of, but for the norms' statistics."""
    ends = []
    for seed in range(2):
        torch.manual_seed(seed)
        ends.append(make())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        mc.evaluate(ends[0], mc.Line(*ends), data, 2, progress=False, **options)
    texts = [str(each.message) for each in given]
    return [text for text in texts if "interpolated running statistics" not in text]


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, perceptron])
@pytest.mark.parametrize("inputs", [PIXELS, PIXELS.double()], ids=["float32", "float64"])
def test_unscaled_pixels_are_warned_of(make: Any, inputs: Tensor):
    (text,) = warned((inputs, Y), make)
    assert "whole numbers up to 255" in text and "x / 255" in text


@pytest.mark.parametrize("inputs", [X, X * 255, PIXELS - 128, PIXELS * 2, X.round()], ids=range(5))
def test_other_inputs_are_not(inputs: Tensor):
    assert warned((inputs, Y)) == []


def test_a_network_that_scales_its_pixels_is_not_warned_of():
    assert warned((PIXELS, Y), lambda: Net(255.0)) == []


# -- samples that change ---------------------------------------------------------------------------

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": np.random.rand,
    "python": random.random,
    "none": lambda: 1.0,
}


class Augmented(Dataset):
    """Images whose brightness is drawn by a global generator, in a dict or as a tuple."""

    def __init__(self, kind: str, named: bool) -> None:
        self.kind, self.named = kind, named

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        x, y = X[i] * DRAWS[self.kind](), int(Y[i])
        return {"x": x, "label": y} if self.named else (x.numpy(), y)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("named", [True, False])
def test_samples_that_are_drawn_are_warned_of(kind: str, named: bool):
    dataset = Augmented(kind, named)
    expected = [] if kind == "none" else ["the dataset draws random numbers when it is read"]
    for data in (
        dataset,
        DataLoader(dataset, 16),
        DataLoader(dataset, 16, shuffle=True),
        {"one": Subset(dataset, range(20))},
    ):
        assert [text.partition(":")[0] for text in warned(data, perceptron)] == expected


class RandomFlip:
    """A transform with an own generator, which nobody sees draw."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(-1) if torch.rand((), generator=self.generator) < 0.5 else x


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


class Transformed(Dataset):
    def __init__(self, *transforms: Any) -> None:
        self.transform = Compose(*transforms)

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(X[i]), int(Y[i])


def test_transforms_that_draw_are_warned_of_by_name():
    for data in (Transformed(RandomFlip()), DataLoader(Subset(Transformed(RandomFlip()), [0, 3]))):
        (text,) = warned(data, perceptron)
        assert "transforms its samples at random (RandomFlip)" in text
    assert warned(Transformed(Compose()), perceptron) == []


# -- samplers --------------------------------------------------------------------------------------

SET = TensorDataset(X, Y)


@pytest.mark.parametrize(
    "sampler",
    [WeightedRandomSampler(torch.ones(40), 40), RandomSampler(SET, replacement=True)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_draws_with_replacement_are_warned_of(sampler: Any):
    (text,) = warned(DataLoader(SET, 8, sampler=sampler))
    assert text.startswith("the DataLoader draws samples with replacement (")


def test_shuffling_is_warned_of_where_batches_count():
    shuffling, plain = DataLoader(SET, 8, shuffle=True), DataLoader(SET, 8)
    assert warned(shuffling) == []
    assert warned(plain, buffers="recompute") == []
    for options in (
        {"data": shuffling},
        {"data": plain, "recompute_data": shuffling},
        {"data": {"train": shuffling, "test": plain}, "recompute_data": "train"},
    ):
        (text,) = warned(buffers="recompute", **options)
        assert "reads a DataLoader that shuffles" in text and "shuffle=False" in text
    assert warned(shuffling, buffers="recompute", recompute_data=plain) == []


# -- outputs and names -----------------------------------------------------------------------------


def shared_exponentials(x: Tensor) -> Tensor:
    powers = (x - x.amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True)


class Ends(nn.Module):
    """A layer, and a function behind it."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 3), last

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.layer(image.flatten(1)))


@pytest.mark.parametrize(
    "last",
    [lambda x: x.softmax(1), lambda x: x.log_softmax(1).exp(), shared_exponentials],
    ids=["softmax", "log_softmax and exp", "written out"],
)
def test_probabilities_are_warned_of_however_they_are_made(last: Any):
    (text,) = warned((X, Y), lambda: Ends(last))
    assert "ends in softmax" in text and "expects logits" in text


@pytest.mark.parametrize("last", [lambda x: x.log_softmax(1), torch.exp, lambda x: x / x.sum()])
def test_other_outputs_are_not_taken_for_probabilities(last: Any):
    assert not any("softmax" in text for text in warned((X, Y), lambda: Ends(last), batch_size=40))


def test_a_key_that_forward_does_not_take_is_named():
    batches = [{"image": X, "labels": Y, "index": torch.arange(40)}]
    with pytest.raises(mc.ModeconnError, match=r"forward takes image, .* have 'index', too: leave"):
        warned(batches, lambda: Ends(torch.relu))
