"""Several data sets in one evaluation, and statistics weighted by samples."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import modeconn as mc

T = [0.0, 0.3, 0.5, 1.0]


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64) + 0.2 * seed
    return x, torch.arange(count) % 3


class Counting:
    """Batches that count the passes over them."""

    def __init__(self, data: tuple[Tensor, Tensor], size: int) -> None:
        self.loader = DataLoader(TensorDataset(*data), batch_size=size)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.loader)


MODEL = net(0)
TRAIN, TEST = rows(50, 1), rows(23, 2)


@pytest.fixture(scope="module")
def line() -> mc.Line:
    return mc.Line(MODEL, net(1))


def test_each_data_set_has_the_result_that_it_has_alone(line):
    options = {"points": T, "buffers": "recompute", "batch_size": 16, "precision": "float64"}
    train = Counting(TRAIN, 8)
    got = mc.evaluate(
        MODEL, line, {"train": train, "test": TEST}, recompute_data="train", **options
    )
    assert list(got) == ["train", "test"] and train.passes == 2
    for name, data in (("train", TRAIN), ("test", TEST)):
        alone = mc.evaluate(MODEL, line, data, recompute_data=TRAIN, **options)
        np.testing.assert_array_equal(got[name].loss, alone.loss)
        np.testing.assert_array_equal(got[name].error, alone.error)
        assert got[name].samples == len(data[1]) and got[name].passes == 2
        assert got[name].info["data"] == name and "data" not in alone.info
    assert not np.array_equal(got["train"].loss, got["test"].loss)


def test_data_sets_of_other_kinds_and_rows():
    """Float and byte images, tensors and loaders: what fits the model, each as it comes."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(2))
    wide, flat = torch.rand(9, 3, 4), torch.rand(6, 12)
    labels = torch.arange(9) % 4
    sets = {
        "wide": (wide, labels),
        "flat": DataLoader(TensorDataset(flat, labels[:6]), batch_size=4),
        "one dict": {"input": flat, "labels": labels[:6]},
    }
    got = mc.evaluate(a, mc.Line(a, b), sets, 3)
    for name, x in (("wide", wide), ("flat", flat), ("one dict", flat)):
        loss = nn.functional.cross_entropy(a(x), labels[: len(x)]).item()
        assert got[name].loss[0] == pytest.approx(loss, rel=1e-6), name


def test_progress_counts_all_passes(line):
    seen: list[tuple[int, int | None]] = []
    mc.evaluate(
        MODEL,
        line,
        {"train": TRAIN, "test": TEST},
        T,
        buffers="recompute",
        recompute_data="train",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (123, 123) and all(total == 123 for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_interruption_in_the_second_data_set(line, tmp_path, monkeypatch):
    passes = sys.modules["modeconn.evaluation.passes"]
    monkeypatch.setattr(passes, "_FLOPS_OF_A_PART", 1)  # parts of 32 rows

    def interrupting(done: int, total: int | None) -> None:
        if done > len(TRAIN[1]) + 5:
            raise KeyboardInterrupt

    file, data = tmp_path / "sums", {"train": TRAIN, "test": TEST}
    options = {"points": T, "buffers": "start", "resume": file}
    with pytest.raises(KeyboardInterrupt):
        mc.evaluate(MODEL, line, data, **options, progress=interrupting)
    assert file.exists()
    got = mc.evaluate(MODEL, line, data, **options)
    expected = mc.evaluate(MODEL, line, data, T, buffers="start")
    for name in data:
        np.testing.assert_allclose(got[name].loss, expected[name].loss, rtol=1e-12)
    with pytest.raises(mc.ModeconnError, match="other data sets"):
        mc.evaluate(MODEL, line, {"train": TRAIN, "validation": TEST}, **options)


def re_estimated(model: nn.Module, state: dict[str, Tensor], data: Tensor, size: int) -> nn.Module:
    """A network whose norms were updated batch by batch, each with its share of the samples."""
    network = copy.deepcopy(model)
    network.load_state_dict(state)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
    network.train()
    seen = 0
    for batch in data.split(size):
        for norm in norms:
            norm.momentum = len(batch) / (seen + len(batch))
        with torch.no_grad():
            network(batch)
        seen += len(batch)
    return network.eval()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("limit", [None, 2])
def test_statistics_weighted_by_samples(line, backend, limit):
    x, y = TRAIN
    got = mc.evaluate(
        MODEL,
        line,
        TRAIN,
        T,
        buffers="recompute",
        batch_size=21,
        recompute_average="samples",
        recompute_batches=limit,
        precision="float64",
        backend=backend,
    )
    read = x if limit is None else x[: limit * 21]
    for t, loss in zip(T, got.loss):
        network = re_estimated(MODEL, line.at(t), read, 21)
        expected = nn.functional.cross_entropy(network(x), y).item()
        assert loss == pytest.approx(expected, rel=1e-9)
    if limit is None:
        by_batches = mc.evaluate(
            MODEL, line, TRAIN, T, buffers="recompute", batch_size=21, precision="float64"
        )
        assert not np.allclose(by_batches.loss, got.loss, rtol=1e-6), "a last batch of 8 rows"


@pytest.mark.parametrize(
    "says, data, options",
    [
        ("a dict with the keys []", {}, {}),
        ("a dict with the keys [1]", {1: TRAIN}, {}),
        ("data 'test': got the name 'digits'", {"train": TRAIN, "test": "digits"}, {}),
        ("data: has the keys 'x', 'y'; targets are expected", {"x": TRAIN[0], "y": TRAIN[1]}, {}),
        (
            "needs recompute_data beside several data sets: expected one of their names, 'a'; 'b'",
            {"a": TRAIN, "b": TEST},
            {"buffers": "recompute"},
        ),
        (
            "recompute_data is 'c': expected data, or the name of one of several data sets",
            {"a": TRAIN, "b": TEST},
            {"buffers": "recompute", "recompute_data": "c"},
        ),
        (
            "recompute_data is 'train'",
            TRAIN,
            {"buffers": "recompute", "recompute_data": "train"},
        ),
        ("recompute_average is 'rows': expected", TRAIN, {"recompute_average": "rows"}),
        ('recompute_average is for buffers="recompute"', TRAIN, {"recompute_average": "samples"}),
    ],
)
def test_refused(line, says, data, options):
    with pytest.raises(mc.ModeconnError) as error:
        mc.evaluate(MODEL, line, data, T, **options)
    assert says in str(error.value)
