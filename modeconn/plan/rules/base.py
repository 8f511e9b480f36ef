"""Rule interface: how an operation propagates liveness and linearity.

A rule answers four questions about a node:

- *Units.* If only some units of the value are requested, which units of the inputs does that take,
  and how are the node's weights, and the sizes among its arguments, cut down to match? Units that
  nobody requests are dead.
- *Linearity in the inputs.* With fixed entries, is the value linear in them ("homogeneous"), linear
  up to an offset ("affine"), or neither ("")?
- *Linearity in the entries.* With fixed inputs, in which entries taken together is the value
  homogeneous and linear?
- *Symmetry.* Which axes of its inputs, entries and value have to be permuted alike, for the value
  to be permuted and nothing else (plan/rules/axes.py)?

`UNKNOWN` is the conservative default. Here and in plans, *entries* are a node's parameters and
buffers, by their places among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeconn.capture.graph import Entry, In, Node, Size
from modeconn.errors import Unsupported
from modeconn.plan.rules.axes import ROWS, Atom, Axis, Part, freeze, resolve
from modeconn.plan.units import ALL, Shape, Units
from modeconn.plan.weights import Cut

# (entry, axis, the part to look at) → which indices along the axis have a non-zero weight at any
# active control point.
Support = Callable[[int, int, Cut], np.ndarray]
# (node, inputs that are not fixed) → how the value depends on those, with everything else fixed.
Linearity = Callable[[Node, frozenset[int]], str]


# A node and the axes of what it takes → the axes of its value.
Ties = Callable[[Node, "Axes"], Any]


@dataclass(frozen=True)
class Axes:
    """The axes of a node's inputs and entries, to be tied.

    Attributes:
        inputs, entries: the axes of each; of an operation that returns several values, a list of
            their axes.
        mixed: pairs of axes: indices of the first are summed up, or compared, for each index of the
            second, so that no permutation of the second may depend on the first.
    """

    inputs: Sequence[Any]
    entries: Sequence[list[Axis]]
    mixed: list[tuple[Axis, Axis]]

    def of(self, leaf: Any) -> list[Axis]:
        """The axes of an argument that is a tensor.

        Raises:
            Unsupported: it is none.
        """
        if not isinstance(leaf, In | Entry):
            raise Unsupported("a number in the place of a tensor")
        axes = (self.inputs if isinstance(leaf, In) else self.entries)[leaf.index]
        return list(axes)

    def operands(self, node: Node) -> list[list[Axis]]:
        """The axes of all tensors among a node's own arguments."""
        return [self.of(leaf) for leaf in node.arguments.values() if isinstance(leaf, In | Entry)]

    def mix(self, axis: Axis, beside: Sequence[Axis]) -> None:
        """Note that indices along an axis are summed up for each index of others."""
        if isinstance(axis, Part) and axis is axis.of.outer:
            resolve(axis)  # what is taken together is permuted alike
        self.mixed.extend((axis, other) for other in beside)


def own_axes(node: Node, reason: str = "") -> list[Axis]:
    """Return new axes for a node's value, frozen for a reason, those of rows in any case."""
    return [
        Atom(size.of(ROWS), reason or "rows") if isinstance(size, Size) else Atom(size, reason)
        for size in node.shape
    ]


def freeze_axes(node: Node, axes: Sequence[Axis], why: str) -> None:
    """Freeze axes, naming the operation and why."""
    for axis in axes:
        freeze(axis, f"{node.op}: {why}")


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
        ties: ties the axes of inputs, entries and value; None where nothing is known of them.

    Attributes:
        takes: whether the operation is itself one that takes a part of its input.
    """

    takes = False

    def __init__(
        self,
        linear: str | Linearity = "",
        entries: Callable[[Node], frozenset[int]] | None = None,
        ties: Ties | None = None,
    ) -> None:
        self._linear, self._entries, self._ties = linear, entries, ties

    def linearity(self, node: Node, moving: frozenset[int]) -> str:
        """Returns how the value depends on some of the inputs, with all others fixed."""
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

    def tie(self, node: Node, axes: Axes) -> Any:
        """Ties the axes of inputs and entries, and returns those of the value.

        Permuting tied axes alike permutes the value along its axes, and changes nothing else of it.

        Raises:
            Unsupported: nothing is known of the operation, or of this way to call it.
        """
        if self._ties is None:
            raise Unsupported("no rule of its axes")
        return self._ties(node, axes)


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
