"""Small networks that are no chains of layers, for the tests of certificates on captured graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.models.resnet import Block


class Residual(nn.Module):
    """Blocks on a stream, in two stages: the form of a ResNet, with names of its own."""

    def __init__(self, convolutions: int = 2, width: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        layers, before = [], width
        for stage in range(2):
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                layers.append(Block(before, width << stage, stride, convolutions))
                before = layers[-1].after
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(before, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(F.relu(self.norm(self.first(x))))
        return self.last(h.mean((2, 3)))


class Transformer(nn.Module):
    """One block of attention and a perceptron, both beside identities."""

    def __init__(self, features: int = 12, heads: int = 3, hidden: int = 10) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, features)
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        B, T, D = h.shape
        q, k, v = (
            part.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        h = h + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(h.mean(1))


class Mixed(nn.Module):
    """Depthwise and grouped convolutions in one dimension, a gate, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.grouped = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.gate = nn.Conv1d(4, 6, 1)
        self.hidden = nn.Linear(10, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.depthwise(x))
        g = F.elu(self.norm(self.grouped(h))) * torch.sigmoid(self.gate(x))
        both = torch.cat([g.mean(2), F.max_pool1d(h, 8).flatten(1)], 1)
        return self.last(F.leaky_relu(self.hidden(both)))


class Unknown(nn.Module):
    """A cumulative sum over features, which the planner has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cumsum(torch.relu(self.first(x)), 1))


INPUTS = {
    "residual": (2, 6, 6),
    "bottleneck": (2, 6, 6),
    "transformer": (4, 5),
    "mixed": (4, 8),
    "unknown": (5,),
}


def network(kind: str, seed: int = 0) -> nn.Module:
    """A network in float64 and eval mode, with norms that are not the identity."""
    torch.manual_seed(seed)
    made = {
        "residual": Residual,
        "bottleneck": lambda: Residual(3, blocks=1),
        "transformer": Transformer,
        "mixed": Mixed,
        "unknown": Unknown,
    }[kind]()
    for module in made.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            randomize(module)
    return made.double().eval()


@torch.no_grad()
def randomize(norm: nn.Module) -> None:
    """Gives a batch norm statistics and weights of its own."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_()


def inputs(kind: str, rows: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *INPUTS[kind], generator=generator, dtype=torch.float64)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def between(start: dict[str, Tensor], stop: dict[str, Tensor], t: float) -> dict[str, Tensor]:
    """The state at t of the segment."""
    return {
        key: (1 - t) * value + t * stop[key] if value.is_floating_point() else value
        for key, value in start.items()
    }
