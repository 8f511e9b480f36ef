"""What the planner knows about each operation.

A rule answers three questions about a node:

- *Units.* If only some units (or channels) of the value are wanted, which units of the inputs does that take, and how are
  the node's weights cut down to match? Units that nobody wants are dead.
- *Linearity in the inputs.* With fixed entries, is the value linear in them ("homogeneous"), linear up to an offset
  ("affine"), or neither ("")?
- *Linearity in the entries.* With fixed inputs, in which entries taken together is the value homogeneous and linear?

Operations without a rule are taken to be non-linear in everything and to mix all units, which is always right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modeconn.graph import Dim, Entry, In, Node, Size
from modeconn.plan.contents import Cut


@dataclass(frozen=True, eq=False)
class Units:
    """Some indices along one axis of a value, in rising order."""

    axis: int
    index: np.ndarray

    @property
    def key(self) -> tuple[int, bytes]:
        return self.axis, self.index.tobytes()


# None means all units.
Wanted = Units | None
# Of a value: the batch axis and what follows from it are `Size`.
Shape = tuple[Dim, ...]


def static(dim: Dim) -> int:
    """A size that does not depend on the number of rows, as those along axes with units are."""
    if isinstance(dim, Size):
        raise TypeError(f"the size {dim} depends on the number of rows")
    return dim


def same_units(a: Wanted, b: Wanted) -> bool:
    """Whether two wishes name the same units."""
    return a is b or (a is not None and b is not None and a.key == b.key)


# (entry, axis, the part to look at) → which indices along the axis have a non-zero weight at any active control point.
Support = Callable[[int, int, Cut], np.ndarray]


class Rule:
    """The rule of an operation of which nothing is known."""

    def __init__(self, linear: str = "", entries: Callable[[Node], frozenset[int]] | None = None) -> None:
        self.linear = linear
        self._entries = entries

    def linearity(self, node: Node) -> str:
        """How the value depends on the inputs, with fixed entries."""
        return self.linear

    def linear_entries(self, node: Node) -> frozenset[int]:
        """Indices of the entries in which the value is jointly homogeneous and linear."""
        return self._entries(node) if self._entries else frozenset()

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        """The units of each input that the wanted units take. Producers may deliver more, never less."""
        return [None] * len(node.inputs)

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        """How each entry is cut down, given the units that the inputs have; and the units that the value then has.

        Raises:
            Mismatch: the inputs' units do not fit each other; ask for all of them.
        """
        return [()] * len(node.entries), None


class Mismatch(Exception):
    """The inputs of a joint operation came with different units."""


class Elementwise(Rule):
    """Works number by number on inputs of one shape, so units pass through unchanged."""

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        alike = all(list(map(str, shape)) == list(map(str, node.shape)) for shape in shapes)
        return [wanted if alike else None] * len(node.inputs)

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        if not all(same_units(units, have[0]) for units in have):
            raise Mismatch
        return [()] * len(node.entries), have[0]


class ByChannel(Rule):
    """Works channel by channel (axis 1): pooling, batch norm with given statistics. Entries are vectors over channels."""

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        return [wanted if wanted is not None and wanted.axis == 1 else None]

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        (units,) = have
        return [(units.index if units else None,)] * len(node.entries), units


class Product(Rule):
    """Linear layers and ungrouped convolutions, transposed or not: a weight and maybe a bias [out].

    Args:
        outputs, inputs: the weight's axes: [out, in, …] where they are 0 and 1.
        bias_first: whether the bias comes before the weight among the entries.
    """

    def __init__(self, outputs: int = 0, inputs: int = 1, bias_first: bool = False) -> None:
        super().__init__("affine", lambda node: frozenset(range(len(node.entries))))
        self._outputs, self._inputs, self._weight = outputs, inputs, int(bias_first)

    def linearity(self, node: Node) -> str:
        return "affine" if len(node.entries) > 1 else "homogeneous"

    @staticmethod
    def _axis(node: Node) -> int:
        return len(node.shape) - 1 if node.op == "linear" else 1

    @staticmethod
    def _grouped(node: Node) -> bool:
        return node.op.startswith("conv") and len(node.args) > 6 and node.args[6] != 1

    def _rows(self, node: Node, wanted: Wanted) -> np.ndarray | None:
        return wanted.index if wanted and wanted.axis == self._axis(node) and not self._grouped(node) else None

    def _cut(self, rows: np.ndarray | None, columns: np.ndarray | None) -> Cut:
        return (rows, columns) if self._outputs == 0 else (columns, rows)

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        if self._grouped(node):
            return [None]
        live = support(self._weight, self._inputs, self._cut(self._rows(node, wanted), None))
        if live.all():
            return [None]
        # A layer without any live input still needs an input for its shape: keep one.
        return [Units(self._axis(node), np.flatnonzero(live) if live.any() else np.zeros(1, np.int64))]

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        rows = self._rows(node, wanted)
        columns = have[0].index if have[0] else None
        cuts: list[Cut] = [(rows,)] * len(node.entries)
        cuts[self._weight] = self._cut(rows, columns)
        return cuts, Units(self._axis(node), rows) if rows is not None else None


class Flatten(Rule):
    """[N, C, …] → [N, C·s]: channel c owns the block of features [c·s, (c+1)·s)."""

    @staticmethod
    def _block(shape: Shape) -> int:
        return math.prod(map(static, shape[2:]))

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        return [Units(1, np.unique(wanted.index // self._block(shapes[0]))) if wanted else None]

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        block = self._block(shapes[0])
        (channels,) = have
        return [], Units(1, (channels.index[:, None] * block + np.arange(block)).reshape(-1)) if channels else None


class Mean(Rule):
    """The mean over some axes; units along the other axes pass through."""

    def _kept(self, node: Node, rank: int) -> list[int]:
        dims = node.args[1] if len(node.args) > 1 else None
        gone = {d % rank for d in dims} if dims else set(range(rank))
        keepdim = len(node.args) > 2 and node.args[2]
        return list(range(rank)) if keepdim else [d for d in range(rank) if d not in gone]

    def _reduced(self, node: Node, rank: int, axis: int) -> bool:
        return not node.args[1:] or not node.args[1] or axis in {d % rank for d in node.args[1]}

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        rank = len(shapes[0])
        if wanted is None or self._reduced(node, rank, self._kept(node, rank)[wanted.axis]):
            return [None]
        return [Units(self._kept(node, rank)[wanted.axis], wanted.index)]

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        (units,) = have
        return [], Units(self._kept(node, len(shapes[0])).index(units.axis), units.index) if units else None


class Concatenation(Rule):
    """Units along the joined axis are shared out among the inputs; along any other axis they pass through."""

    @staticmethod
    def _axis(node: Node) -> int:
        return (node.args[1] if len(node.args) > 1 else 0) % len(node.shape)

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        axis = self._axis(node)
        if wanted is None or wanted.axis != axis:
            return [wanted] * len(node.inputs)
        result: list[Wanted] = []
        start = 0
        for shape in shapes:
            width = static(shape[axis])
            part = wanted.index[(wanted.index >= start) & (wanted.index < start + width)] - start
            # An input that nobody wants still takes part in the concatenation: one unit of it.
            result.append(Units(axis, part if len(part) else np.zeros(1, np.int64)))
            start += width
        return result

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        axis = self._axis(node)
        if wanted is None or wanted.axis != axis:
            if not all(same_units(units, have[0]) for units in have):
                raise Mismatch
            return [], have[0]
        if all(units is None for units in have):
            return [], None
        parts, start = [], 0
        for units, shape in zip(have, shapes):
            parts.append(start + (units.index if units else np.arange(static(shape[axis]))))
            start += static(shape[axis])
        return [], Units(axis, np.concatenate(parts))


class Embedding(Rule):
    """Rows of a table [tokens, features], picked by indices: linear in the table, feature by feature."""

    def __init__(self) -> None:
        super().__init__("", lambda node: frozenset({0}))

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        if wanted is None or wanted.axis != len(node.shape) - 1:
            return [()], None
        return [(None, wanted.index)], wanted


class Permutation(Rule):
    """transpose and permute: units go to another axis."""

    @staticmethod
    def _order(node: Node) -> list[int]:
        """For each axis of the value the input's."""
        rank = len(node.shape)
        if node.op == "permute":
            return [axis % rank for axis in node.args[1]]
        order = list(range(rank))
        a, b = (0, 1) if node.op == "t" else (node.args[1] % rank, node.args[2] % rank)
        order[a], order[b] = b, a
        return order

    def wants(self, node: Node, wanted: Wanted, shapes: Sequence[Shape], support: Support) -> list[Wanted]:
        return [Units(self._order(node)[wanted.axis], wanted.index) if wanted else None]

    def cuts(self, node: Node, wanted: Wanted, have: Sequence[Wanted], shapes: Sequence[Shape]) -> tuple[list[Cut], Wanted]:
        (units,) = have
        return [], Units(self._order(node).index(units.axis), units.index) if units else None


