"""Modules that are no function of state dict and inputs alone: right numbers, nothing changed."""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(20) % 3
T = [0.0, 0.3, 1.0]
pytestmark = pytest.mark.filterwarnings(
    "ignore:the model runs as it is", "ignore:part of the model"
)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(1)
    return first, make()


def right(make: Callable[[], nn.Module], a: dict[str, Tensor], b: dict[str, Tensor]) -> np.ndarray:
    """The loss of a fresh float64 network at each point, loaded before eval()."""
    losses = []
    for t in T:
        network = make().double()
        network.load_state_dict(
            {
                k: (1 - t) * v.double() + t * b[k].double() if v.is_floating_point() else v
                for k, v in a.items()
            }
        )
        with torch.no_grad():
            losses.append(float(F.cross_entropy(network.eval()(X.double().clone()), Y)))
    return np.array(losses)


class MergesOnEval(nn.Linear):
    """Low-rank adapters that eval() adds to the weight, and train() takes out again."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        more = 0 if self.merged else x @ self.down.t() @ self.up.t()
        return F.linear(x, self.weight, self.bias) + more


class FoldsOnEval(nn.Module):
    """Two branches that eval() folds into an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.folded = nn.Linear(6, 3), nn.Linear(6, 3), None

    def train(self, mode: bool = True) -> nn.Module:
        self.folded = None if mode else (self.one.weight + self.two.weight).detach()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.one.weight + self.two.weight if self.folded is None else self.folded
        return F.linear(x, weight, self.one.bias)


class RegistersOnEval(nn.Module):
    """eval() registers a buffer that forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def train(self, mode: bool = True) -> nn.Module:
        if mode and hasattr(self, "filter"):
            del self.filter
        if not mode:
            self.register_buffer("filter", self.weight.detach() * 2)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * 2 if self.training else self.filter).t()


class ClampsWeight(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class KeepsProduct(nn.Module):
    """Keeps the product of two weights from the first forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 6))
        self.product: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.product is None:
            self.product = (self.one @ self.two).detach()
        return x @ self.product.t()


class ChangesInput(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean(1, keepdim=True)
        x[:, 0] = 0
        return super().forward(x)


class ClampsEmbedding(nn.Module):
    """Embedding(max_norm=…) scales rows of its weight in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x[:, 0] > 0).long() + (x[:, 1] > 0).long()))


class SharedAndClosed(nn.Module):
    """One submodule under two names, in a network that cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two, self.head = self.one, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) if float(x.sum()) > -1e9 else x
        return self.head(torch.relu(self.two(x)))


class CountsCalls(nn.Linear):
    """Changes state that nothing depends on."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        return super().forward(x)


class BakedWeight(nn.Module):
    """Reads its weight as numbers while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.tensor(self.scale.tolist(), dtype=x.dtype)


MODULES = [
    MergesOnEval,
    FoldsOnEval,
    RegistersOnEval,
    ClampsWeight,
    KeepsProduct,
    ChangesInput,
    ClampsEmbedding,
    SharedAndClosed,
    CountsCalls,
    BakedWeight,
]


def contents(*things: Any) -> list[Any]:
    """What must not change: tensors bit for bit, modes and plain attributes."""
    kept: list[Any] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            kept += [(type(m), m.training, sorted(vars(m))) for m in thing.modules()]
            thing = thing.state_dict()
        tensors = thing.values() if isinstance(thing, dict) else [thing]
        kept += [tensor.detach().clone().numpy().tobytes() for tensor in tensors]
    return kept


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("ends", ["modules", "state dicts"])
def test_right_and_untouched(make: type[nn.Module], ends: str):
    a, b = pair(make)
    states = copy.deepcopy((a.state_dict(), b.state_dict()))
    expected = right(make, *states)
    x = X.clone()
    path = mc.Line(a, b) if ends == "modules" else mc.Line(*states)
    before = contents(a, b, *states, x)
    modes = torch.get_rng_state()
    for _ in range(2):  # the second time by what is known of the module
        for precision in ("float32", "float64"):
            got = mc.evaluate(a, path, (x, Y), T, precision=precision, progress=False).loss
            np.testing.assert_allclose(got, expected, rtol=1e-5 if precision == "float32" else 1e-9)
    outputs = mc.forward(a, path, [0.3], x)
    assert outputs.shape == (1, 20, 3)
    mc.explain(a, path, x)
    assert contents(a, b, *states, x) == before
    assert torch.equal(torch.get_rng_state(), modes)


@pytest.mark.parametrize("new", [False, True], ids=["hooks", "parametrizations"])
def test_spectral_norm_is_one_at_every_point(new: bool):
    norm = nn.utils.parametrizations.spectral_norm if new else nn.utils.spectral_norm

    def make() -> nn.Module:
        network = nn.Sequential(norm(nn.Linear(6, 12)), nn.ReLU(), norm(nn.Linear(12, 3))).train()
        with torch.no_grad():
            for _ in range(60):
                network(torch.randn(8, 6))
        return network.eval()

    a, b = pair(make)
    middle = copy.deepcopy(a)
    middle.load_state_dict({k: (v + b.state_dict()[k]) / 2 for k, v in a.state_dict().items()})
    middle.train()
    with torch.no_grad():
        for _ in range(300):  # power iteration with the weights of the middle
            middle(X)
        expected = [float(F.cross_entropy(m.eval()(X), Y)) for m in (a, middle, b)]
    got = mc.evaluate(a, mc.Line(a, b), (X, Y), [0.0, 0.5, 1.0], progress=False).loss
    np.testing.assert_allclose(got, expected, rtol=1e-4)


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


def test_threads_share_a_model_and_nothing_is_lost():
    """8 threads with 50 evaluations each, switched often: equal numbers, the same streams."""
    a, b = pair(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    closed = pair(SharedAndClosed)
    expected = [
        mc.evaluate(m, mc.Line(m, n), (X, Y), T, progress=False).loss for m, n in ((a, b), closed)
    ]
    streams, interval = (sys.stdout, sys.stderr), sys.getswitchinterval()
    filters = list(warnings.filters)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        own = random.Random(seed)
        try:
            for number in range(50):
                which = own.randrange(2)
                m, n = ((a, b), closed)[which]
                if number == 25:
                    m, n = pair(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))[
                        ::-1
                    ]
                    mc.evaluate(m, mc.Line(m, n), (X, Y), T, progress=False)
                    continue
                got = mc.evaluate(m, mc.Line(m, n), (X, Y), T, progress=False).loss
                np.testing.assert_allclose(got, expected[which], rtol=1e-6)
        except BaseException as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[0]
    assert (sys.stdout, sys.stderr) == streams
    assert warnings.filters == filters
