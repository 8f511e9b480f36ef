"""Layers that tell, step by step, how large the rounding errors are that they make themselves.

Errors are counted in unit roundoffs u. Of a product of n terms at most γ_n (|W| |h| + |b|) with γ_n
= n u / (1 - n u), in any order of addition (Higham 2002, section 3.1); zeros add no error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from modeconn.capture.graph import Node
from modeconn.connection import lipschitz
from modeconn.connection.activation_bounds import bounds_of, pooled_numbers
from modeconn.connection.layer_chain import ACTIVATIONS, AVERAGES, AffineLayer, LayerChain, Norm

State = Mapping[str, Tensor]
# Takes a value, the size of its own error and the most that the step lengthens differences.
Told = Callable[[Tensor, Tensor | None, float], None]

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Roundings beside those of a product's sum: of the bias, of an input or weight that is narrowed,
# and five of a weight between two breakpoints.
BESIDE = 8
# Roundings of a folded or unfolded norm, and of a smooth activation, in units of what they compute.
OF_NORM = 16
OF_ACTIVATION = 8
# A value is near a kink within this many of its own rounding errors.
_KINK = 4.0


class LiveNetwork:
    """A chain with the weights of live units alone.

    Args:
        state: the weights. sizes: weights of which the absolute values stand for |W| and |b|.
        factors: by key, those of affine maps, which networks share.

    Attributes:
        keys: by layer, what the values of layers up to it depend on: equal keys, equal values.
    """

    def __init__(
        self,
        chain: LayerChain,
        state: State,
        sizes: State,
        factors: dict[tuple[object, ...], float] | None = None,
    ) -> None:
        live = live_units(chain, state)
        self.chain = chain
        self.state = _restricted(chain, state, live)
        self.sizes = self.state if sizes is state else _restricted(chain, sizes, live)
        self._kept = state, sizes  # so that no other tensor gets the memory of one of these
        self.keys: list[tuple[object, ...]] = [()]
        for layer, units in zip(chain.layers, live[1:]):
            incoming = list(layer.incoming())
            pairs = itertools.product((state, sizes), incoming)
            own = tuple(_place(table[key]) for table, key in pairs)
            self.keys.append((*self.keys[-1], own, units.numpy().tobytes()))
        self._factors = {} if factors is None else factors

    def multiply_adds(self) -> list[float]:
        """Returns those of each layer for one row."""
        found = []
        for layer in self.chain.layers:
            places = [int(d) for d in layer.affine.shape[2:] if isinstance(d, int)]
            found.append(float(self.state[layer.weight].numel() * torch.Size(places).numel()))
        return found

    def layer(self, layer: AffineLayer, h: Tensor, tell: Told) -> Tensor:
        """Applies a layer; tells every step's value, own error and factor."""
        bias = self.state[layer.bias] if layer.bias else None
        value = layer.map(h, self.state[layer.weight], bias)
        if torch.is_grad_enabled() and not value.requires_grad:
            value.requires_grad_()
        error = self.of_product(layer, h.detach())
        tell(value, error, 1.0 if torch.is_grad_enabled() else self._factor(layer))
        for node in layer.steps:
            value, error = self._step(layer, node, value, error, tell)
        return value

    def _factor(self, layer: AffineLayer) -> float:
        key = self.keys[layer.index]
        if key not in self._factors:
            self._factors[key] = lipschitz.of_affine(layer, self.state[layer.weight])
        return self._factors[key]

    @torch.no_grad()
    def of_product(self, layer: AffineLayer, h: Tensor) -> Tensor:
        """Returns the size of the own error of a layer's affine map."""
        bias = self.sizes[layer.bias].abs() if layer.bias else None
        size = layer.map(h.abs(), self.sizes[layer.weight].abs(), bias)
        if layer is self.chain.layers[-1]:  # on a swing it reads what is live at either end
            terms = self.chain.widths[-2] * layer.block * math.prod(layer.kernel)
            return size * (terms + BESIDE)
        if layer.kind != "linear":
            return size * (self.sizes[layer.weight][0].numel() + BESIDE)
        return size * ((h != 0).sum(1, keepdim=True) + BESIDE)

    def _step(
        self, layer: AffineLayer, node: Node, value: Tensor, error: Tensor, tell: Told
    ) -> tuple[Tensor, Tensor]:
        """Applies a step after the affine map; returns its value and the size of its own error."""
        before = value.detach()
        if node.op in ACTIVATIONS:
            return _activated(node, value, error, tell)
        value = node.run([value], [self.state[key] for key in node.entries], len(value))
        if node.op == "batch_norm" and layer.norm is not None:
            scale, error = self._of_norm(layer.norm, before)
            tell(value, error, lipschitz.of_norm(scale))
        elif node.op in AVERAGES:
            count = min(pooled_numbers(node), float(before[0, 0].numel()))
            error = (count + 2) * node.run([before.abs()], [], len(before)).abs()
            tell(value, error, lipschitz.of_step(node))
        else:
            error = node.run([error], [], len(error))
            tell(value, None, lipschitz.of_step(node))
        return value, error

    @torch.no_grad()
    def _of_norm(self, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a norm's scale, and the size of its rounding error."""
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
        if norm.var is not None:
            scale = scale / (self.state[norm.var] + norm.eps).sqrt()
        if norm.weight is not None:
            scale = scale * self.state[norm.weight].abs()
        size = x.abs()
        if norm.mean is not None:
            size = size + self.state[norm.mean].abs().view(shape)
        bias = 0.0 if norm.bias is None else self.state[norm.bias].abs().view(shape)
        return scale, OF_NORM * (size * scale.view(shape) + bias)


def _activated(node: Node, value: Tensor, error: Tensor, tell: Told) -> tuple[Tensor, Tensor]:
    bounds = bounds_of(node)
    assert bounds is not None
    if not torch.is_grad_enabled():
        output = node.run([value], [], len(value))
    else:
        reach = error * (_KINK * UNIT_ROUNDOFF[value.dtype])
        near = value.detach().abs() <= reach
        for kink in bounds.kinks:
            near |= (value.detach() - kink).abs() <= reach
        output = _Activation.apply(value, node, near, bounds.slope)
    if bounds.exact:
        tell(output, None, bounds.slope)
        return output, torch.zeros_like(error)
    size = OF_ACTIVATION * (value.detach().abs() + output.detach().abs() + 1)
    tell(output, size, bounds.slope)
    return output, size


class _Activation(torch.autograd.Function):
    """An activation whose slope is its largest where rounding may decide on which side x is."""

    @staticmethod
    def forward(ctx, x, node, near, largest):  # type: ignore[no-untyped-def]
        """Applies the node."""
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            y = node.run([inner], [], len(inner))
            (slope,) = torch.autograd.grad(y.sum(), inner)
        ctx.save_for_backward(torch.where(near, largest, slope))
        return y.detach()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        """Multiplies by the slopes."""
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None, None


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Returns what tells a tensor from another one while both are in memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def live_units(chain: LayerChain, state: State) -> list[Tensor]:
    """Returns the live units of layers 0 … L, int64; at least one of each layer."""
    found = [torch.arange(chain.widths[-1])]
    for layer in reversed(chain.layers):
        weight = layer.by_unit(state[layer.weight])
        read = (weight[found[0].to(weight.device)] != 0).flatten(2).any(2).any(0)
        if layer.index == 1:
            read[:] = True
        read[0] |= ~read.any()  # an empty layer would have no products
        found.insert(0, read.nonzero().flatten().cpu())
    return found


def _restricted(chain: LayerChain, state: State, live: list[Tensor]) -> dict[str, Tensor]:
    """Returns the weights of live units alone."""
    found: dict[str, Tensor] = {}
    for layer, below, units in zip(chain.layers, live, live[1:]):
        for key in layer.incoming():
            rows = state[key].detach()[units.to(state[key].device)]
            found[key] = rows if key != layer.weight else layer.select(rows, below)
    return found
