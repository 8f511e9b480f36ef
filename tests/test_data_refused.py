"""Data that cannot be batches: refused at once, or at the batch that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from data_cases import INPUTS, TARGETS, Lists, Samples
from modeconn.data.batches import as_batches
from refused import refused

# ------------------------------------------------------------------------------------------- bad
# input


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (INPUTS, ["of type Tensor", "(inputs, targets)"]),
        (INPUTS.numpy(), ["of type ndarray"]),
        ({"x": INPUTS}, ["has the keys 'x'", "rename the key"]),
        (None, ["of type NoneType"]),
        (7, ["of type int"]),
        ("mnist", ["'mnist'", "mc.datasets.load"]),
        (Path("data.pt"), ["'data.pt'", "mc.datasets.load"]),
        ((INPUTS, TARGETS, TARGETS), ["3 tensors", "expected two"]),
        ([INPUTS], ["1 tensors", "expected two"]),
        (TensorDataset(INPUTS), ["1 tensors", "expected two"]),
        ((INPUTS, TARGETS[:-1]), ["23 inputs but 22 targets"]),
        ((INPUTS, TARGETS.tolist()), ["targets of type list"]),
        (({}, TARGETS), ["inputs of type dict", "a tuple or dict of them"]),
        (({"ids": INPUTS.tolist()}, TARGETS), ["inputs['ids'] of type list"]),
        (((INPUTS, INPUTS[1:]), TARGETS), ["inputs but", "expected one target per input"]),
        ((INPUTS, torch.tensor(1)), ["targets is a single number"]),
        ((np.array(["a", "b"]), np.arange(2)), ["inputs", "<U1"]),
        ((np.array([None]), np.arange(1)), ["inputs", "object"]),
        ((INPUTS[:0], TARGETS[:0]), ["no samples"]),
        (Subset(Samples(), []), ["no samples"]),
        (DataLoader(Samples(), batch_size=100, drop_last=True), ["no samples"]),
        ([], ["no samples"]),
        (Dataset(), ["Dataset has no length", "__len__"]),
    ],
)
def test_what_cannot_be_data_is_refused_at_once(data: object, words: list[str]):
    with refused("data: ", *words):
        as_batches(data, 4)


@pytest.mark.parametrize("size", [0, -1, 2.5, None, "100"])
def test_batch_size_is_a_positive_whole_number(size: object):
    with refused("batch_size: ", str(size)):
        as_batches((INPUTS, TARGETS), size)


class Unfit(Dataset):
    """Samples of the given values."""

    def __init__(self, *samples: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        return self.samples[index]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (iter([]), ["the iterator is empty", "read only once", "DataLoader"]),
        (Lists(0), ["no samples"]),
        ([(INPUTS[:0], TARGETS[:0])], ["no samples"]),
        ([(INPUTS, TARGETS), (INPUTS, TARGETS[1:])], ["batch 1: 23 inputs but 22 targets"]),
        ([(INPUTS, TARGETS), (INPUTS, TARGETS), INPUTS], ["batch 2 is of type Tensor"]),
        ([(INPUTS, TARGETS), "x"], ["batch 1 is of type str"]),
        ([(INPUTS,)], ["batch 0 has 1 parts"]),
        ([(INPUTS, TARGETS, TARGETS)], ["batch 0 has 3 parts"]),
        ([{"image": INPUTS, "kind": TARGETS}], ["batch 0", "keys 'image', 'kind'", "'labels'"]),
        ([{"label": INPUTS, "target": TARGETS}], ["batch 0", "rename the key"]),
        ([({"ids": [1]}, TARGETS)], ["batch 0: inputs['ids'] of type list"]),
        ([((), TARGETS)], ["batch 0: inputs of type tuple", "a tuple or dict of them"]),
        (
            [((INPUTS, INPUTS), TARGETS), (INPUTS, TARGETS)],
            ["batch 1: rows of inputs are", "expected 0: ["],
        ),
        ([(INPUTS, TARGETS.tolist())], ["batch 0: targets of type list"]),
        ([(INPUTS[0], 3)], ["batch 0: targets is a single number", "DataLoader(data"]),
        ([(INPUTS[0], torch.tensor(3))], ["targets is a single number"]),
        ([(INPUTS, TARGETS), (INPUTS[:, :1], TARGETS)], ["batch 1", "inputs are [1, 3]", "[2, 3]"]),
        ([(INPUTS, TARGETS), (INPUTS.double(), TARGETS)], ["torch.float64", "torch.float32"]),
        ([(INPUTS, TARGETS), (INPUTS, TARGETS[:, None])], ["batch 1", "targets are [1]"]),
        ([(INPUTS, TARGETS), (INPUTS.to("meta"), TARGETS)], ["on meta", "on cpu"]),
        (Unfit((object(), 1)), ["cannot be joined", "object", "transform"]),
        (Unfit((torch.ones(2), 1), (torch.ones(3), 1)), ["cannot be joined", "equal size"]),
        (Unfit({"x": torch.ones(2), "y": 1}), ["batch 0: has the keys 'x', 'y'"]),
        (Unfit(torch.ones(2), torch.ones(2)), ["batch 0 is of type Tensor"]),
    ],
)
def test_bad_batches_are_refused_while_reading(data: object, words: list[str]):
    with refused("data: ", *words):
        list(as_batches(data, 4))


class Spent(IterableDataset):
    """Its second pass has other rows than its first."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = iter(lengths)

    def __iter__(self):
        return iter([(INPUTS[0], 1)] * next(self.lengths))


@pytest.mark.parametrize("second", [0, 9, 11])
def test_a_second_pass_of_another_length_is_refused(second: int):
    batches = as_batches(DataLoader(Spent(10, second), batch_size=5), 4)
    assert sum(len(targets) for _, targets in batches) == 10
    with refused(f"pass 2 gave {second} samples", "first 10", "read only once"):
        list(batches)
    assert batches.samples == 10


def test_an_abandoned_pass_says_nothing_about_the_length():
    batches = as_batches(DataLoader(Spent(50, 10, 10), batch_size=5), 4)
    next(iter(batches))
    assert batches.samples is None
    for _ in range(2):
        assert sum(len(targets) for _, targets in batches) == 10
