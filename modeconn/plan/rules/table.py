"""Table of rules by operation; one without a rule is non-linear and mixes all units."""

from __future__ import annotations

from typing import Any

from modeconn.capture.graph import Entry, In, Node, Size
from modeconn.plan.rules import tying
from modeconn.plan.rules.axiswise import (
    Elementwise,
    Expand,
    Linked,
    along_dim,
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
from modeconn.plan.rules.base import UNKNOWN, Rule, entries_of
from modeconn.plan.rules.products import Grouped, GroupNorm, Product
from modeconn.plan.rules.recurrent import Recurrent
from modeconn.plan.rules.views import Concatenation, Select, Slice, View

_LINEAR = Product(last=True)
_CONV = Product()
_TRANSPOSED = Product(outputs=1, inputs=0)
_ADDMM = Product(outputs=1, inputs=0, bias_first=True, last=True)
_GROUPED, _GROUPED_TRANSPOSED = Grouped(), Grouped(transposed=True)
_PERMUTATION = Linked(permuted, "homogeneous", entries_of("self"), tying.permuted)
# Rearranging an entry is linear in it, as rearranging a value is.
_STRUCTURAL = Rule("homogeneous", entries_of("self"))
_CONTIGUOUS = Rule("homogeneous", entries_of("self"), tying.elementwise)
_POOLING = {
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        Linked(by_channel, "homogeneous", ties=tying.over_pixels),
    ),
    **dict.fromkeys(("max_pool1d", "max_pool2d"), Linked(by_channel, ties=tying.over_pixels)),
}
_ELEMENTWISE = (
    "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish tanh sigmoid hardsigmoid "
    "hardswish softplus softsign log_sigmoid abs exp log sqrt rsqrt sin cos erf square pow "
    "clamp clamp_min clamp_max"
).split()
# Arguments that a rule reads as numbers: they might be computed.
_NUMBERS = {
    "slice": ("dim", "start", "end", "step"),
    "select": ("dim", "index"),
    "squeeze": ("dim",),
    "softmax": ("dim",),
    "log_softmax": ("dim",),
}
# In the place of an argument that an overload does not have: no number.
_MISSING = object()
_RULES: dict[str, Rule] = {
    "linear": _LINEAR,
    **dict.fromkeys(("conv1d", "conv2d"), _CONV),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _TRANSPOSED),
    "addmm": _ADDMM,
    **dict.fromkeys(_ELEMENTWISE, Elementwise()),
    **dict.fromkeys(("clone", "alias", "detach", "neg", "dropout"), Elementwise("homogeneous")),
    **_POOLING,
    "batch_norm": Linked(by_channel, "affine", entries_of("weight", "bias"), tying.by_channel),
    "layer_norm": Linked(over_last, "", entries_of("weight", "bias"), tying.over_last),
    "rms_norm": Linked(over_last, "", entries_of("weight"), tying.over_last),
    "group_norm": GroupNorm("", entries_of("weight", "bias")),
    **dict.fromkeys(("mean", "sum"), Linked(reduced, "homogeneous", ties=tying.reduced)),
    **dict.fromkeys(("amax", "amin"), Linked(reduced, ties=tying.reduced)),
    **dict.fromkeys(("softmax", "log_softmax"), Linked(along_dim, ties=tying.along_dim)),
    "scaled_dot_product_attention": Linked(attended, linear_in_values, ties=tying.attended),
    **dict.fromkeys(("matmul", "bmm"), Linked(multiplied, bilinear, ties=tying.multiplied)),
    "cat": Concatenation("homogeneous"),
    "slice": Slice("homogeneous", entries_of("self")),
    "select": Select("homogeneous", entries_of("self")),
    **dict.fromkeys(
        ("reshape", "flatten", "unsqueeze", "squeeze"), View("homogeneous", entries_of("self"))
    ),
    **dict.fromkeys(("permute", "transpose", "t"), _PERMUTATION),
    "expand": Expand(),
    "contiguous": _CONTIGUOUS,
    **dict.fromkeys(("movedim", "flip"), _STRUCTURAL),
    "embedding": Linked(looked_up, "", entries_of("weight"), tying.looked_up),
}
# Of operations that the planner takes whole: how their axes are tied.
_TIED = {
    **dict.fromkeys(
        (
            "add sub mul div where maximum minimum masked_fill eq ne lt gt le ge logical_and "
            "logical_or logical_not bitwise_not reciprocal sign floor round nan_to_num _to_copy to "
            "threshold hardshrink softshrink log1p expm1 tan atan sinh cosh isnan lerp addcmul "
            "addcdiv rsub"
        ).split(),
        Rule(ties=tying.elementwise),
    ),
    **dict.fromkeys(
        "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like".split(),
        Rule(ties=tying.uniform),
    ),
    **dict.fromkeys(
        (
            "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d "
            "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d"
        ).split(),
        Rule(ties=tying.over_pixels),
    ),
    "conv3d": _CONV,
    "prelu": Rule(ties=tying.by_channel),
    "mm": Rule(ties=tying.multiplied),
    "stack": Rule(ties=tying.stacked),
    **dict.fromkeys(("pad", "constant_pad_nd"), Rule(ties=tying.padded)),
    "getitem": Rule(ties=tying.element),
    **dict.fromkeys(("rnn_tanh", "rnn_relu"), Recurrent(1)),
    "gru": Recurrent(3),
    "lstm": Recurrent(4, states=2),
}


