"""Ranks that share an evaluation: equal bits on any number of them, and failures that all hear of.

Ranks are threads here, which exchange what processes would; tests/test_torchrun.py has processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import modeconn as mc
from modeconn.evaluation.ranks import Ranks, acting_as
from naive import mlp

X = torch.randn(37, 7, generator=torch.Generator().manual_seed(0))
Y = torch.arange(37) % 4


class Group:
    """Threads as ranks."""

    def __init__(self, size: int) -> None:
        self.size, self._said = size, [None] * size
        self._all_here = threading.Barrier(size, timeout=60)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What the ranks return or raise."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                with acting_as(Ranks(rank, self.size, self._exchange(rank))):
                    found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def _exchange(self, rank: int) -> Callable[[Any], list[Any]]:
        def exchange(message: Any) -> list[Any]:
            self._said[rank] = message
            self._all_here.wait()
            found = [*self._said]
            self._all_here.wait()
            return found

        return exchange


@pytest.fixture(scope="module")
def ends() -> tuple[nn.Module, nn.Module]:
    return mlp(7, 9, 4, seed=0), mlp(7, 9, 4, seed=1)


class Rows(Dataset):
    """Counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return X[index], Y[index]


# By name: the data of a rank, and the rows of a batch.
DATA: dict[str, tuple[Callable[[], Any], int | None]] = {
    "tensors": (lambda: (X, Y), 5),
    "a batch for each rank or less": (lambda: (X, Y), 18),
    "one batch": (lambda: (X, Y), None),
    "a loader": (lambda: DataLoader(TensorDataset(X, Y), batch_size=4), 6),
    "a generator": (lambda: (pair for pair in [(X[:20], Y[:20]), (X[20:], Y[20:])]), 3),
    "a dataset": (Rows, 5),
}


def bits(result: mc.PathResult) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in result.values.items()}


