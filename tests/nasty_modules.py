"""Modules that change what they are given, or themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] += 1
        return self.layer(F.relu(x, inplace=True))


class Clamps(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.1, 0.1)
        return self.layer(x)


class Merges(InPlace):
    """An adapter that eval() adds to the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.more, self.merged = nn.Parameter(torch.randn(3, 6)), False

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.merged:
            self.layer.weight.data += -self.more if mode else self.more
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (0 if self.merged else x @ self.more.t())


class Counts(InPlace):
    """Counts calls in a buffer, and keeps the last value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.layer(x)
        return self.last


class Norms(nn.Sequential):
    """Norms and dropout in training mode, with a hook."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
        self[0].register_forward_hook(lambda module, args, out: out.mul_(0.5))
        self.train()


class Tied(nn.Module):
    """Frozen, tied and sparse-gradient parts, weight norm among them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.last.weight.requires_grad_(False)
        self.three = self.two

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.three(torch.relu(self.two(self.one(x)))))
