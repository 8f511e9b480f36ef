"""Networks that take batches of one size, squeeze their values, or ask how long a batch is."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from refused import refused

G = torch.Generator().manual_seed(3)
X, TEXTS = torch.randn(23, 6, generator=G), torch.randn(23, 4, 6, generator=G)
Y = torch.arange(23) % 3
T = [0.0, 0.3, 1.0]


class State(nn.Module):
    """A recurrent network whose first state has ten rows."""

    rows = 10

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x, torch.zeros(1, self.rows, 5, dtype=x.dtype))[0][:, -1])


class Reshaped(nn.Linear):
    """A batch size in a view, and an output beside the logits."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        h = super().forward(x.view(10, 6))
        return {"logits": h, "steps": 3, "states": h[None]}


class OfFour(State):
    """The rows that networks are traced with."""

    rows = 4


class OfOne(State):
    rows = 1


class Mixes(State):
    """Its samples see the mean of their batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


def pair(kind: type[nn.Module], *args: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = kind(*args)
    torch.manual_seed(1)
    return first, kind(*args)


def right(kind: type[nn.Module], ends: tuple[nn.Module, nn.Module], x: Tensor, *args: Any) -> Any:
    """The outputs at each point, row by row where the network takes them so."""
    made = kind(*args).double().eval()
    states = [end.state_dict() for end in ends]
    losses = []
    size = getattr(made, "rows", 10)
    for t in T:
        made.load_state_dict({k: (1 - t) * v + t * states[1][k] for k, v in states[0].items()})
        outputs = []
        for row in x.double():
            out = made(row.expand(size, *row.shape).clone())
            outputs.append((out["logits"] if isinstance(out, dict) else out)[0])
        losses.append(float(F.cross_entropy(torch.stack(outputs), Y[: len(x)])))
    return losses


@pytest.mark.filterwarnings("ignore:the model runs as it is")
@pytest.mark.parametrize(
    ("kind", "size"), [(State, 10), (Reshaped, 10), (OfFour, 4), (OfOne, 1)], ids=str
)
def test_batches_of_one_size(kind: type[nn.Module], size: int):
    a, b = pair(kind)
    x = X if kind is Reshaped else TEXTS
    with torch.no_grad():
        expected = right(kind, (a, b), x)
    loss: Any = "cross_entropy"
    if kind is Reshaped:
        loss = lambda o, t: F.cross_entropy(o["logits"], t, reduction="none")  # noqa: E731
    for _ in range(2):  # the second time with the graph of the first
        got = mc.evaluate(a, mc.Line(a, b), (x, Y), T, loss=loss, batch_size=size, progress=False)
        np.testing.assert_allclose(got.loss, expected, rtol=1e-5)
        assert got.samples == 23
    if kind is not Reshaped:
        outputs = mc.forward(a, mc.Line(a, b), T, x[:size])
        assert outputs.shape == (3, size, 3)


def test_another_batch_size_is_refused_with_the_remedy():
    a, b = pair(State)
    with refused("hidden size (1, 4, 5), got [1, 10, 5]", "pass that as batch_size"):
        mc.evaluate(a, mc.Line(a, b), (TEXTS, Y), T)
    with refused("mat1 and mat2 shapes cannot be multiplied"):
        mc.evaluate(nn.Linear(7, 3), mc.Line(nn.Linear(7, 3), nn.Linear(7, 3)), (X, Y), T)


@pytest.mark.filterwarnings("ignore:the model runs as it is")
def test_batches_of_one_size_whose_samples_mix_need_whole_batches():
    a, b = pair(Mixes)
    with pytest.warns(UserWarning, match="depends on the other samples"):
        got = mc.evaluate(a, mc.Line(a, b), (TEXTS[:20], Y[:20]), T, batch_size=10)
    a.double()
    with torch.no_grad():
        halves = [a(TEXTS[i : i + 10].double()) for i in (0, 10)]
    expected = float(F.cross_entropy(torch.cat(halves), Y[:20]))
    a.float()
    assert got.loss[0] == pytest.approx(expected, rel=1e-5)
    words = "3 rows", "takes 10 at a time", "a multiple"
    with pytest.warns(match="depends on the other"), refused(*words):
        mc.evaluate(a, mc.Line(a, b), (TEXTS, Y), T, batch_size=10)


class Squeezes(nn.Module):
    """Squeezes its output, and runs as it is where that is asked for."""

    def __init__(self, classes: int, closed: str) -> None:
        super().__init__()
        self.inner, self.out, self.closed = nn.Linear(6, 5), nn.Linear(5, classes), closed

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.closed == "branch" and float(x.sum()) < -1e9:
            h = h + 1
        out = self.out(torch.relu(h))
        return out.squeeze(0).squeeze() if self.closed == "dims" else out.squeeze()


@pytest.mark.filterwarnings("ignore:the model runs as it is")
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("closed", ["", "branch", "dims"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_last_batch_of_one_that_is_squeezed(classes: int, closed: str, backend: str):
    a, b = pair(Squeezes, classes, closed)
    y: Tensor = Y.float() if classes == 1 else Y
    options = {"loss": "mse" if classes == 1 else "cross_entropy", "backend": backend}
    path = mc.Line(a, b)
    expected = mc.evaluate(a, path, (X[:9], y[:9]), T, batch_size=9, **options).loss
    got = mc.evaluate(a, path, (X[:9], y[:9]), T, batch_size=4, **options)
    np.testing.assert_allclose(got.loss, expected, rtol=1e-5)
    (loss,) = mc.evaluate(a, path, (X[:1], y[:1]), [0.0], **options).loss
    with torch.no_grad():
        out = a.eval()(X[:2])[0]
    want = F.mse_loss(out, y[0]) if classes == 1 else F.cross_entropy(out, y[0])
    assert loss == pytest.approx(float(want), rel=1e-5)


class Part(nn.Module):
    """Cannot be exported, and squeezes its values; its rows may be on the second axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.inner, self.axis = nn.Linear(5, 5), axis

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        h = self.inner(x) * scale
        if float(x.sum()) < -1e9:
            h = h + 1
        return h.squeeze(self.axis), h.sum(-1)


