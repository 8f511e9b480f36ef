"""Bounds of an operation's value, from bounds of its inputs and its weights at a segment's ends.

All bounds are of magnitudes, in float64. Sums of products with non-negative numbers are monotone,
so linear operations are run as they are, on bounds and magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.capture.graph import Entry, In, Node, Size

# float32, which evaluations are done in by default, holds numbers up to 3.4e38. Convolutions may
# add up transforms of their inputs, which are a few times larger.
LARGEST = 1e37
# A weight at the two ends of a segment.
Ends = tuple[Tensor, Tensor]
# (node, bounds of its inputs, its entries at both ends) → the bound of its value.
Bound = Callable[[Node, Sequence[Tensor], Sequence[Ends]], Tensor]


class NoBound(Exception):
    """An operation is called in a way that no bound is known of; the text says which."""


def _largest(ends: Ends) -> Tensor:
    return torch.maximum(ends[0].abs(), ends[1].abs())


def _monotone(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """Products with weights, means, maxima, rearrangements."""
    value: Tensor = node.run(inputs, [_largest(ends) for ends in entries], 1)
    return value


def _addmm(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    if node["alpha"] != 1 or node["beta"] != 1:
        raise NoBound("which are scaled by alpha or beta")
    return _monotone(node, inputs, entries)


def _operand(leaf: Any, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """Returns the bound of an operand: a value, an entry or a number."""
    if isinstance(leaf, In):
        return inputs[leaf.index]
    if isinstance(leaf, Entry):
        return _largest(entries[leaf.index])
    return torch.tensor(abs(_number(leaf)), dtype=torch.float64)


def _number(leaf: Any) -> float:
    if isinstance(leaf, (int, float)):
        return float(leaf)
    raise NoBound(f"one of whose numbers is {leaf!r}")


def _sum(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    first, second = (_operand(node[name], inputs, entries) for name in ("self", "other"))
    return first + abs(_number(node.arguments.get("alpha", 1))) * second


def _product(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    first, second = (_operand(node[name], inputs, entries) for name in ("self", "other"))
    return first * second


def _quotient(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    divisor = node["other"]
    if node.arguments.get("rounding_mode") is not None:
        raise NoBound("which rounds")
    if isinstance(divisor, Entry):
        a, b = entries[divisor.index]
        # Of one sign at both ends, it is nowhere nearer to zero.
        least: Tensor | float = torch.minimum(a.abs(), b.abs())
        apart = bool((a * b > 0).all())
    else:
        least = 0.0 if isinstance(divisor, In) else abs(_number(divisor))
        apart = least > 0
    if not apart:
        raise NoBound("which divides by what may be zero")
    return _operand(node["self"], inputs, entries) / least


# -- activations -----------------------------------------------------------------------------------


def _same(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """|σ(z)| ≤ |z|."""
    return inputs[0]


def _linear(factor: float, offset: float) -> Bound:
    """|σ(z)| ≤ factor |z| + offset."""

    def bound(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
        return factor * inputs[0] + offset

    return bound


def _elu(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """|σ(z)| ≤ |scale| (|z| + |α|); of CELU |z| + |α|."""
    scale = abs(_number(node.arguments.get("scale", 1)))
    return scale * (inputs[0] + abs(_number(node["alpha"])))


def _leaky(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    return max(1.0, abs(_number(node["negative_slope"]))) * inputs[0]


def _softplus(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """softplus(z) ≤ |z| + ln 2 / β."""
    beta = _number(node["beta"])
    if not beta > 0:
        raise NoBound(f"whose beta is {beta}")
    return inputs[0] + math.log(2) / beta


def _clipped(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """clamp, hardtanh: the value is z or one of the limits."""
    limits = [leaf for leaf in list(node.arguments.values())[1:] if leaf is not None]
    return inputs[0] + max([0.0, *(abs(_number(leaf)) for leaf in limits)])


def _square(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    return inputs[0] * inputs[0]


# -- norms and attention ---------------------------------------------------------------------------


def _batch_norm(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """|γ| (|x| + |μ|) / sqrt(σ² + ε) + |β|, with the smaller of the two variances."""
    if not isinstance(node["var"], Entry) or not isinstance(node["mean"], Entry):
        raise NoBound("whose statistics are computed")
    mean, var = entries[node["mean"].index], entries[node["var"].index]
    shape = (1, -1, *[1] * (inputs[0].dim() - 2))
    deviation = (torch.minimum(*var) + node["eps"]).sqrt()
    value = (inputs[0] + _largest(mean).view(shape)) / deviation.view(shape)
    return _scaled(node, value, entries, shape)


def _normalised(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """Layer, group and RMS norms: no number of n is above sqrt(n) standard deviations."""
    value = inputs[0]
    shape: tuple[int, ...] = ()
    if node.op == "group_norm":
        count = value[0].numel() // int(node["num_groups"])
        shape = (1, -1, *[1] * (value.dim() - 2))
    else:
        sizes = node["normalized_shape"]
        count, shape = math.prod(sizes), tuple(sizes)
    eps = node["eps"]
    if eps is not None and not float(eps) > 0:  # without one RMS norms take the precision's
        raise NoBound(f"whose eps is {eps}")
    # Variances are sums of squares, which must not overflow either.
    fits = count * float(value.max()) ** 2 <= LARGEST
    bounded = torch.full_like(value, math.sqrt(count) if fits else math.inf)
    return _scaled(node, bounded, entries, shape)


def _scaled(node: Node, value: Tensor, entries: Sequence[Ends], shape: tuple[int, ...]) -> Tensor:
    """Returns |γ| times a value, plus |β|, as far as a norm has them."""
    for name in ("weight", "bias"):
        leaf = node.arguments.get(name)
        if isinstance(leaf, Entry):
            own = _largest(entries[leaf.index]).view(shape)
            value = value * own if name == "weight" else value + own
        elif leaf is not None:
            raise NoBound(f"whose {name} is computed")
    return value


def _softmax(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    return torch.ones_like(inputs[0])


def _log_softmax(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    count = inputs[0].shape[node["dim"]]
    return torch.full_like(inputs[0], 2 * float(inputs[0].max()) + math.log(count))


def _attention(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """Means of the values; the scores must not overflow either."""
    query, key, value = (
        _operand(node[name], inputs, entries) for name in ("query", "key", "value")
    )
    features, scale = query.shape[-1], node["scale"]
    factor = 1 / math.sqrt(features) if scale is None else max(1.0, abs(_number(scale)))
    scores = features * float(query.max()) * float(key.max()) * max(1.0, factor)
    shape = [size.of(1) if isinstance(size, Size) else size for size in node.shape]
    largest = float(value.max()) if scores <= LARGEST else math.inf
    return torch.full(shape, largest, dtype=torch.float64)


def _embedding(node: Node, inputs: Sequence[Tensor], entries: Sequence[Ends]) -> Tensor:
    """The largest of each feature over the rows of the table."""
    if not isinstance(node["weight"], Entry):
        raise NoBound("whose table is computed")
    table = _largest(entries[node["weight"].index])
    shape = [size.of(1) if isinstance(size, Size) else size for size in node.shape]
    return table.amax(0).expand(shape)


BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(
        "linear conv1d conv2d conv_transpose1d conv_transpose2d avg_pool1d avg_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d max_pool2d mean sum amax cat slice "
        "select reshape flatten unsqueeze squeeze permute transpose t expand contiguous movedim "
        "flip clone alias detach dropout matmul bmm".split(),
        _monotone,
    ),
    "addmm": _addmm,
    **dict.fromkeys(("add", "sub"), _sum),
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys("relu relu6 tanh silu mish gelu abs neg hardswish erf sin".split(), _same),
    **dict.fromkeys("sigmoid hardsigmoid cos softsign".split(), _linear(1.0, 1.0)),
    "selu": _linear(1.06, 1.76),
    **dict.fromkeys(("elu", "celu"), _elu),
    "leaky_relu": _leaky,
    "softplus": _softplus,
    "log_sigmoid": _linear(1.0, math.log(2)),
    **dict.fromkeys("clamp clamp_min clamp_max hardtanh".split(), _clipped),
    "square": _square,
    "batch_norm": _batch_norm,
    **dict.fromkeys("layer_norm group_norm rms_norm".split(), _normalised),
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
}
