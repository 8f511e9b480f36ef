"""Subnetwork stability: the paper's widths, trained numbers recomputed by hand, resumed runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modeconn.connection.recipe import Recipe
from modeconn.errors import ModeconnError
from modeconn.stability import subnetworks as stability
from modeconn.stability.subnetworks import subnetwork_stability
from modeconn.stability.table import StabilityTable
from naive import mlp
from walk import conv_net

QUICK = Recipe(lr=0.01, batch_size=16, epochs=6, schedule="onecycle")


def data(
    samples: int = 96, d: int = 5, classes: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, d, generator=generator)
    return x, (x @ torch.randn(d, classes, generator=generator)).argmax(1)


@pytest.mark.parametrize("method", ["trained", "head", "readout"])
def test_rows_and_original(method: str) -> None:
    torch.manual_seed(0)
    model = mlp(5, 9, 8, 7, 3)
    train, test = data(), data(40, seed=1)
    table = subnetwork_stability(model, model, train, test, draws=3, method=method, recipe=QUICK)
    assert [(row.entry, row.draw) for row in table.rows] == [
        (e, d) for e in range(4) for d in range(3)
    ]
    assert {row.method for row in table.rows} == {method}
    for name, (x, y) in (("train", train), ("test", test)):
        logits = model(x).detach()
        assert getattr(table.original, f"{name}_loss") == pytest.approx(
            float(nn.functional.cross_entropy(logits, y)), rel=1e-5
        )
        assert getattr(table.original, f"{name}_error") == float(
            (logits.argmax(1) != y).double().mean()
        )
    # Draws differ, and training helps: chance is log 3.
    assert len(set(table.column("train_loss", 1))) == 3
    assert table.column("train_loss", 0).min() < math.log(3)


def test_shapes_of_the_subnetworks(monkeypatch: pytest.MonkeyPatch) -> None:
    """|I_l| = n_l - floor(n_l / F), widths floor(n_p / F), all inputs at entry layer 0."""
    seen = {}
    real = stability.train_subnetworks

    def spy(chain, starts, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen[starts[0].entry] = [(len(sub.kept), sub.widths) for sub in starts]
        return real(chain, starts, *args, **kwargs)

    monkeypatch.setattr(stability, "train_subnetworks", spy)
    model = mlp(5, 9, 8, 7, 3)
    subnetwork_stability(
        model, model, data(), fraction=4, draws=2, method="trained", recipe=Recipe(epochs=0)
    )
    assert seen == {
        0: [(5, (2, 2, 1))] * 2,
        1: [(7, (2, 1))] * 2,
        2: [(6, (1,))] * 2,
        3: [(6, ())] * 2,
    }


def test_convolutions_are_trained_to_full_depth() -> None:
    model = conv_net().eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 2, 8, 8, generator=generator), torch.arange(24) % 3
    table = subnetwork_stability(
        model, model, (x, y), draws=2, recipe=Recipe(epochs=2, lr=0.003), entries=[2, 1]
    )
    assert table.entries == [1, 2] and {row.method for row in table.rows} == {"trained"}
    with pytest.raises(ModeconnError, match='use "trained"'):
        subnetwork_stability(model, model, (x, y), method="head")


def test_interrupted_and_resumed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    model = mlp(5, 9, 8, 3)
    whole = subnetwork_stability(model, model, data(), draws=2, recipe=QUICK)
    monkeypatch.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", 0.0)
    lines = 0

    def interrupt(line: str) -> None:
        nonlocal lines
        lines += 1
        if lines == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subnetwork_stability(
            model, model, data(), draws=2, recipe=QUICK, folder=tmp_path, log=interrupt
        )
    kept = sorted(path.suffix for path in tmp_path.iterdir())
    assert kept == [".json", ".training"]
    again = subnetwork_stability(model, model, data(), draws=2, recipe=QUICK, folder=tmp_path)
    for a, b in zip(whole.rows, again.rows, strict=True):
        assert (a.entry, a.draw, a.train_loss, a.train_error) == (
            b.entry,
            b.draw,
            b.train_loss,
            b.train_error,
        )
    assert not list(tmp_path.glob("*.training"))
    # A third call only reads.
    assert (
        subnetwork_stability(model, model, data(), draws=2, recipe=QUICK, folder=tmp_path) == again
    )
    # Another network is not mistaken for this one.
    other = mlp(5, 9, 8, 3, seed=5)
    with pytest.raises(ModeconnError, match="another network"):
        subnetwork_stability(other, other, data(), draws=2, recipe=QUICK, folder=tmp_path)
    assert isinstance(StabilityTable.load(next(iter(tmp_path.glob("*.json")))), StabilityTable)


def test_bad_input() -> None:
    model = mlp(5, 8, 3)
    for kwargs, message in (
        ({"fraction": 1}, "fraction is 1: expected"),
        ({"draws": 0}, "draws is 0: expected"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"entries": [2]}, "entry layer 2"),
        ({"fraction": 100}, "layer 1 has 8 units"),
        ({"recipe": Recipe(lr=-1)}, "lr is -1"),
    ):
        with pytest.raises(ModeconnError, match=message):
            subnetwork_stability(model, model, data(), **kwargs)
    x, _ = data()
    with pytest.raises(ModeconnError, match="labels run from 9 to 9"):
        subnetwork_stability(model, model, (x, torch.full((96,), 9)))
