"""Pieces of networks as users write them: each maps a tensor to a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "softplus": F.softplus,
    "softplus_beta": lambda x: F.softplus(x, beta=2.0),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "relu6": F.relu6,
    "log_sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "clamp_min": lambda x: x.clamp(min=0),
    "abs": torch.abs,
    "square": lambda x: x * x,
    "sin": torch.sin,
    "threshold": lambda x: F.threshold(x, 0.1, -0.3),
}


class Apply(nn.Module):
    """A function of the value alone."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self._function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)

    def extra_repr(self) -> str:
        return self.name


class InPlace(nn.Module):
    """Changes what it is given, which may be the network's input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "relu":
            return F.relu(x, inplace=True)
        if self.kind == "halve":
            x /= 2
            return x
        x[:, 0] += 0.5
        return x

    def extra_repr(self) -> str:
        return self.kind


class Residual(nn.Module):
    """x + inner(x), or inner's value concatenated to x, or a gate on x."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Tensor:
        value = self.inner(x.clone())
        if self.kind == "add":
            return x + value
        if self.kind == "sub":
            return torch.sub(x, value, alpha=0.5)
        if self.kind == "cat":
            return torch.cat([x, value], 1)
        return x * torch.sigmoid(value)

    def extra_repr(self) -> str:
        return self.kind


class Constant(nn.Module):
    """Multiplies by, or adds, numbers that are no parameter, per feature."""

    def __init__(self, kind: str, width: int, op: str) -> None:
        super().__init__()
        self.kind, self.op, self.width = kind, op, width
        value = torch.linspace(0.5, 1.5, width)
        if kind == "buffer":
            self.register_buffer("value", value)
        elif kind == "not saved":
            self.register_buffer("value", value, persistent=False)
        elif kind == "whole numbers":
            self.register_buffer("value", torch.arange(width) % 3)
        elif kind == "attribute":
            self.value = value

    def _constant(self, x: Tensor) -> Tensor:
        if self.kind == "literal":
            return torch.tensor([1.0, 0.5, 2.0])[torch.arange(self.width) % 3]
        if self.kind == "arange":
            return torch.arange(self.width, dtype=x.dtype)
        return self.value

    def forward(self, x: Tensor) -> Tensor:
        constant = self._constant(x).to(x.dtype)
        constant = constant.view(-1, *[1] * (x.dim() - 2)) if x.dim() == 4 else constant
        return x * constant if self.op == "mul" else x + constant

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.op}"


class Branch(nn.Module):
    """Looks at the data, so that it cannot be exported."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.detach().abs().sum()) >= 0 else x


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Tied(nn.Module):
    """Two linear layers with one weight, there and back."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.there(x)) @ self.back.weight


class Hooked(nn.Module):
    """A layer with hooks before and after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        inner.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        inner.register_forward_hook(lambda module, args, out: out + 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Counts(nn.Module):
    """Keeps count of its calls in a buffer, which its value does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class ByMode(nn.Module):
    """Noise in training mode, another scale in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else 0.9 * x


class Attention(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, width: int, heads: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal, self.fused = heads, causal, fused

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = (
            self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        q, k, v = parts[0], parts[1], parts[2]
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
            if self.causal:
                mask = torch.ones(length, length, dtype=torch.bool).tril()
                scores = scores.masked_fill(~mask, float("-inf"))
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Network(nn.Module):
    """Pieces one after the other.

    Args:
        returns: how the value is returned: "tensor", "tuple" or "dict" (under "logits").
    """

    def __init__(self, pieces: list[nn.Module], returns: str = "tensor") -> None:
        super().__init__()
        self.pieces, self.returns = nn.ModuleList(pieces), returns

    def forward(self, x: Tensor) -> Any:
        for piece in self.pieces:
            x = piece(x)
        if self.returns == "tuple":
            return x, x.sum(1)
        return {"logits": x} if self.returns == "dict" else x
