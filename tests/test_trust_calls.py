"""Modules that draw numbers, wrap others, or take and return other things than tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from module_cases import T, X, Y, pair, right

pytestmark = pytest.mark.filterwarnings(
    "ignore:the model runs as it is", "ignore:part of the model"
)


class Draws(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class Shuffles(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand_like(x).argsort(1)[:, :3]
        return super().forward(torch.gather(x, 1, kept))


@pytest.mark.parametrize("make", [Draws, Shuffles])
def test_what_draws_numbers_is_called_random(make: type[nn.Module]):
    a, b = pair(make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, progress=False)
    texts = [str(w.message) for w in caught]
    assert any("draws random numbers" in text for text in texts)
    assert not any("depends on the other samples" in text for text in texts)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.jit.script]
)
def test_wrapped_networks(wrap: Callable[[nn.Module], nn.Module]):
    a, b = pair(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
    expected = mc.evaluate(a, mc.Line(a, b), (X, Y), T, progress=False).loss
    wrapped = wrap(a), wrap(b)
    got = mc.evaluate(wrapped[0], mc.Line(*wrapped), (X, Y), T, progress=False).loss
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Linear, "the model is the class Linear: expected a network"),
        (
            functools.partial(nn.Linear, 6),
            "the model is of type partial: expected a torch.nn.Module",
        ),
    ],
)
def test_no_module_is_one_line(model: Any, text: str):
    a, b = pair(lambda: nn.Linear(6, 3))
    with pytest.raises(mc.ModeconnError, match=text):
        mc.evaluate(model, mc.Line(a, b), (X, Y), T)


class TakesDict(nn.Linear):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"])


class TakesAny(nn.Linear):
    def forward(self, *xs: Tensor) -> Tensor:
        return super().forward(xs[0])


class TakesKeywords(nn.Linear):
    def forward(self, **given: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(given["x"])


class Unknown:
    """A class that pytree does not know, as caches are."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class Output(NamedTuple):
    logits: Tensor
    cache: Unknown


class ReturnsMore(nn.Linear):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        return Output(super().forward(x), Unknown(x))


class BatchLast(nn.Linear):
    """Arithmetic with the samples on the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x.t() * 2.0).t())


class EmptyRest(nn.Linear):
    """A part of no features, as of a rotary embedding that turns all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(torch.cat([x[:, :6], x[:, 6:]], 1)), x[:, 6:]], 1)


@pytest.mark.parametrize(
    "make", [TakesDict, TakesAny, TakesKeywords, ReturnsMore, BatchLast, EmptyRest]
)
def test_every_way_to_take_and_return_is_captured(make: type[nn.Linear]):
    a, b = pair(lambda: make(6, 3))
    x: Any = {"x": X} if make in (TakesDict, TakesKeywords) else X
    scale = 2.0 if make is BatchLast else 1.0
    result = mc.evaluate(a, mc.Line(a, b), (x, Y), T, progress=False)
    assert result.info["fallback"] == ""
    for t, got in zip(T, result.loss):
        pairs = zip(a.state_dict().values(), b.state_dict().values())
        weight, bias = ((1 - t) * p + t * q for p, q in pairs)
        want = F.cross_entropy(F.linear(scale * X, weight, bias), Y)
        assert got == pytest.approx(float(want), rel=1e-5)


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_extra_state_is_no_weight():
    a, b = pair(lambda: Extra(6, 3))
    np.testing.assert_allclose(
        mc.evaluate(a, mc.Line(a, b), (X, Y), T, progress=False).loss,
        right(
            lambda: nn.Linear(6, 3),
            *({k: v for k, v in m.state_dict().items() if isinstance(v, Tensor)} for m in (a, b)),
        ),
        rtol=1e-5,
    )


class ByPosition(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OneDict(nn.Linear):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"])


class ByName(nn.Linear):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)


@pytest.mark.parametrize("kind", [ByPosition, OneDict, ByName])
def test_one_input_of_a_dict_goes_by_name_whole_or_by_position(kind: type[nn.Linear]):
    a, b = pair(lambda: kind(6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = mc.evaluate(a, mc.Line(a, b), {"image": X, "label": Y}, T, progress=False)
    plain = nn.Linear(6, 3)
    expected = mc.evaluate(plain, mc.Line(a.state_dict(), b.state_dict()), (X, Y), T)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-6)
