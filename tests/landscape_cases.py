"""loss_landscapes as loops written from its rules, and metrics of all kinds, for its tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn.dropin.loss_landscapes as loss_landscapes
from dropin_cases import KINDS, small
from modeconn.dropin.loss_landscapes import values
from modeconn.evaluation.replay import schedule


def plan_everything(monkeypatch) -> None:
    for module in (schedule, values):
        monkeypatch.setattr(module, "worth", lambda *_: "")
    monkeypatch.setattr(schedule, "_GAIN", float("inf"))


class Oracle:
    """The package's functions as loops that move a model in place."""

    GeneralModelWrapper = loss_landscapes.GeneralModelWrapper

    @staticmethod
    def _parameters(model: Any) -> list[Tensor]:
        modules = [model] if isinstance(model, nn.Module) else model.modules
        return [p for module in modules for p in module.parameters()]

    @staticmethod
    def _wrapped(model: Any) -> Any:
        from modeconn.dropin.loss_landscapes.wrappers import wrapped

        return wrapped(model)

    def point(self, model: Any, metric: Any) -> Any:
        return metric(self._wrapped(model))

    @torch.no_grad()
    def linear_interpolation(self, start: Any, end: Any, metric: Any, steps: int) -> np.ndarray:
        pairs = list(zip(self._parameters(start), self._parameters(end)))
        return self._line(start, [(b - a) / steps for a, b in pairs], metric, steps)

    @torch.no_grad()
    def random_line(
        self, model: Any, metric: Any, distance: float, steps: int, how: str | None
    ) -> np.ndarray:
        weights = self._parameters(model)
        d = [torch.rand(p.shape) for p in weights]
        d = self._normalized(d, weights, how)
        length = self._norm(weights) / distance / steps
        return self._line(model, [x * length / self._norm(d) for x in d], metric, steps)

    @torch.no_grad()
    def planar_interpolation(
        self, start: Any, one: Any, two: Any, metric: Any, steps: int
    ) -> np.ndarray:
        weights = self._parameters(start)
        ds = [
            [(b - a) / steps for a, b in zip(weights, self._parameters(end))] for end in (one, two)
        ]
        return self._plane(start, ds, metric, steps)

    @torch.no_grad()
    def random_plane(
        self, model: Any, metric: Any, distance: float, steps: int, how: str | None
    ) -> np.ndarray:
        weights = self._parameters(model)
        first = [torch.rand(p.shape) for p in weights]
        second = [torch.rand(p.shape) for p in weights]
        share = sum((a * b).sum() for a, b in zip(first, second)) / self._norm(first) ** 2
        second = [b - share * a for a, b in zip(first, second)]
        ds = []
        for d in (first, second):
            d = self._normalized(d, weights, how)
            length = self._norm(weights) / distance / steps
            ds.append([x * length / self._norm(d) for x in d])
        for d in ds:
            self._move(model, d, -steps / 2)
        return self._plane(model, ds, metric, steps)

    def _line(self, model: Any, d: list[Tensor], metric: Any, steps: int) -> np.ndarray:
        found = []
        for _ in range(steps):
            self._move(model, d, 1)
            found.append(metric(self._wrapped(model)))
        return np.array(found)

    def _plane(self, model: Any, ds: list[list[Tensor]], metric: Any, steps: int) -> np.ndarray:
        rows = []
        for i in range(steps):
            row: list[Any] = []
            for _ in range(steps):
                self._move(model, ds[1], -1 if i % 2 else 1)
                row.insert(0 if i % 2 else len(row), metric(self._wrapped(model)))
            rows.append(row)
            self._move(model, ds[0], 1)
        return np.array(rows)

    def _move(self, model: Any, d: list[Tensor], factor: float) -> None:
        with torch.no_grad():
            for p, x in zip(self._parameters(model), d):
                p.add_(x, alpha=factor)

    @staticmethod
    def _norm(tensors: list[Tensor]) -> float:
        return float(torch.cat([t.detach().flatten() for t in tensors]).norm())

    def _normalized(self, d: list[Tensor], weights: list[Tensor], how: str | None) -> list[Tensor]:
        d = [x.clone() for x in d]
        for x, w in zip(d, weights):
            if how == "model":  # one after another: those before count as they are now
                x *= self._norm(weights) / self._norm(d)
            elif how == "layer":
                x *= w.norm() / x.norm()
            elif how == "filter" and w.dim() == 1:
                x.copy_(x.sign() * w.abs())
            elif how == "filter":
                for row, its in zip(x, w):
                    row *= its.norm() / row.norm()
        return d


# -- metrics ---------------------------------------------------------------------------------------

X, Y = KINDS["mlp"][1](), torch.arange(30) % 4
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 30, 8)]


def accuracy(model: Any) -> float:
    return (model.forward(X).argmax(1) == Y).float().mean().item()


def over_batches(model: Any) -> float:
    return float(np.mean([F.cross_entropy(model.forward(x), y).item() for x, y in BATCHES]))


def with_penalty(model: Any) -> float:
    squares = sum(p.square().sum() for p in model.get_module_parameters())
    return (F.cross_entropy(model.forward(X), Y) + 0.1 * squares).item()


def of_the_module(model: Any) -> float:
    return F.cross_entropy(model.modules[0](X), Y).item()


def own_loss(model: Any) -> float:
    return (model.forward(X).softmax(1)[:, 0] - 0.5).abs().mean().item()


def in_eval(model: Any) -> float:
    model.eval()
    return F.cross_entropy(model.forward(X), Y).item()


def noisy(model: Any) -> float:
    return F.cross_entropy(model.forward(X + 0.1 * torch.randn_like(X)), Y).item()


def gradient_norm(model: Any) -> float:
    model.requires_grad_(True)
    parameters = [p for module in model.modules for p in module.parameters()]
    found = torch.autograd.grad(F.cross_entropy(model.forward(X), Y), parameters)
    model.requires_grad_(False)
    return float(sum(g.norm() for g in found))


def curvature(model: Any) -> float:
    model.requires_grad_(True)
    parameters = [p for module in model.modules for p in module.parameters()]
    value = F.cross_entropy(model.forward(X), Y)
    first = torch.autograd.grad(value, parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), parameters)
    model.requires_grad_(False)
    return float(sum(g.norm() for g in second))


def shuffled(model: Any) -> float:
    order = torch.randperm(30)[:10]
    return F.cross_entropy(model.forward(X[order]), Y[order]).item()


def episode(model: Any) -> float:
    seen, total = torch.ones(1, 6), 0.0
    for _ in range(3):
        out = model.forward(seen)
        total += out.max().item()
        seen = torch.cat([seen[:, 1:], out[:, :1]], 1)
    return total


def perturbed(model: Any) -> Any:
    return loss_landscapes.metrics.LossPerturbations(F.cross_entropy, X, Y, 2, 0.1)(model)


def loss(function: Any) -> Any:
    return loss_landscapes.metrics.Loss(function, X, Y)


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    return small(0), small(1)