class Around(nn.Module):
    """A network that can be exported around such a part."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.first, self.part, self.out = nn.Linear(6, 5), Part(axis), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.part.axis:
            values, total = self.part(h.expand(2, *h.shape), 0.5)
            return self.out(values.mean(0)) + total.mean(0)[:, None]
        values, total = self.part(h, 0.5)
        return self.out(values.reshape(-1, 5)) + total.reshape(-1, 1)


@pytest.mark.filterwarnings("ignore:part of the model runs as it is")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_that_runs_as_it_is_squeezes_a_lone_row(axis: int):
    a, b = pair(Around, axis)
    path = mc.Line(a, b)
    got = mc.evaluate(a, path, (X[:9], Y[:9]), T, batch_size=4, precision="float64")
    assert got.info["fallback"].startswith("part (Part)")
    expected = mc.evaluate(a, path, (X[:9], Y[:9]), T, batch_size=9, precision="float64").loss
    np.testing.assert_allclose(got.loss, expected, rtol=1e-12)
    alone = mc.evaluate(a, path, (X[8:9], Y[8:9]), [0.0], precision="float64").loss[0]
    with torch.no_grad():
        out = a.double().eval()(X[7:9].double())[1:]
    assert alone == pytest.approx(float(F.cross_entropy(out, Y[8:9])), rel=1e-12)


class Counts(nn.Linear):
    """Asks for the length of a batch in the ways that people do."""

    def __init__(self, how: str) -> None:
        super().__init__(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        if self.how == "len":
            return h[torch.arange(len(x))]
        if self.how == "zeros":
            return h + torch.zeros(len(x), 3)
        if self.how == "view":
            return h.view(len(x), -1)
        return h[torch.arange(x.size(0))].reshape(x.shape[0], -1)


@pytest.mark.parametrize("how", ["len", "zeros", "view", "size"])
def test_the_length_of_a_batch_is_captured(how: str):
    a, b = pair(Counts, how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = mc.evaluate(a, mc.Line(a, b), (X, Y), T, batch_size=10, progress=False)
    assert got.info["fallback"] == ""
    with torch.no_grad():
        assert got.loss[0] == pytest.approx(float(F.cross_entropy(a(X), Y)), rel=1e-5)
