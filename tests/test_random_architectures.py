"""Random networks of all that the planner has rules for, with dead parts, along every path."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from naive import clone, pass_per_point

State = dict[str, Tensor]


class Parallel(nn.Module):
    """Branches over one input: added up, side by side, or one that scales the other."""

    def __init__(self, branches: list[nn.Module], kind: str) -> None:
        super().__init__()
        self.branches, self.kind = nn.ModuleList(branches), kind

    def forward(self, x: Tensor) -> Tensor:
        first, second = (branch(x) for branch in self.branches)
        if self.kind == "concat":
            return torch.cat([first, second], 1)
        return first * torch.sigmoid(second) if self.kind == "gate" else first + second


class Parts(nn.Module):
    """Half of the channels through a layer of their own, put together again in the other order."""

    def __init__(self, channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.half = inner, channels // 2

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split([self.half, x.shape[1] - self.half], dim=1)
        return torch.cat([rest, self.inner(first)], 1)


class Attend(nn.Module):
    """Attention between pixels, in one of the usual ways, behind a norm of one kind or by hand."""

    def __init__(self, channels: int, heads: int, norm: str, idiom: str, causal: bool) -> None:
        super().__init__()
        self.heads, self.size, self.idiom, self.causal = heads, 2, idiom, causal
        self.norm = nn.LayerNorm(channels) if norm == "layer" else None
        self.scale = nn.Parameter(torch.ones(channels))
        self.qkv, self.out = (
            nn.Linear(channels, 3 * heads * self.size),
            nn.Linear(heads * self.size, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        n, count, _ = tokens.shape
        if self.norm is not None:
            normed = self.norm(tokens)
        else:
            normed = (
                tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6) * self.scale
            )
        qkv = self.qkv(normed)
        if self.idiom == "unbind":
            q, k, v = (
                qkv.reshape(n, count, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            )
        else:
            q, k, v = (
                part.view(n, count, self.heads, self.size).transpose(1, 2)
                for part in qkv.chunk(3, dim=-1)
            )
        if self.idiom == "by hand":
            y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        tokens = tokens + self.out(y.transpose(1, 2).reshape(n, count, self.heads * self.size))
        return tokens.transpose(1, 2).reshape(x.shape)


class First(nn.Module):
    """One of the tokens, as classifiers read it."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)[:, self.token]


def divisor(r: random.Random, number: int) -> int:
    return r.choice([d for d in range(1, number + 1) if number % d == 0])


def random_block(r: random.Random, channels: int, depth: int = 0) -> tuple[nn.Module, int]:
    """A piece of a network that keeps the number of pixels, and its channels."""
    kind = r.choice(
        "conv conv grouped transposed norm activation residual residual "
        "concat gate parts attend attend group_norm pool".split()
    )
    if kind in ("conv", "grouped", "transposed"):
        after, dilation, bias = 2 * r.randint(1, 4), r.randint(1, 2), r.random() < 0.7
        groups = 1 if kind == "conv" else divisor(r, int(np.gcd(channels, after)))
        if kind == "transposed":
            return nn.ConvTranspose2d(
                channels, after, 3, padding=1, groups=groups, bias=bias
            ), after
        return nn.Conv2d(
            channels, after, 3, padding=dilation, dilation=dilation, groups=groups, bias=bias
        ), after
    if kind in ("residual", "concat", "gate") and depth < 2:
        inner, after = random_chain(r, channels, r.randint(1, 3), depth + 1)
        other = (
            nn.Identity()
            if kind == "concat" or after == channels
            else nn.Conv2d(channels, after, 1)
        )
        return Parallel([inner, other], kind), after + channels if kind == "concat" else after
    if kind == "parts" and channels > 1:
        inner, after = random_chain(r, channels // 2, 1, depth + 1)
        return Parts(channels, inner), channels - channels // 2 + after
    if kind == "attend":
        idiom, causal = r.choice(["chunk", "unbind", "by hand"]), r.random() < 0.3
        return Attend(
            channels, r.randint(1, 3), r.choice(["layer", "by hand"]), idiom, causal
        ), channels
    simple: dict[str, Any] = {
        "norm": lambda: nn.BatchNorm2d(channels, affine=r.random() < 0.7),
        "group_norm": lambda: nn.GroupNorm(divisor(r, channels), channels, affine=r.random() < 0.7),
        "pool": lambda: r.choice([nn.AvgPool2d, nn.MaxPool2d])(3, 1, 1),
    }
    activation = r.choice(
        [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.Softplus, nn.Identity]
    )
    return simple.get(kind, activation)(), channels


def random_chain(
    r: random.Random, channels: int, length: int, depth: int = 0
) -> tuple[nn.Sequential, int]:
    blocks = []
    for _ in range(length):
        block, channels = random_block(r, channels, depth)
        blocks.append(block)
    return nn.Sequential(*blocks), channels


def random_network(seed: int) -> nn.Sequential:
    r = random.Random(seed)
    body, channels = random_chain(r, 3, r.randint(2, 5))
    ends = [
        [nn.Flatten(), nn.Linear(channels * 16, 10)],
        [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 7),
            nn.LayerNorm(7),
            nn.ReLU(),
            nn.Linear(7, 10),
        ],
        [First(r.randrange(16)), nn.Linear(channels, 10)],
    ]
    return nn.Sequential(*body, *r.choice(ends))