def _entries_at(*positions: int) -> Callable[[Node], frozenset[int]]:
    """The entries among the arguments at these positions."""
    return lambda node: frozenset(a.index for p, a in enumerate(node.args) if p in positions and isinstance(a, Entry))


UNKNOWN = Rule()
# Rearranging an entry is linear in it, as rearranging a value is.
_STRUCTURAL = Rule("homogeneous", _entries_at(0))
_PRODUCT = Product()
_TRANSPOSED = Product(outputs=1, inputs=0)
_ADDMM = Product(outputs=1, inputs=0, bias_first=True)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d"), _PRODUCT),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _TRANSPOSED),
    "addmm": _ADDMM,
    **dict.fromkeys(
        "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish tanh sigmoid hardsigmoid hardswish softplus softsign "
        "log_sigmoid abs exp log sqrt rsqrt sin cos erf square clamp clamp_min clamp_max".split(),
        Elementwise(),
    ),
    **dict.fromkeys(("clone", "alias", "detach", "neg", "dropout"), Elementwise("homogeneous")),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"), ByChannel("homogeneous")),
    **dict.fromkeys(("max_pool1d", "max_pool2d"), ByChannel()),
    "batch_norm": ByChannel("affine", _entries_at(3, 4)),
    "layer_norm": Rule("", _entries_at(2, 3)),
    "group_norm": Rule("", _entries_at(2, 3)),
    "flatten": Flatten("homogeneous"),
    "mean": Mean("homogeneous"),
    "cat": Concatenation("homogeneous"),
    **dict.fromkeys(
        "reshape unsqueeze squeeze expand slice select contiguous movedim flip view _unsafe_view".split(), _STRUCTURAL
    ),
    **dict.fromkeys(("permute", "transpose", "t"), Permutation("homogeneous", _entries_at(0))),
    "embedding": Embedding(),
    "rms_norm": Rule("", _entries_at(2)),
}


