"""Bounds how far rounding can move the outputs of a chain, to first order in the unit roundoff.

Every affine map, norm, average and smooth activation makes an error of its own: of a product of n
terms at most γ_n (|W| |h| + |b|), γ_n = n u / (1 - n u), in any order of addition (Higham 2002,
section 3.1). To first order the outputs z move by the sum of these, each times its derivative:

    |δz| ≤ Σ_p |∂z/∂pre_p| γ (|W_p| |h_{p-1}| + |b_p|).

Derivatives and sizes are computed in the weights' precision. Where a value is within its own
rounding error of a kink, the activation's largest slope is taken. Zeros in a product add no error,
so live units alone count. A path's weights are themselves rounded: lerp makes up to five errors.

On a segment the bound is convex in t where one factor is affine in t, as on a swing, so that of the
breakpoints bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.capture.graph import Node
from modeconn.connection.activation_bounds import bounds_of, pooled_numbers
from modeconn.connection.layer_chain import ACTIVATIONS, AffineLayer, LayerChain

State = Mapping[str, Tensor]

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Roundings beside those of a product's sum: of the bias, of an input or weight that is narrowed,
# and five of a weight between two breakpoints.
_BESIDE = 8
# Roundings of a folded or unfolded norm, and of a smooth activation, in units of what they compute.
_OF_NORM = 16
_OF_ACTIVATION = 8
# Derivatives and sizes are computed themselves: their own rounding, and γ_n against n u.
_MARGIN = 1.01
# A value is near a kink within this many of its own rounding errors.
_KINK = 4.0


@dataclass(frozen=True)
class Sensitivity:
    """A bound on the outputs' errors, to first order in the unit roundoff u.

    Attributes:
        roundoffs: [N, C] in the weights' dtype: the error is at most u times this.
    """

    roundoffs: Tensor

    def errors(self, dtype: torch.dtype) -> Tensor:
        """Returns the bound for evaluations in a dtype, float64 [N, C]."""
        return self.roundoffs.double() * (_MARGIN * UNIT_ROUNDOFF[dtype])


def sensitivity(
    chain: LayerChain, state: State, x: Tensor, sizes: State | None = None
) -> Sensitivity | None:
    """Bounds the outputs' errors for some rows.

    Args:
        x: inputs [N, …] in the weights' dtype.
        sizes: weights of which the absolute values stand for |W| and |b|; the state's own if None.

    Returns:
        None where the rounding of some activation is not known.
    """
    steps = [node for layer in chain.layers for node in layer.steps]
    if any(node.op in ACTIVATIONS and bounds_of(node) is None for node in steps):
        return None
    live = live_units(chain, state)
    with torch.enable_grad():
        roundoffs = _Pass(chain, state, sizes or state, live).roundoffs(x)
    # What overflows is not bounded.
    return Sensitivity(roundoffs.nan_to_num(nan=torch.inf, posinf=torch.inf))


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


class _Pass:
    """A pass through the live units, that remembers where rounding happens and how much."""

    def __init__(self, chain: LayerChain, state: State, sizes: State, live: list[Tensor]) -> None:
        self.chain, self.live = chain, live
        self.state = _restricted(chain, state, live)
        self.sizes = self.state if sizes is state else _restricted(chain, sizes, live)
        self.taps: list[tuple[Tensor, Tensor]] = []  # values, and sizes of their own errors

    def roundoffs(self, x: Tensor) -> Tensor:
        """Returns Σ |∂z/∂value| · size [N, C]."""
        h = self.chain.input(x)
        for layer in self.chain.layers:
            h = self._layer(layer, h)
        values = [value for value, _ in self.taps]
        columns = []
        for c in range(h.shape[1]):
            last = c == h.shape[1] - 1
            slopes = torch.autograd.grad(h[:, c].sum(), values, retain_graph=not last)
            total = h.new_zeros(len(h))
            for slope, (_, size) in zip(slopes, self.taps):
                total += (slope.abs() * size).flatten(1).sum(1)
            columns.append(total)
        return torch.stack(columns, 1)

    def _layer(self, layer: AffineLayer, h: Tensor) -> Tensor:
        weight, bias = self.state[layer.weight], self._bias(self.state, layer)
        value = layer.map(h, weight, bias)
        if not value.requires_grad:
            value.requires_grad_()
        error = self._of_product(layer, h.detach())
        self.taps.append((value, error))
        for node in layer.steps:
            value, error = self._step(layer, node, value, error)
        return value

    def _bias(self, state: State, layer: AffineLayer) -> Tensor | None:
        return state[layer.bias] if layer.bias else None

    @torch.no_grad()
    def _of_product(self, layer: AffineLayer, h: Tensor) -> Tensor:
        """Returns n (|W| |h| + |b|): roundings of a product times their size."""
        bias = self._bias(self.sizes, layer)
        size = layer.map(
            h.abs(), self.sizes[layer.weight].abs(), None if bias is None else bias.abs()
        )
        # On a swing the output layer reads what is live at either end.
        if layer.kind == "linear" and layer is not self.chain.layers[-1]:
            return size * ((h != 0).sum(1, keepdim=True) + _BESIDE)
        if layer.kind == "linear":
            return size * (self.chain.widths[-2] * layer.block + _BESIDE)
        return size * (self.sizes[layer.weight][0].numel() + _BESIDE)

    def _step(
        self, layer: AffineLayer, node: Node, value: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Applies a step after the affine map; returns its value and the size of its own error."""
        before = value.detach()
        tensors = [self.state[key] for key in node.entries]
        if node.op in ACTIVATIONS:
            return self._activation(node, value, error)
        value = node.run([value], tensors, len(value))
        if node.op == "batch_norm":
            error = _OF_NORM * self._of_norm(layer, before)
            self.taps.append((value, error))
        elif node.op in ("avg_pool2d", "adaptive_avg_pool2d"):
            count = min(pooled_numbers(node), float(before[0, 0].numel()))
            error = (count + 2) * node.run([before.abs()], [], len(before)).abs()
            self.taps.append((value, error))
        else:
            error = node.run([error], [], len(error))
        return value, error

    @torch.no_grad()
    def _of_norm(self, layer: AffineLayer, x: Tensor) -> Tensor:
        norm = layer.norm
        assert norm is not None
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale = torch.ones((), dtype=x.dtype, device=x.device)
        x = x.abs()
        if norm.mean is not None:
            x = x + self.state[norm.mean].abs().view(shape)
        if norm.var is not None:
            scale = scale / (self.state[norm.var] + norm.eps).sqrt()
        if norm.weight is not None:
            scale = scale * self.state[norm.weight].abs()
        bias = 0.0 if norm.bias is None else self.state[norm.bias].abs().view(shape)
        return x * (scale.view(shape) if scale.dim() else scale) + bias

    def _activation(self, node: Node, value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        bounds = bounds_of(node)
        assert bounds is not None
        with torch.no_grad():
            reach = error * (_KINK * UNIT_ROUNDOFF[value.dtype])
            near = value.abs() <= reach
            for kink in bounds.kinks:
                near |= (value - kink).abs() <= reach
        output = _Activation.apply(value, node, near, bounds.slope)
        size = torch.zeros_like(value)
        if not bounds.exact:
            size = _OF_ACTIVATION * (value.detach().abs() + output.detach().abs() + 1)
            self.taps.append((output, size))
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


def _restricted(chain: LayerChain, state: State, live: list[Tensor]) -> dict[str, Tensor]:
    """Returns the weights of live units alone."""
    found: dict[str, Tensor] = {}
    for layer, below, units in zip(chain.layers, live, live[1:]):
        for key in layer.incoming():
            rows = state[key].detach()[units.to(state[key].device)]
            found[key] = rows if key != layer.weight else layer.select(rows, below)
    return found
