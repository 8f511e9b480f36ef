"""Networks for each way in which planner and engine are used, and the paths to plan them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.models import build

Inputs = Any


@dataclass(frozen=True)
class Case:
    """A kind of network: how one is made, and rows of its input."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]


class Function(nn.Module):
    """Some layers by name, and a function of them and the input."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._function = forward

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


class Branches(nn.Module):
    """A part that torch.export refuses, since it looks at the data, between two that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(9, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.middle = Function(
            lambda m, x: m.inner(x) if float(x.sum()) > -1e30 else x, inner=self.inner
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class Constants(nn.Module):
    """A scale that is no parameter, a buffer that is not saved, and a tensor made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(9, 12), nn.Linear(12, 5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.into(x)) * self.scale) * torch.tensor(
            [1.0, 2.0, 0.5, 1.0, 1.0]
        )


def rows(width: int, count: int = 7) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(count, width, generator=generator)


def images(channels: int, size: int, count: int = 5) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(count, channels, size, size, generator=generator)


def tokens(vocabulary: int, length: int, count: int = 5) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, vocabulary, (count, length), generator=generator)


def mlp(activation: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(9, 14), activation, nn.Linear(14, 12), activation, nn.Linear(12, 5)
    )


def residual_block(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    inner = m.second(F.relu(m.norm1(m.first(x))))
    x = F.relu(m.norm2(inner) + m.short(x))
    return m.head(x.mean((2, 3)))


def pre_activation(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.first(F.relu(m.norm1(x)))
    return m.head(F.adaptive_avg_pool2d(F.relu(m.norm2(x)), 1).flatten(1))


def dense(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = torch.cat([x, m.first(F.relu(m.norm1(x)))], 1)
    return m.head(F.avg_pool2d(F.relu(m.norm2(x)), 2).flatten(1))


def gated(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
    return m.head((x * gate).mean((2, 3)))


def padded_shortcut(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    return m.head((F.relu(m.first(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))).flatten(1))


def attention(m: Any, x: Tensor) -> Tensor:
    n, length, _ = x.shape
    q, k, v = (y.view(n, length, 2, 4).transpose(1, 2) for y in m.qkv(x).split(8, 2))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 8)
    return m.head(m.norm(x + m.out(mixed))[:, 0])


CASES: dict[str, Case] = {
    **{
        f"mlp_{name}": Case(mlp(activation), rows(9))
        for name, activation in {
            "relu": nn.ReLU(),
            "gelu": nn.GELU(),
            "leaky": nn.LeakyReLU(0.2),
            "elu": nn.ELU(),
            "softplus": nn.Softplus(),
            "hardswish": nn.Hardswish(),
            "mish": nn.Mish(),
            "prelu": nn.PReLU(),
            "log_sigmoid": nn.LogSigmoid(),
        }.items()
    },
    "mlp_layer_norm": Case(
        lambda: nn.Sequential(nn.Linear(9, 12), nn.LayerNorm(12), nn.SiLU(), nn.Linear(12, 5)),
        rows(9),
    ),
    "mlp_batch_norm": Case(
        lambda: nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 5)),
        rows(9),
    ),
    "mlp_log_softmax": Case(
        lambda: nn.Sequential(nn.Linear(9, 12), nn.ReLU6(), nn.Linear(12, 5), nn.LogSoftmax(1)),
        rows(9),
    ),
    "mlp_residual": Case(
        lambda: Function(
            lambda m, x: m.head(F.relu(m.into(x)) + m.again(F.relu(m.into(x)))),
            into=nn.Linear(9, 12),
            again=nn.Linear(12, 12),
            head=nn.Linear(12, 5),
        ),
        rows(9),
    ),
    "mlp_two_outputs": Case(
        lambda: Function(
            lambda m, x: (m.a(torch.relu(m.into(x))), m.b(x)),
            into=nn.Linear(9, 8),
            a=nn.Linear(8, 5),
            b=nn.Linear(9, 2),
        ),
        rows(9),
    ),
    "branches": Case(Branches, rows(9)),
    "constants": Case(Constants, rows(9)),
    "vgg11": Case(lambda: build("vgg11:width=3"), images(3, 32)),
    "vgg11_bn": Case(lambda: build("vgg11_bn:width=3"), images(3, 32)),
    "resnet20": Case(lambda: build("resnet20:width=3"), images(3, 12)),
    "vit": Case(lambda: build("vit:width=12,layers=1,image=16,patch=8"), images(3, 16)),
    "gpt": Case(lambda: build("gpt:vocab=11,context=8,width=12,layers=1,heads=3"), tokens(11, 8)),
    "residual_block": Case(
        lambda: Function(
            residual_block,
            stem=nn.Conv2d(3, 4, 3, padding=1),
            first=nn.Conv2d(4, 6, 3, 2, 1),
            norm1=nn.BatchNorm2d(6),
            second=nn.Conv2d(6, 6, 3, padding=1),
            norm2=nn.BatchNorm2d(6),
            short=nn.Conv2d(4, 6, 1, 2),
            head=nn.Linear(6, 5),
        ),
        images(3, 8),
    ),
    "pre_activation": Case(
        lambda: Function(
            pre_activation,
            stem=nn.Conv2d(3, 4, 3, padding=1),
            norm1=nn.BatchNorm2d(4),
            first=nn.Conv2d(4, 4, 3, padding=1),
            norm2=nn.BatchNorm2d(4),
            head=nn.Linear(4, 5),
        ),
        images(3, 8),
    ),
    "dense": Case(
        lambda: Function(
            dense,
            stem=nn.Conv2d(3, 4, 3, padding=1),
            norm1=nn.BatchNorm2d(4),
            first=nn.Conv2d(4, 2, 3, padding=1),
            norm2=nn.BatchNorm2d(6),
            head=nn.Linear(96, 5),
        ),
        images(3, 8),
    ),
    "gated": Case(
        lambda: Function(
            gated,
            stem=nn.Conv2d(3, 4, 3, padding=1),
            down=nn.Conv2d(4, 2, 1),
            up=nn.Conv2d(2, 4, 1),
            head=nn.Linear(4, 5),
        ),
        images(3, 8),
    ),
    "padded_shortcut": Case(
        lambda: Function(
            padded_shortcut,
            stem=nn.Conv2d(3, 4, 3, padding=1),
            first=nn.Conv2d(4, 6, 3, 2, 1),
            head=nn.Linear(96, 5),
        ),
        images(3, 8),
    ),
    "grouped": Case(
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, dilation=2),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(8, 5),
        ),
        images(4, 8),
    ),
    "transposed": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(36, 5),
        ),
        images(3, 5),
    ),
    "sequences": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(18, 5)
        ),
        lambda generator: torch.randn(5, 3, 8, generator=generator),
    ),
    "attention": Case(
        lambda: Function(
            attention,
            qkv=nn.Linear(8, 24),
            out=nn.Linear(8, 8),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 5),
        ),
        lambda generator: torch.randn(5, 6, 8, generator=generator),
    ),
    "embedding": Case(
        lambda: Function(
            lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(11, 8), head=nn.Linear(8, 5)
        ),
        tokens(11, 6),
    ),
    "lstm": Case(
        lambda: Function(
            lambda m, x: m.head(m.cell(x)[0][:, -1]),
            cell=nn.LSTM(4, 6, batch_first=True),
            head=nn.Linear(6, 5),
        ),
        lambda generator: torch.randn(5, 3, 4, generator=generator),
    ),
}


def networks(case: Case, count: int = 3) -> list[nn.Module]:
    """Networks of one kind, every number of them drawn."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = case.make()
        generator = torch.Generator().manual_seed(seed)
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point():
                value.normal_(0.0, 0.3, generator=generator)
        made.append(network)
    return made


def dead_units(network: nn.Module) -> dict[str, Tensor]:
    """Return the state with zeros in every second column of the last weight and a first unit."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    weights = [
        name for name, value in state.items() if value.is_floating_point() and value.dim() >= 2
    ]
    state[weights[-1]][:, ::2] = 0
    state[weights[0]][:1] = 0
    return state


def paths(made: list[nn.Module]) -> dict[str, mc.Line | mc.PolyChain | mc.Bezier | mc.Plane]:
    """Make a line, a chain on which layers stay and units die, and a curve."""
    a, b, c = (dict(network.state_dict()) for network in made)
    dead = dead_units(made[0])
    last = list(b)[-1]
    return {
        "line": mc.Line(a, b),
        "chain": mc.PolyChain([a, dead, dead | {last: b[last]}, b]),
        "bezier": mc.Bezier([a, c, b]),
    }
