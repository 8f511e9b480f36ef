"""Computes what a chain does to its inputs before the first layer: fixed sums, products, norms.

They belong to no layer. A path does not move them, so that all of its networks read one and the
same h_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeconn.capture.graph import Entry, In, Node
from modeconn.connection.captured.bounds import BOUNDS, NoBound
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

_SUMS = ("add", "sub")
# Roundings of a step, in units of the size of what it computes: a norm's take the most.
_ROUNDINGS = 16


@dataclass(frozen=True)
class FixedInputs:
    """Steps before the first layer, in order, each of the value before it alone.

    Attributes:
        nodes: flattening, sums and products with numbers or tensors, batch norms in eval mode.
        constants: tensors that are not in the state dict.
    """

    nodes: tuple[Node, ...] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """State-dict keys of the parameters and buffers that they read."""
        entries: dict[str, None] = {}
        for node in self.nodes:
            entries |= dict.fromkeys(node.entries)
        return tuple(name for name in entries if name not in self.constants)

    @property
    def moves(self) -> bool:
        """Whether numbers are changed, and not only put elsewhere."""
        return any(node.op != "flatten" for node in self.nodes)

    def apply(self, x: Tensor, state: State) -> Tensor:
        """Returns h_0 of raw inputs."""
        for node in self.nodes:
            x = self._run(node, x, state)
        return x

    def largest(self, start: State, stop: State, inputs: Tensor) -> Tensor:
        """Bounds the magnitudes of h_0 on the segment between two states.

        Args:
            inputs: the largest magnitude of each input, [1, …], float64.

        Returns:
            infinity where no bound is known.
        """
        value = inputs.abs()
        try:
            for node in self.nodes:
                value = self._bound(node, value, start, stop)
        except NoBound:
            return torch.full_like(inputs, torch.inf)
        return value

    def error(self, x: Tensor, state: State) -> Tensor:
        """Bounds how far rounding moves h_0, to first order, in unit roundoffs.

        A step's bound is affine in its input's: the slope takes errors on.
        """
        error = x.abs()  # an input that is narrowed
        for node in self.nodes:
            if node.op == "flatten":
                x, error = self._run(node, x, state), self._run(node, error, state)
                continue
            passed, none, own = (
                self._bound(node, value.double(), state, state)
                for value in (error, torch.zeros_like(error), x.abs())
            )
            x = self._run(node, x, state)
            error = ((passed - none).clamp(min=0) + _ROUNDINGS * own).to(x)
        return error

    def check_same(self, ends: Mapping[str, State]) -> None:
        """Raises unless all networks have the same."""
        first, *others = ends
        for name in others:
            for key in self.keys:
                if not torch.equal(ends[first][key], ends[name][key]):
                    raise ModeconnError(
                        f"{key} comes before the first layer and differs between {first} and "
                        f"{name}: all subnetworks on the input read the same inputs; fold it into "
                        "the weights of the first layer"
                    )

    def _run(self, node: Node, x: Tensor, state: State) -> Tensor:
        entries = [self._tensor(name, state).to(x) for name in node.entries]
        found: Tensor = node.run([x], entries, len(x))
        return found

    def _bound(self, node: Node, value: Tensor, start: State, stop: State) -> Tensor:
        ends = []
        for name in node.entries:
            pair = self._tensor(name, start), self._tensor(name, stop)
            ends.append((pair[0].double(), pair[1].double()))
        return BOUNDS[node.op](node, [value], ends)

    def _tensor(self, name: str, state: State) -> Tensor:
        return self.constants[name] if name in self.constants else state[name]


def is_fixed_step(node: Node) -> bool:
    """Whether a node may come before the first layer: it keeps the order of numbers, affine."""
    if node.op == "batch_norm":
        leaves = (node["mean"], node["var"])
        return all(isinstance(leaf, Entry) for leaf in leaves)
    if node.op not in (*_SUMS, "mul", "div") or len(node.inputs) != 1:
        return False
    first, second = node["self"], node["other"]
    if node.op == "div":
        plain = node.arguments.get("rounding_mode") is None
        return plain and first == In(0) and not isinstance(second, In)
    return bool((first == In(0)) != (second == In(0)))
