"""Evaluations that are interrupted go on from the file that they keep, to the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import modeconn as mc
from naive import mlp
from refused import refused

X, Y = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 4


class Stop(Exception):
    """What interrupts an evaluation."""


class Counting:
    """A loss that counts the samples it is asked for, and stops the evaluation after so many."""

    def __init__(self, most: float = np.inf) -> None:
        self.most, self.rows = most, 0

    def __getstate__(self) -> None:
        """What it counts changes no loss."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.rows += len(targets)
        if self.rows > self.most:
            raise Stop
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))


@pytest.mark.parametrize(
    "seconds", [0.0, 1e9], ids=["written after every part", "written at the end"]
)
@pytest.mark.parametrize("buffers", ["start", "recompute"])
def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch, buffers, seconds):
    monkeypatch.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", seconds)
    a, b = net(1), net(2)
    file = tmp_path / "line.unfinished"
    points, options = 5, {"buffers": buffers, "batch_size": 32, "resume": file}
    whole = mc.evaluate(
        a, mc.Line(a, b), (X, Y), points, loss=Counting(), buffers=buffers, batch_size=32
    )
    most = 4 * 32 * points + 32  # the first rows are looked at twice: together, and apart
    with pytest.raises(Stop):
        mc.evaluate(a, mc.Line(a, b), (X, Y), points, loss=Counting(most), **options)
    rest = Counting()
    got = mc.evaluate(a, mc.Line(a, b), (X, Y), points, loss=rest, **options)
    assert rest.rows == (300 - 4 * 32) * points + 32
    np.testing.assert_array_equal(got.loss, whole.loss)
    assert (got.samples, got.passes) == (300, whole.passes)
    none = Counting()
    again = mc.evaluate(a, mc.Line(a, b), (X, Y), points, loss=none, **options)
    assert none.rows == 0 and np.array_equal(again.loss, whole.loss)


def test_a_second_interruption_of_the_statistics(tmp_path: Path, monkeypatch):
    """Stopped in the first pass, then in the second: the statistics are those of one run."""
    a, b = net(1), net(2)
    path, file = mc.Line(a, b), tmp_path / "f"
    expected = mc.evaluate(a, path, (X, Y), 3, buffers="recompute", batch_size=50)

    class Source:
        def __init__(self, last: int) -> None:
            self.last = last

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(0, 300, 50):
                if i >= self.last:
                    raise Stop
                yield X[i : i + 50], Y[i : i + 50]

    options = {"buffers": "recompute", "batch_size": 50, "resume": file}
    done = [0]
    for last in (200, 250):
        with pytest.raises(Stop):
            mc.evaluate(a, path, Source(last), 3, **options)
        with safe_open(file, framework="pt") as kept:
            record = json.loads(kept.metadata()["record"])
        done.append(record["state"]["statistics"]["parts"])
    assert 0 < done[1] < done[2] < 6
    got = mc.evaluate(a, path, Source(300), 3, **options)
    np.testing.assert_array_equal(got.loss, expected.loss)


def test_another_evaluation_is_refused(tmp_path: Path):
    a, b, c = (mlp(6, 5, 4, seed=seed) for seed in range(3))
    file = tmp_path / "f"
    mc.evaluate(a, mc.Line(a, b), (X, Y), 3, resume=file)
    with refused("holds another unfinished evaluation", "other path", str(file)):
        mc.evaluate(a, mc.Line(a, c), (X, Y), 3, resume=file)
    with refused("other points"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 4, resume=file)
    with refused("loss cross_entropy, not Counting; other metrics; other definition of the loss"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, resume=file, loss=Counting())
    with refused("on other data"):
        mc.evaluate(a, mc.Line(a, b), (X + 1, Y), 3, resume=file)
    with refused("on other data"):
        mc.evaluate(a, mc.Line(a, b), (X, Y.roll(1)), 3, resume=file)
    file.write_bytes(b"something else")
    with refused("is no unfinished evaluation"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, resume=file)