def rule_for(node: Node) -> Rule:
    """Returns the rule of a node as it is called, which not every call of its operation has."""
    if node.op in ("add", "sub", "mul", "div") and _unscaled(node):
        return _arithmetic(node)
    rule = _RULES.get(node.op, UNKNOWN)
    if isinstance(rule, Product):
        return _product(node, rule)
    if isinstance(rule, (View, Slice, Select)) and not node.inputs:
        return _STRUCTURAL  # of an entry
    return rule if _as_expected(node, rule) else UNKNOWN


def rule_of_axes(node: Node) -> Rule:
    """Returns the rule that ties the axes of a node; `UNKNOWN` if there is none.

    Ties hold whatever an operation's arguments are: entries, values or numbers.
    """
    return _RULES.get(node.op) or _TIED.get(node.op, UNKNOWN)


def _product(node: Node, rule: Product) -> Rule:
    """The rule of a linear layer or convolution, by the origin of its weight and its groups."""
    if rule is _ADDMM:
        plain = list(node.arguments.values()) == [Entry(0), In(0), Entry(1), 1, 1]
        return rule if plain else UNKNOWN  # else computed, or scaled by beta or alpha
    if node["input"] != In(0) or node["weight"] != Entry(0) or isinstance(node["bias"], In):
        return UNKNOWN  # a weight that is itself computed
    if node.op == "linear" or node["groups"] == 1:
        return rule
    return _GROUPED_TRANSPOSED if rule is _TRANSPOSED else _GROUPED


def _as_expected(node: Node, rule: Rule) -> bool:
    """Whether a node's arguments are of the kinds that its rule reads."""
    if node.op in _POOLING:  # with rows in front: else axis 1 is no axis of channels
        rank = 3 if node.op.endswith("1d") else 4
        return len(node.shape) == rank and isinstance(node.shape[0], Size)
    if node.op == "scaled_dot_product_attention":
        return [node["query"], node["key"], node["value"]] == [In(0), In(1), In(2)]
    if node.op in ("matmul", "bmm"):
        return list(node.arguments.values()) == [In(0), In(1)]
    if node.op == "embedding":
        return [node["weight"], node["indices"]] == [Entry(0), In(0)]
    if node.op == "cat":
        return list(node["tensors"]) == [In(i) for i in range(len(node.inputs))]
    if rule is _PERMUTATION or isinstance(rule, Expand):
        return len(node.inputs) + len(node.entries) == 1
    if rule in (UNKNOWN, _STRUCTURAL, _CONTIGUOUS):
        return True
    numbers = [node.arguments.get(name, _MISSING) for name in _NUMBERS.get(node.op, ())]
    plain = all(number is None or isinstance(number, int | list) for number in numbers)
    return len(node.inputs) == 1 and node.first == In(0) and plain


def _unscaled(node: Node) -> bool:
    """Whether an operation of arithmetic neither scales its second operand nor rounds."""
    alpha, rounding = node.arguments.get("alpha", 1), node.arguments.get("rounding_mode")
    return bool(alpha == 1) and rounding is None


def _arithmetic(node: Node) -> Rule:
    """add, sub, mul and div, by what is combined with what."""
    kinds = [_kind(node["self"]), _kind(node["other"])]
    additive = node.op in ("add", "sub")
    if kinds == ["value", "value"]:
        if additive:
            return Elementwise("homogeneous")
        return Elementwise(bilinear if node.op == "mul" else linear_in_first)
    if kinds == ["value", "number"] or (kinds == ["number", "value"] and node.op != "div"):
        return Elementwise("affine" if additive else "homogeneous")
    if sorted(kinds) == ["entry", "value"] and node.op == "mul":
        return Elementwise("homogeneous", lambda _: frozenset({0}))
    if kinds == ["value", "entry"] or (kinds == ["entry", "value"] and additive):
        return Elementwise("affine" if additive else "homogeneous")
    return UNKNOWN


def _kind(operand: Any) -> str:
    if isinstance(operand, In):
        return "value"
    return "entry" if isinstance(operand, Entry) else "number"
