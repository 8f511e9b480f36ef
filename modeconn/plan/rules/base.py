"""Rule interface: how an operation propagates liveness and linearity.

A rule answers three questions about a node:

- *Units.* If only some units of the value are requested, which units of the inputs does that take,
  and how are the node's weights, and the sizes among its arguments, cut down to match? Units that
  nobody requests are dead.
- *Linearity in the inputs.* With fixed entries, is the value linear in them ("homogeneous"), linear
  up to an offset ("affine"), or neither ("")?
- *Linearity in the entries.* With fixed inputs, in which entries taken together is the value
  homogeneous and linear?

`UNKNOWN` is the conservative default. Here and in plans, *entries* are a node's parameters and
buffers, by their places among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeconn.capture.graph import Entry, Node
from modeconn.plan.units import ALL, Shape, Units
from modeconn.plan.weights import Cut

# (entry, axis, the part to look at) → which indices along the axis have a non-zero weight at any
# active control point.
Support = Callable[[int, int, Cut], np.ndarray]
# (node, inputs that are not fixed) → how the value depends on those, with everything else fixed.
Linearity = Callable[[Node, frozenset[int]], str]


@dataclass(frozen=True)
class Shapes:
    """Shapes of a node's inputs and of its entries, whole."""

    inputs: Sequence[Shape]
    entries: Sequence[Shape]


@dataclass(frozen=True)
class Fit:
    """A node as it is called on parts of its inputs.

    Attributes:
        units: of its value.
        cuts: for each entry how it is cut down.
        arguments: those of the node's arguments that change with the units, by name.
    """

    units: Units
    cuts: Sequence[Cut] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Mismatch(Exception):
    """Inputs have units that an operation cannot take, or cannot take together."""


class Rule:
    """The rule of an unknown operation: non-linear, and it mixes all units.

    That is always right, and never faster.

    Args:
        linear: how the value depends on the inputs: "homogeneous", "affine", "" or a function.
        entries: the entries in which the value is jointly homogeneous and linear; None for none.

    Attributes:
        takes: whether the operation is itself one that takes a part of its input.
    """

    takes = False

    def __init__(
        self, linear: str | Linearity = "", entries: Callable[[Node], frozenset[int]] | None = None
    ) -> None:
        self._linear, self._entries = linear, entries

    def linearity(self, node: Node, moving: frozenset[int]) -> str:
        """How the value depends on some of the inputs, with the others and the entries fixed."""
        if not isinstance(self._linear, str):
            return self._linear(node, moving)
        return "affine" if self._linear and len(moving) < len(node.inputs) else self._linear

    def linear_entries(self, node: Node) -> frozenset[int]:
        """Indices of the entries in which the value is jointly homogeneous and linear."""
        return self._entries(node) if self._entries else frozenset()

    def requests(
        self, node: Node, requested: Units, shapes: Shapes, support: Support
    ) -> list[Units]:
        """Returns the units of each input that the requested ones take.

        The planner may give the inputs with more units, never with fewer.
        """
        return [ALL] * len(node.inputs)

    def fit(self, node: Node, requested: Units, have: Sequence[Units], shapes: Shapes) -> Fit:
        """Fits the node to the units that its inputs have, for at least the requested ones.

        Raises:
            Mismatch: it cannot be called on these units; on exactly those of `requests` it can.
        """
        return Fit(ALL, [()] * len(node.entries))


UNKNOWN = Rule()


def entries_of(*names: str) -> Callable[[Node], frozenset[int]]:
    """The entries that some arguments are, by the arguments' names."""

    def entries(node: Node) -> frozenset[int]:
        leaves = [node[name] for name in names]
        return frozenset(leaf.index for leaf in leaves if isinstance(leaf, Entry))

    return entries


def resized(sizes: Sequence[Any], units: Units) -> list[Any]:
    """The sizes among an operation's arguments for some units of its value."""
    return [len(units.along[a]) if a in units.along else size for a, size in enumerate(sizes)]


def cut_of(units: Units, rank: int) -> Cut:
    """A tensor's cut for some units."""
    return tuple(units.get(axis) for axis in range(rank)) if units else ()
