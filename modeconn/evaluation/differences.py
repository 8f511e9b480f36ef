"""Says how two networks differ: findings with a verdict each, and the distance of every layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeconn.parameters.comparison import same_memory
from modeconn.parameters.state import State


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Attributes:
        name: of what: "architecture", "config", "tokenizer", "names", "dtypes", ….
        passed: whether a path is what it seems as far as this goes.
        text: what was found, in plain words.
    """

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class LayerDistance:
    """Measures how far two networks are apart in one layer.

    Attributes:
        layer: its name, which its tensors' names begin with.
        distance: the Euclidean norm of the difference.
        relative: that, divided by the norm of a's layer; inf where that is 0.
        equal: of its tensors, how many are equal bit for bit; tensors: how many it has.
    """

    layer: str
    distance: float
    relative: float
    equal: int
    tensors: int


@dataclass(frozen=True)
class Comparison:
    """Holds what `check` found; print it, or ask for `.passed`.

    Attributes:
        findings: in the order in which they were looked at.
        layers: of both networks, in a's order; empty where their names or shapes differ.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerDistance, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was found that makes a path something else than it seems."""
        return all(each.passed for each in self.findings)

    def __str__(self) -> str:
        width = max(len(each.name) for each in self.findings)
        lines = [f"{'✓' if f.passed else '✗'} {f.name:<{width}}  {f.text}" for f in self.findings]
        wide = max((len(each.layer) for each in self.layers), default=0)
        if self.layers:
            lines += ["", f"{'layer':<{wide}}  distance  relative  equal tensors"]
        for each in self.layers:
            equal = f"{each.equal} of {each.tensors}"
            lines.append(
                f"{each.layer:<{wide}}  {each.distance:8.3g}  {each.relative:8.3g}  {equal:>13}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; numbers that are not finite are None."""
        return {
            "passed": self.passed,
            "findings": [vars(each) for each in self.findings],
            "layers": [
                {**vars(each), "relative": each.relative if each.relative < torch.inf else None}
                for each in self.layers
            ],
        }


def distances_of(one: State, other: State) -> tuple[LayerDistance, ...]:
    """Return how far two states of equal names and shapes are apart in each layer."""
    sums: dict[str, list[float]] = {}
    for key, a in one.items():
        b = other[key]
        row = sums.setdefault(_layer_of(key), [0.0, 0.0, 0.0, 0.0])
        equal = same_memory(a, b) or (a.dtype == b.dtype and torch.equal(a, b))
        row[2] += equal
        row[3] += 1
        if a.is_floating_point():
            row[0] += 0.0 if equal else _square(wide(a) - wide(b))
            row[1] += _square(wide(a))
    return tuple(
        LayerDistance(
            layer,
            distance**0.5,
            0.0 if not distance else ((distance / size) ** 0.5 if size else torch.inf),
            int(equal),
            int(tensors),
        )
        for layer, (distance, size, equal, tensors) in sums.items()
    )


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision or less in float32, and any other as it is."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def _layer_of(name: str) -> str:
    """The part of a name up to the number of a block, or else without that of the tensor."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.rpartition(".")[0] or name