@pytest.mark.parametrize("kind", DATA)
def test_equal_bits_on_any_number_of_ranks(ends, kind: str):
    make, batch_size = DATA[kind]
    path = mc.Line(*ends)
    alone = mc.evaluate(ends[0], path, make(), 7, batch_size=batch_size)
    found = {}
    for size in (1, 2, 3, 4):
        group = Group(size)
        results = group.run(
            lambda rank: mc.evaluate(ends[0], path, make(), 7, batch_size=batch_size)
        )
        assert [type(each) for each in results] == [mc.PathResult] * size, results
        assert all(bits(each) == bits(results[0]) for each in results)
        assert {each.samples for each in results} == {37}
        assert results[0].info.get("ranks", 1) == size
        found[size] = bits(results[0])
    assert found[1] == found[2] == found[3] == found[4]
    for name, values in alone.values.items():
        np.testing.assert_allclose(results[0].values[name], values, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:batch norms .* have interpolated")
def test_planes_statistics_whole_metrics_and_adaptive_points():
    def norm(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    a, b, c = map(norm, range(3))
    plane = mc.Plane.through(a, b, c)
    accuracy = mc.DatasetMetric(
        lambda outputs, targets: float((outputs.argmax(1) == targets).double().mean()), "accuracy"
    )
    calls = (
        lambda: mc.evaluate(a, plane, (X, Y), plane.points(3), buffers="recompute", batch_size=7),
        lambda: mc.evaluate(a, mc.Line(a, b), {"one": (X, Y), "two": (X[:9], Y[:9])}, 3)["two"],
        lambda: mc.evaluate(a, mc.Line(a, b), (X, Y), 3, metrics=("loss", accuracy)),
        lambda: mc.evaluate(a, mc.Line(a, b), (X, Y), "adaptive", batch_size=6),
    )
    for call in calls:
        one, two = Group(1).run(lambda rank: call())[0], Group(2).run(lambda rank: call())  # noqa: B023
        assert bits(one) == bits(two[0]) == bits(two[1])
        assert one.t.tobytes() == two[0].t.tobytes()


def test_a_rank_reads_its_own_batches_alone(ends):
    sets = [Rows() for _ in range(3)]
    Group(3).run(
        lambda rank: mc.evaluate(ends[0], mc.Line(*ends), sets[rank], 3, batch_size=5)
    )
    batches = [{index // 5 for index in each.read} for each in sets]
    assert batches == [{0, 3, 6}, {0, 1, 4, 7}, {0, 2, 5}]


def test_what_fails_on_one_rank_fails_on_all(ends):
    def broken():
        yield X[:20], Y[:20]
        raise OSError("the disk is gone")

    def work(rank: int) -> mc.PathResult:
        data = broken() if rank == 1 else (X, Y)
        return mc.evaluate(ends[0], mc.Line(*ends), data, 3, batch_size=5)

    found = Group(3).run(work)
    assert isinstance(found[1], OSError)
    for each in (found[0], found[2]):
        assert isinstance(each, mc.ModeconnError)
        assert str(each) == "rank 1 of 3: the disk is gone"


def test_ranks_that_differ_are_named(ends):
    a, _ = ends
    other, weights = mlp(7, 9, 4, seed=2), [each.state_dict() for each in ends]
    for given, says in (
        ({"points": 4}, "ranks 0 and 1 differ in points"),
        ({"path": mc.Line(a, other)}, "ranks 0 and 1 differ in path"),
        ({"batch_size": 6}, "ranks 0 and 1 differ in batch_size"),
        ({"loss": "mse", "data": (X, X[:, :4])}, "ranks 0 and 1 differ in loss and metrics"),
        ({"data": (X.flip(0), Y)}, "ranks 0 and 1 differ in the first batch of data"),
        ({"model": nn.Sequential(*a[:1], nn.Tanh(), *a[2:])}, "differ in the network"),
    ):
        call = {"model": a, "path": mc.Line(*weights), "data": (X, Y), "points": 3}
        call |= {"batch_size": 5}
        found = Group(2).run(lambda rank: mc.evaluate(**call | (given if rank else {})))  # noqa: B023
        assert all(isinstance(each, mc.ModeconnError) and says in str(each) for each in found), (
            given,
            found,
        )


def test_what_cannot_be_shared_is_refused(ends, tmp_path: Path):
    a, b = ends
    data = TensorDataset(X, Y)
    for given, says in (
        ({"resume": "sums"}, "resume is for an evaluation in one process"),
        ({"data": DataLoader(data, shuffle=True)}, "has a RandomSampler"),
        (
            {"data": DataLoader(data, sampler=DistributedSampler(data, 2, 0))},
            "has a DistributedSampler",
        ),
    ):
        call = {"model": a, "path": mc.Line(a, b), "data": (X, Y), "points": 3} | given
        for each in Group(2).run(lambda rank: mc.evaluate(**call)):  # noqa: B023
            assert isinstance(each, mc.ModeconnError) and says in str(each), each
    alone = mc.evaluate(a, mc.Line(a, b), (X, Y), 3)
    (kept,) = Group(1).run(
        lambda rank: mc.evaluate(a, mc.Line(a, b), (X, Y), 3, resume=tmp_path / "sums")
    )
    assert bits(kept) == bits(alone)
    found = Group(2).run(  # one of them, whatever the other does
        lambda rank: mc.evaluate(a, mc.Line(a, b), (X, Y), 3, distributed=False) if rank else None
    )
    assert found[0] is None and bits(found[1]) == bits(alone)


def test_drop_ins_and_connections_are_for_one_process(ends):
    """One rank may call them while the others do something else."""
    from modeconn.dropin.landscaper import MeanLoss, compute_loss_landscape

    a, _ = ends
    directions = [[torch.randn_like(p) for p in a.parameters()] for _ in range(2)]

    def work(rank: int) -> Any:
        if rank == 0:
            options = {"steps": 3, "distance": 0.5, "dim": 2}
            return compute_loss_landscape(a, [(X, Y)], directions, MeanLoss(), **options)
        return None

    found = Group(2).run(work)
    assert found[0][0].shape == (3, 3), found