def rule_for(node: Node) -> Rule:
    """The rule that fits the node as it is called, which may be narrower than its operation's name suggests."""
    if node.op in ("add", "sub", "mul", "div") and not node.kwargs:
        return _arithmetic(node)
    rule = _RULES.get(node.op, UNKNOWN)
    if rule is _ADDMM and (node.args != (Entry(0), In(0), Entry(1)) or node.kwargs):
        return UNKNOWN  # a sum that is itself computed, or scaled
    if rule in (_PRODUCT, _TRANSPOSED) and not (
        node.args[:1] == (In(0),) and node.args[1:2] == (Entry(0),)
        and all(isinstance(a, Entry) or a is None for a in node.args[2:3])
    ):  # fmt: skip
        return UNKNOWN  # a weight that is itself computed
    if node.op == "batch_norm" and len(node.inputs) != 1:
        return UNKNOWN
    if isinstance(rule, (ByChannel, Flatten, Mean)) and not (node.shape and isinstance(node.shape[0], Size)):
        return UNKNOWN  # no batch axis in front: a pooled single image, a scalar
    if isinstance(rule, Embedding) and node.args[:2] != (Entry(0), In(0)):
        return UNKNOWN  # a table that is itself computed
    if isinstance(rule, Permutation) and len(node.inputs) != 1:
        return _STRUCTURAL
    if type(rule) is Elementwise and len(node.inputs) != 1:
        return UNKNOWN
    return rule


def _arithmetic(node: Node) -> Rule:
    """add, sub, mul and div, by what is combined with what."""
    kinds = ["value" if isinstance(a, In) else "entry" if isinstance(a, Entry) else "number" for a in node.args]
    if kinds == ["value", "value"]:
        return Elementwise("homogeneous" if node.op in ("add", "sub") else "")
    if kinds == ["value", "number"] or (kinds == ["number", "value"] and node.op != "div"):
        return Elementwise("affine" if node.op in ("add", "sub") else "homogeneous")
    if sorted(kinds) == ["entry", "value"] and node.op == "mul":
        return Rule("homogeneous", lambda _: frozenset({0}))
    if kinds == ["value", "entry"]:
        return Rule("homogeneous" if node.op == "div" else "affine")
    return UNKNOWN
