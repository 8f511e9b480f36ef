"""Networks that the drop-ins are compared on, with the other packages and with plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def small(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def conv(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def norm(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a bias of zeros raises ZeroDivisionError in the package
                parameter.normal_()
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


class Tied(nn.Module):
    """An embedding that is the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 7)
        self.last = nn.Linear(7, 5, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.embedding(x)).mean(1))


def tied(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


class Agent:
    """No module; two of them inside, of which one moves."""

    def __init__(self, seed: int) -> None:
        self.net, self.head = small(seed), nn.Linear(4, 3)

    def act(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.net(x)))


def general(library: Any, seed: int) -> Any:
    agent = Agent(seed)
    return library.GeneralModelWrapper(agent, [agent.net], lambda model, x: model.act(x))


def _images() -> Tensor:
    return torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def _rows() -> Tensor:
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(1))


def _tokens() -> Tensor:
    return torch.randint(5, (30, 4), generator=torch.Generator().manual_seed(1))


# By name: (library, seed) → a model as the library takes it; the inputs.
KINDS: dict[str, tuple[Callable[[Any, int], Any], Callable[[], Tensor]]] = {
    "mlp": (lambda library, seed: small(seed), _rows),
    "conv": (lambda library, seed: conv(seed), _images),
    "norm": (lambda library, seed: norm(seed), _images),
    "tied": (lambda library, seed: tied(seed), _tokens),
    "general": (general, _rows),
}
# By name: (library, model of a seed, metric, steps, normalization) → what it returns.
SCANS: dict[str, Callable[..., Any]] = {
    "point": lambda lib, make, metric, steps, how: lib.point(make(0), metric),
    "line": lambda lib, make, metric, steps, how: lib.linear_interpolation(
        make(0), make(1), metric, steps
    ),
    "plane": lambda lib, make, metric, steps, how: lib.planar_interpolation(
        make(0), make(1), make(2), metric, steps
    ),
    "random line": lambda lib, make, metric, steps, how: lib.random_line(
        make(0), metric, 0.5, steps, how
    ),
    "random plane": lambda lib, make, metric, steps, how: lib.random_plane(
        make(0), metric, 1, steps, how
    ),
}
