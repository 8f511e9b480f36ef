"""Bounds how large the values of a chain can become on a segment, for all rows and all t.

A dead unit does not change the function in exact arithmetic, but a value of it that overflows makes
NaN of the weight zero that reads it. Weights are convex combinations of those at both ends, so with
v_0 the largest absolute inputs,

    v_p = max(|W|, |W'|) v_{p-1} + max(|b|, |b'|)

bounds the values of layer p, its partial sums included, in any order of addition (Moore 1966,
interval arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modeconn.capture.graph import Node
from modeconn.connection.activation_bounds import bounds_of, pooling_factor
from modeconn.connection.layer_chain import ACTIVATIONS, AffineLayer, LayerChain, Norm

State = Mapping[str, Tensor]


def largest(chain: LayerChain, start: State, stop: State, inputs: Tensor) -> tuple[float, str]:
    """Bounds the values of all layers on the segment between two states.

    Args:
        inputs: the largest absolute value of each input, [1, …].

    Returns:
        the largest bound, and the layer it is of, in words; NaN where an input or weight is NaN.
    """
    v = _by_unit(chain.fixed.largest(start, stop, inputs.double())[0])
    worst, where = float(v.max()), "the inputs"
    for layer in chain.layers:
        for bound in _of_layer(layer, start, stop, v):
            v, top = bound, float(bound.max())
            if not top <= worst:  # NaN, too
                worst, where = top, f"layer {layer.index} ({layer.weight})"
    return worst, where


def _by_unit(value: Tensor) -> Tensor:
    """Returns the largest value of each unit of layer 0: features, or channels."""
    return value.flatten(1).amax(1) if value.dim() > 1 else value


def _of_layer(layer: AffineLayer, start: State, stop: State, v: Tensor) -> list[Tensor]:
    """Returns bounds of a layer's values, one after another; the last is that of its output."""
    weight = layer.by_unit(_larger(start, stop, layer.weight)).sum(2)
    found = [weight @ v.to(weight)]
    if layer.bias is not None:
        found[0] = found[0] + _larger(start, stop, layer.bias)
    for node in layer.steps:
        found.append(_after(node, layer.norm, start, stop, found[-1]))
    return found


def _after(node: Node, norm: Norm | None, start: State, stop: State, v: Tensor) -> Tensor:
    """Returns the bound behind a step after the affine map."""
    if node.op == "batch_norm" and norm is not None:
        return _of_norm(norm, start, stop, v)
    if node.op in ACTIVATIONS:
        bounds = bounds_of(node)
        # Of what is not known, nothing is bounded.
        return v * math.nan if bounds is None else bounds.factor * v + bounds.offset
    return pooling_factor(node) * v


def _of_norm(norm: Norm, start: State, stop: State, v: Tensor) -> Tensor:
    scale = torch.ones_like(v)
    if norm.var is not None:
        least = torch.minimum(start[norm.var], stop[norm.var]).to(v)
        scale = 1 / (least + norm.eps).sqrt()
    if norm.mean is not None:
        v = v + _larger(start, stop, norm.mean)
    if norm.weight is not None:
        scale = scale * _larger(start, stop, norm.weight).clamp(min=1.0)
    bias = 0.0 if norm.bias is None else _larger(start, stop, norm.bias)
    return v * scale.clamp(min=1.0) + bias


def _larger(start: State, stop: State, key: str) -> Tensor:
    """Returns the larger absolute value of the two ends, float64."""
    a, b = start[key], stop[key]
    return a.double().abs() if a is b else torch.maximum(a.double().abs(), b.double().abs())


def limit(dtype: torch.dtype) -> float:
    """Returns the largest bound that is taken: a little below the largest number of a dtype."""
    return 3e38 if dtype == torch.float32 else math.ldexp(1.0, 1020)