def random_state(model: nn.Module, seed: int, like: State | None = None) -> State:
    """Draw a state: parts stay those of `like`, some inputs of layers are dead, some rows zero."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    state = clone(model)
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        kept = r.random() if like is not None else 1.0
        if like is not None and kept < 0.3:
            state[key] = like[key]
            continue
        new = 0.5 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if key.endswith("running_var"):
            new = new.square() + 0.1
        if value.dim() > 1 and value.shape[1] > 1 and r.random() < 0.5:
            new[:, torch.rand(value.shape[1], generator=generator) < 0.5] = 0
        if value.dim() > 1 and r.random() < 0.2:
            new[torch.rand(len(value), generator=generator) < 0.5] = 0
        if like is not None and kept < 0.6:
            same = torch.rand(len(value), generator=generator) < 0.5
            new[same] = like[key][same]
        state[key] = new
    return state


def dead_heads(model: nn.Module, states: list[State], seed: int) -> None:
    """Some heads of attention are read by nobody, at any of the control points."""
    r = random.Random(seed)
    for name, module in model.named_modules():
        if isinstance(module, Attend):
            for head in range(module.heads):
                if r.random() < 0.4:
                    for state in states:
                        state[f"{name}.out.weight"] = state[f"{name}.out.weight"].clone()
                        state[f"{name}.out.weight"][
                            :, head * module.size : (head + 1) * module.size
                        ] = 0


PATHS: dict[str, tuple[Any, list[Any]]] = {
    "line": (lambda states: mc.Line(*states[:2]), [0.0, 0.3, 1.0, 0.3]),
    "chain": (mc.PolyChain, [0.0, 0.3, 0.5, 0.9, 0.3]),
    "bezier": (mc.Bezier, [0.0, 0.4, 1.0]),
    "plane": (lambda states: mc.Plane.through(*states), [[0.0, 0.0], [0.2, 0.3], [1.0, 0.0]]),
    "mixture": (mc.Mixture, [[0.5, 0.2, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]]),
}


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated", "ignore:.* is not finite")
@settings(max_examples=6)
@given(seed=st.integers(0, 10**9))
def test_random_architectures(seed):
    agree(random_network(seed).double(), seed)


def agree(model: nn.Module, seed: int) -> None:
    """Compare every kind of path through random control points with a pass per point."""
    first = random_state(model, seed)
    states = [first, *(random_state(model, seed + k, like=first) for k in (1, 2))]
    dead_heads(model, states, seed)
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    y = torch.arange(4)
    for make, t in PATHS.values():
        path = make(states)
        got = mc.evaluate(model, path, (x, y), t, precision="float64")
        exact = pass_per_point(model, path, x, y, got.t, torch.float64)
        np.testing.assert_allclose(got.loss, exact["loss"], rtol=1e-8)
        assert not got.info["fallback"]
