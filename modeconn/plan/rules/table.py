"""Which operation has which rule. One without a rule is taken to be non-linear in everything and to mix all units."""

from __future__ import annotations

from modeconn.capture.graph import Entry, In, Node, Size
from modeconn.plan.rules.axiswise import (
    Elementwise,
    Expand,
    Linked,
    along,
    attended,
    bilinear,
    by_channel,
    linear_in_first,
    linear_in_values,
    looked_up,
    multiplied,
    over_last,
    permuted,
    reduced,
)
from modeconn.plan.rules.base import UNKNOWN, Rule, entries_at
from modeconn.plan.rules.products import Grouped, GroupNorm, Product
from modeconn.plan.rules.views import Concatenation, Select, Slice, View

_LINEAR = Product(last=True)
_CONV = Product()
_TRANSPOSED = Product(outputs=1, inputs=0)
_ADDMM = Product(outputs=1, inputs=0, bias_first=True, last=True)
_GROUPED, _GROUPED_TRANSPOSED = Grouped(), Grouped(transposed=True)
_PERMUTATION = Linked(permuted, "homogeneous", entries_at(0))
# Rearranging an entry is linear in it, as rearranging a value is.
_STRUCTURAL = Rule("homogeneous", entries_at(0))
_POOLING = {
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        Linked(by_channel, "homogeneous"),
    ),
    **dict.fromkeys(("max_pool1d", "max_pool2d"), Linked(by_channel)),
}
# Where the numbers among the arguments are that a rule reads: they might be computed.
_NUMBERS = {
    "slice": slice(1, 5),
    "select": slice(1, 3),
    "squeeze": slice(1, 2),
    "softmax": slice(1, 2),
    "log_softmax": slice(1, 2),
}
_RULES: dict[str, Rule] = {
    "linear": _LINEAR,
    **dict.fromkeys(("conv1d", "conv2d"), _CONV),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _TRANSPOSED),
    "addmm": _ADDMM,
    **dict.fromkeys(
        "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish tanh sigmoid hardsigmoid hardswish softplus softsign "
        "log_sigmoid abs exp log sqrt rsqrt sin cos erf square pow clamp clamp_min clamp_max".split(),
        Elementwise(),
    ),
    **dict.fromkeys(("clone", "alias", "detach", "neg", "dropout"), Elementwise("homogeneous")),
    **_POOLING,
    "batch_norm": Linked(by_channel, "affine", entries_at(3, 4)),
    "layer_norm": Linked(over_last, "", entries_at(2, 3)),
    "rms_norm": Linked(over_last, "", entries_at(2)),
    "group_norm": GroupNorm("", entries_at(2, 3)),
    **dict.fromkeys(("mean", "sum"), Linked(reduced, "homogeneous")),
    **dict.fromkeys(("amax", "amin"), Linked(reduced)),
    **dict.fromkeys(("softmax", "log_softmax"), Linked(along(1))),
    "scaled_dot_product_attention": Linked(attended, linear_in_values),
    **dict.fromkeys(("matmul", "bmm"), Linked(multiplied, bilinear)),
    "cat": Concatenation("homogeneous"),
    "slice": Slice("homogeneous", entries_at(0)),
    "select": Select("homogeneous", entries_at(0)),
    **dict.fromkeys(
        ("reshape", "flatten", "unsqueeze", "squeeze"), View("homogeneous", entries_at(0))
    ),
    **dict.fromkeys(("permute", "transpose", "t"), _PERMUTATION),
    "expand": Expand(),
    **dict.fromkeys(("contiguous", "movedim", "flip"), _STRUCTURAL),
    "embedding": Linked(looked_up, "", entries_at(0)),
}


def rule_for(node: Node) -> Rule:
    """The rule that fits the node as it is called, which may be narrower than its operation's name suggests."""
    if node.op in ("add", "sub", "mul", "div") and not node.kwargs:
        return _arithmetic(node)
    rule = _RULES.get(node.op, UNKNOWN)
    if isinstance(rule, Product):
        return _product(node, rule)
    if isinstance(rule, (View, Slice, Select)) and not node.inputs:
        return _STRUCTURAL  # of an entry
    return rule if _as_expected(node, rule) else UNKNOWN


def _product(node: Node, rule: Product) -> Rule:
    """Of a linear layer or convolution, by where its weight comes from and how many groups it has."""
    if rule is _ADDMM:
        # else computed, or scaled
        return rule if node.args == (Entry(0), In(0), Entry(1)) and not node.kwargs else UNKNOWN
    if node.args[:2] != (In(0), Entry(0)) or not all(
        isinstance(a, Entry) or a is None for a in node.args[2:3]
    ):
        return UNKNOWN  # a weight that is itself computed
    grouped = node.op.startswith("conv") and len(node.args) > 6 and node.args[6] != 1
    return (_GROUPED_TRANSPOSED if rule is _TRANSPOSED else _GROUPED) if grouped else rule


def _as_expected(node: Node, rule: Rule) -> bool:
    """Whether a node's arguments are such as its rule reads."""
    args = node.args
    if node.op in _POOLING:  # with rows in front: else axis 1 is no axis of channels
        return len(node.shape) == (3 if node.op.endswith("1d") else 4) and isinstance(
            node.shape[0], Size
        )
    if node.op == "scaled_dot_product_attention":
        return args[:3] == (In(0), In(1), In(2))
    if node.op in ("matmul", "bmm"):
        return args == (In(0), In(1))
    if node.op == "embedding":
        return args[:2] == (Entry(0), In(0))
    if node.op == "cat":
        return list(args[0]) == list(map(In, range(len(node.inputs))))
    if rule is _PERMUTATION or isinstance(rule, Expand):
        return len(node.inputs) + len(node.entries) == 1
    if rule is UNKNOWN or rule is _STRUCTURAL:
        return True
    numbers = args[_NUMBERS[node.op]] if node.op in _NUMBERS else (0,)
    plain = len(numbers) > 0 and all(
        number is None or isinstance(number, int | list) for number in numbers
    )
    return len(node.inputs) == 1 and args[0] == In(0) and plain


def _arithmetic(node: Node) -> Rule:
    """add, sub, mul and div, by what is combined with what."""
    kinds = [
        "value" if isinstance(a, In) else "entry" if isinstance(a, Entry) else "number"
        for a in node.args
    ]
    additive = node.op in ("add", "sub")
    if kinds == ["value", "value"]:
        return Elementwise(
            "homogeneous" if additive else bilinear if node.op == "mul" else linear_in_first
        )
    if kinds == ["value", "number"] or (kinds == ["number", "value"] and node.op != "div"):
        return Elementwise("affine" if additive else "homogeneous")
    if sorted(kinds) == ["entry", "value"] and node.op == "mul":
        return Elementwise("homogeneous", lambda _: frozenset({0}))
    if kinds == ["value", "entry"] or (kinds == ["entry", "value"] and additive):
        return Elementwise("affine" if additive else "homogeneous")
    return UNKNOWN
