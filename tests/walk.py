"""A hand-made path with every kind of segment, from a network's chain, to test certificates on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeconn.connection.layer_chain import AffineLayer, LayerChain
from modeconn.parameters.paths import PolyChain

KINDS = ("rewrite", "swing", "rewrite", "shift", "rewrite", "swing")


@dataclass
class Walk:
    """A model, its chain, the breakpoints and some data for them."""

    model: nn.Module
    chain: LayerChain
    points: list[dict[str, Tensor]]
    x: Tensor
    y: Tensor

    @property
    def path(self) -> PolyChain:
        return PolyChain(self.points)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y


def conv_net(channels: int = 6) -> nn.Sequential:
    """Convolutions with batch norm and pooling, the flattening, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels + 1, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels + 1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * (channels + 1), 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def walk(
    model: nn.Module,
    row: tuple[int, ...],
    seed: int = 0,
    samples: int = 60,
    dtype: torch.dtype = torch.float32,
) -> Walk:
    """Start with half A of every layer; swing to B; A becomes B's twin and takes over, B free."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *row, generator=generator).to(dtype)
    model = model.to(dtype)
    chain = LayerChain.of(model, x[:2])
    y = torch.randint(chain.classes, (samples,), generator=generator)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for layer in chain.layers[:-1]:
        rows(state, layer, torch.arange(layer.units), generator)
    readout(state, chain, generator)
    for layer in chain.layers[1:]:
        a, b, rest = parts(chain, layer.index - 1)
        read = layer.by_unit(state[layer.weight])
        read[:, rest] = 0
        read[parts(chain, layer.index)[0][:, None], b] = 0
    points = [state]

    def step() -> dict[str, Tensor]:
        points.append({key: value.clone() for key, value in points[-1].items()})
        return points[-1]

    state = step()
    for layer in chain.layers[:-1]:
        a, b = parts(chain, layer.index)[:2]
        rows(state, layer, b, generator)
        if layer.index > 1:
            before = parts(chain, layer.index - 1)
            for others in (before[0], before[2]):
                layer.by_unit(state[layer.weight])[b[:, None], others] = 0
    last = chain.layers[-1]
    state = step()
    readout(state, chain, generator)
    for others in parts(chain, chain.length - 1)[::2]:
        last.by_unit(state[last.weight])[:, others] = 0
    state = step()
    for layer in chain.layers[:-1]:
        a, b = parts(chain, layer.index)[:2]
        for key in layer.incoming():
            state[key][a] = state[key][b]
    state = step()
    for layer in chain.layers[1:]:
        a, b = parts(chain, layer.index - 1)[:2]
        read = layer.by_unit(state[layer.weight])
        used = (
            torch.cat(parts(chain, layer.index)[:2])
            if layer is not last
            else torch.arange(layer.units)
        )
        read[used[:, None], a] = read[used[:, None], b]
        read[used[:, None], b] = 0
    state = step()
    for layer in chain.layers[:-1]:
        rows(state, layer, parts(chain, layer.index)[1], generator)
    state = step()
    readout(state, chain, generator)
    return Walk(model, chain, points, x, y)


def parts(chain: LayerChain, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Units A, B and the one that is left of layer p; all outputs are A."""
    units = torch.arange(chain.widths[p])
    half = len(units) // 2 if p < chain.length else len(units)
    return units[:half], units[half : 2 * half], units[2 * half :]


def rows(
    state: dict[str, Tensor], layer: AffineLayer, units: Tensor, generator: torch.Generator
) -> None:
    """Draw new incoming entries for some units."""
    for key in layer.incoming():
        value = state[key]
        drawn = torch.randn(len(units), *value.shape[1:], generator=generator).to(value.dtype)
        if layer.norm is not None and key == layer.norm.var:
            drawn = drawn.abs() + 0.5
        fan_in = max(1, value[0].numel()) if value.dim() > 1 else 4
        state[key][units] = drawn * (2 / fan_in) ** 0.5


def readout(state: dict[str, Tensor], chain: LayerChain, generator: torch.Generator) -> None:
    """Draw a new output layer, of the size that makes errors and losses change along a swing."""
    last = chain.layers[-1]
    rows(state, last, torch.arange(last.units), generator)
    state[last.weight] *= 3
