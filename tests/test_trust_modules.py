"""Modules that are no function of state dict and inputs alone: right numbers, nothing changed."""

from __future__ import annotations

import copy
import random
import sys
import threading
import warnings
from typing import Any

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
