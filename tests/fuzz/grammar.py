"""Random cases: a network, a path through it, data, and what is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import modeconn as mc
from fuzz import layers
from fuzz.draw import Draw, chance
from fuzz.layers import ACTIVATIONS, Apply
from fuzz.losses import draw_loss
from modeconn.capture import optimisations

CONSTANTS = ("buffer", "not saved", "whole numbers", "attribute", "literal", "arange")
PATHS = ("line", "chain", "bezier", "plane", "random plane", "mixture")


@dataclass
class Case:
    """One evaluation.

    Attributes:
        network: the user's model; its weights are the first control point.
        path: through networks of that kind.
        points: t values.
        inputs, targets: the data.
        loss: a built-in loss, or a callable (outputs, targets) → losses [N].
        options: further arguments of `evaluate`.
        mixes: whether a row's output depends on other rows, so that batches matter.
        without: optimisations that are switched off.
    """

    network: nn.Module
    path: Any
    points: Any
    inputs: Tensor
    targets: Tensor
    loss: Any
    options: dict[str, Any] = field(default_factory=dict)
    mixes: bool = False
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.network}\n{self.path!r}\npoints {self.points}\n"
            f"inputs {list(self.inputs.shape)} {self.inputs.dtype}, "
            f"targets {list(self.targets.shape)}, "
            f"loss {self.loss}, {self.options}, without {', '.join(self.without) or 'nothing'}"
        )


class Builder:
    """Draws pieces, and follows the shape of the value.

    It is [features], [channels, H, W] or [tokens, width].
    """

    def __init__(self, draw: Draw, shape: tuple[int, ...]) -> None:
        self.draw, self.shape = draw, shape
        self.mixes = False

    def pieces(self, count: int, keep: bool = False) -> list[nn.Module]:
        """Some pieces; with `keep`, their value has the shape that it began with."""
        before = self.shape
        made = [self._piece(keep) for _ in range(count)]
        if keep and self.shape != before:
            raise AssertionError(f"{made} lead from {before} to {self.shape}")
        return made

    def head(self, classes: int) -> list[nn.Module]:
        """Pieces that end in [classes]."""
        made: list[nn.Module] = []
        if len(self.shape) == 3:
            pool = self.draw.pick(["flatten", "mean", "adaptive", "amax"])
            made.append(_to_rows(pool))
            channels, height, width = self.shape
            self.shape = (channels * height * width,) if pool == "flatten" else (channels,)
        elif len(self.shape) == 2:
            how = self.draw.pick(["mean", "first", "last", "flatten"])
            made.append(_of_tokens(how))
            self.shape = (self.shape[0] * self.shape[1],) if how == "flatten" else self.shape[1:]
        if chance(self.draw, 30):
            made += self.pieces(1)
        made.append(nn.Linear(self.shape[0], classes, bias=not chance(self.draw, 15)))
        if chance(self.draw, 8):
            made.append(nn.LogSoftmax(1))
        if chance(self.draw, 8):
            made.append(layers.Constant(self.draw.pick(CONSTANTS), classes, "mul"))
        return made

    # -- one piece ---------------------------------------------------------------------------------

    def _piece(self, keep: bool) -> nn.Module:
        common = [self._activation, self._activation, self._norm, self._constant]
        rare = [self._in_place, self._odd, self._mixing]
        by_rank: dict[int, list[Callable[[bool], nn.Module]]] = {
            1: [self._linear, self._linear, self._linear, self._tied, self._part],
            2: [self._linear, self._attention],
            3: [self._convolution, self._convolution, self._pooling, self._part],
        }
        nested = [self._residual, self._closed]
        options = [*by_rank[len(self.shape)], *common, *nested]
        if chance(self.draw, 12):
            options = rare
        return self.draw.pick(options)(keep)

    def _activation(self, keep: bool) -> nn.Module:
        name = self.draw.pick(list(ACTIVATIONS))
        if chance(self.draw, 10):
            return nn.PReLU(1)
        return Apply(name, ACTIVATIONS[name])

    def _linear(self, keep: bool) -> nn.Module:
        width = self.shape[-1] if keep else self.draw.pick([3, 1, 5, 8, 17])
        made = nn.Linear(self.shape[-1], width, bias=not chance(self.draw, 20))
        self.shape = (*self.shape[:-1], width)
        return made

    def _tied(self, keep: bool) -> nn.Module:
        return layers.Tied(self.shape[0], self.draw.pick([3, 6]))

    def _part(self, keep: bool) -> nn.Module:
        """Some features, others' order, or a part of the pixels."""
        size = self.shape[0]
        kind = self.draw.pick(
            ["reversed", "rolled"]
            if keep or size < 2
            else ["half", "every other", "reversed", "rolled", "split"]
        )
        if kind == "half":
            self.shape = (size // 2, *self.shape[1:])
            return Apply(kind, lambda x: x[:, : size // 2])
        if kind == "every other":
            self.shape = ((size + 1) // 2, *self.shape[1:])
            return Apply(kind, lambda x: x[:, ::2])
        if kind == "split":
            self.shape = (size // 2, *self.shape[1:])
            return Apply(
                kind,
                lambda x: (
                    x[:, : size // 2 * 2].chunk(2, 1)[0] * 0.5
                    + x[:, : size // 2 * 2].chunk(2, 1)[1]
                ),
            )
        return Apply(kind, (lambda x: x.flip(1)) if kind == "reversed" else lambda x: x.roll(1, 1))

    def _attention(self, keep: bool) -> nn.Module:
        width = self.shape[1]
        heads = self.draw.pick([h for h in (1, 2, 4) if width % h == 0])
        return layers.Attention(width, heads, chance(self.draw, 40), chance(self.draw, 50))

    def _convolution(self, keep: bool) -> nn.Module:
        channels, height, width = self.shape
        kernel = self.draw.pick(
            [k for k in (3, 1, 2, 5) if k <= min(height, width) and (k % 2 or not keep)]
        )
        groups = self.draw.pick([1, 1, 1, *(g for g in (2, channels) if channels % g == 0)])
        out = channels if keep else groups * self.draw.pick([2, 1, 3])
        stride = 1 if keep else self.draw.pick([1, 1, 2])
        padding = kernel // 2 if keep or chance(self.draw, 60) else 0
        dilation = (
            2
            if not keep and kernel == 3 and min(height, width) >= 5 and chance(self.draw, 15)
            else 1
        )
        bias = not chance(self.draw, 25)
        made = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias)
        self.shape = (out, *(_size(s, kernel, stride, padding, dilation) for s in (height, width)))
        return made

    def _pooling(self, keep: bool) -> nn.Module:
        channels, height, width = self.shape
        kind = self.draw.pick([nn.MaxPool2d, nn.AvgPool2d])
        if keep or min(height, width) < 2:
            return kind(3, stride=1, padding=1)
        ceil = chance(self.draw, 25)
        made = kind(2, stride=2, ceil_mode=ceil)
        self.shape = (channels, *((s + ceil) // 2 for s in (height, width)))
        return made

    def _norm(self, keep: bool) -> nn.Module:
        if len(self.shape) == 3:
            channels = self.shape[0]
            groups = self.draw.pick([g for g in (1, 2, channels) if channels % g == 0])
            return (
                nn.GroupNorm(groups, channels)
                if chance(self.draw, 40)
                else nn.BatchNorm2d(channels)
            )
        width = self.shape[-1]
        if len(self.shape) == 2:
            return nn.LayerNorm(width) if chance(self.draw, 80) else nn.RMSNorm(width, eps=1e-3)
        return nn.BatchNorm1d(width) if chance(self.draw, 60) else nn.LayerNorm(width)

    def _constant(self, keep: bool) -> nn.Module:
        width = self.shape[0] if len(self.shape) != 2 else self.shape[1]
        return layers.Constant(self.draw.pick(CONSTANTS), width, self.draw.pick(["mul", "add"]))

    def _residual(self, keep: bool) -> nn.Module:
        kinds = (
            ["add", "gate", "sub"]
            if keep or len(self.shape) == 2
            else ["add", "gate", "sub", "cat"]
        )
        kind = self.draw.pick(kinds)
        made = layers.Residual(nn.Sequential(*self.pieces(self.draw.whole(1, 2), keep=True)), kind)
        if kind == "cat":
            self.shape = (2 * self.shape[0], *self.shape[1:])
        return made

    def _closed(self, keep: bool) -> nn.Module:
        inner = nn.Sequential(*self.pieces(1, keep=True))
        return self.draw.pick([layers.Twice, layers.Hooked, layers.Branch])(inner)

    def _in_place(self, keep: bool) -> nn.Module:
        return layers.InPlace(self.draw.pick(["relu", "halve", "first"]))

    def _odd(self, keep: bool) -> nn.Module:
        """Operations that the planner has no rule for, and modes."""
        kind = self.draw.pick(
            ["cumsum", "sort", "dropout", "mode", "softmax", "counts", "norm", "where", "double"]
        )
        if kind in ("dropout", "mode", "counts"):
            return {"dropout": nn.Dropout(0.5), "mode": layers.ByMode(), "counts": layers.Counts()}[
                kind
            ]
        return Apply(
            kind,
            {
                "cumsum": lambda x: x.cumsum(1) * 0.3,
                "sort": lambda x: x.sort(1).values,
                "softmax": lambda x: x.softmax(1),
                "norm": lambda x: x / (1 + x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))),
                "where": lambda x: torch.where(x > 0.1, x, 0.1 * x),
                "double": lambda x: (x.double() * 0.5).to(x.dtype),
            }[kind],
        )

    def _mixing(self, keep: bool) -> nn.Module:
        self.mixes = True
        return Apply("less the batch's mean", lambda x: x - x.mean(0, keepdim=True))


def _size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _to_rows(pool: str) -> nn.Module:
    if pool == "adaptive":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "flatten": lambda x: x.flatten(1),
        "mean": lambda x: x.mean((2, 3)),
        "amax": lambda x: x.amax((2, 3)),
    }
    return Apply(pool, functions[pool])


def _of_tokens(how: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.mean(1),
        "first": lambda x: x[:, 0],
        "last": lambda x: x[:, -1],
        "flatten": lambda x: x.reshape(len(x), -1),
    }
    return Apply(how, functions[how])


# -- a whole case ----------------------------------------------------------------------------------


def draw_case(draw: Draw) -> Case:
    """Draw a case; everything follows from the choices."""
    seed = draw.whole(0, 2**20)
    torch.manual_seed(seed)
    rows, classes = draw.pick([5, 2, 3, 8, 33]), draw.pick([3, 2, 6])
    inputs, builder, first = _inputs(draw, rows)
    pieces = [*first, *builder.pieces(draw.whole(0, 4)), *builder.head(classes)]
    network = layers.Network(pieces)
    _fill(network, seed)
    network.train(chance(draw, 30))
    path, points = _path(draw, network, seed)
    loss, targets = draw_loss(draw, rows, classes, seed)
    options: dict[str, Any] = {}
    if chance(draw, 15):
        options["buffers"] = "start"
    if chance(draw, 30) and not builder.mixes:
        options["batch_size"] = draw.pick([1, 2, 4])
    # Drawn last: what was drawn before keeps its number.
    without = _without(draw) if chance(draw, 60) else ()
    return Case(network, path, points, inputs, targets, loss, options, builder.mixes, without)


def _without(draw: Draw) -> tuple[str, ...]:
    """Optimisations to switch off: any of them, so that each is also tested without the others."""
    return tuple(name for name in optimisations.NAMES if chance(draw, 30))


def _inputs(draw: Draw, rows: int) -> tuple[Tensor, Builder, list[nn.Module]]:
    kind = draw.pick(["rows", "rows", "images", "tokens", "words"])
    if kind == "rows":
        width = draw.pick([4, 1, 7])
        return torch.randn(rows, width), Builder(draw, (width,)), []
    if kind == "images":
        channels, size = draw.pick([2, 1, 3]), draw.pick([6, 4, 7])
        return torch.randn(rows, channels, size, size), Builder(draw, (channels, size, size)), []
    length, width = draw.pick([3, 1, 5]), draw.pick([4, 8])
    if kind == "tokens":
        return torch.randn(rows, length, width), Builder(draw, (length, width)), []
    return (
        torch.randint(0, 7, (rows, length)),
        Builder(draw, (length, width)),
        [nn.Embedding(7, width)],
    )


def _fill(network: nn.Module, seed: int) -> None:
    """Draw every parameter and buffer that is saved; statistics stay possible ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point() and not name.endswith(".value"):
            value.normal_(0.0, 0.5, generator=generator)


def _changed(draw: Draw, network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Another network: all of it, or some of its tensors, or some of its units dead."""
    other = copy.deepcopy(network)
    _fill(other, seed)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    start = network.state_dict()
    for name, value in state.items():
        if not value.is_floating_point() or name.endswith(("running_var", ".value")):
            continue
        kind = draw.pick(["drawn", "drawn", "equal", "zero", "dead inputs", "dead outputs"])
        if kind == "equal":
            value.copy_(start[name])
        elif kind == "zero":
            value.zero_()
        elif kind == "dead outputs":
            value[::2] = 0
        elif kind == "dead inputs" and value.dim() > 1:
            value[:, ::2] = 0
    _tie(other, state)
    return state


def _tie(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Names that are one tensor in the module have one value."""
    first: dict[int, str] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        if id(value) in first:
            state[name].copy_(state[first[id(value)]])
        first.setdefault(id(value), name)


def _path(draw: Draw, network: nn.Module, seed: int) -> tuple[Any, Any]:
    kind = draw.pick(PATHS)
    count = {"line": 2, "plane": 3, "random plane": 1}.get(kind) or draw.whole(2, 4)
    ends = [{k: v.clone() for k, v in network.state_dict().items()}]
    ends += [_changed(draw, network, seed + 1 + i) for i in range(count - 1)]
    few = draw.whole(1, 4)
    if kind == "random plane":
        path = mc.Plane.random(network, seed=seed, norm=draw.pick(["filter", "layer", None]))
    elif kind == "plane":
        path = mc.Plane.through(*ends)
    else:
        path = {
            "line": mc.Line,
            "chain": lambda *p: mc.PolyChain(p),
            "bezier": lambda *p: mc.Bezier(p),
            "mixture": lambda *p: mc.Mixture(p),
        }[kind](*ends)
    values = [0.0, 1.0, 0.5, 0.3, 0.75, 1.4, -0.5]
    if path.dim == 1:
        inside = values if kind in ("line", "bezier") else values[:5]
        return path, np.array([draw.pick(inside) for _ in range(few)])
    return path, np.array(
        [[draw.pick([*values, 2.0]) for _ in range(path.dim)] for _ in range(few)]
    )
