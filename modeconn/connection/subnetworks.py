"""Subnetworks S_l: networks from kept features h_l[I_l] of an entry layer l to the outputs.

They are those of Nguyen, Bréchet, Mondelli 2021, Theorem 4.1. A *shallow* one has its readout below
the network's last layer; `carry` takes its logits to the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeconn.connection.layer_chain import AffineLayer, LayerChain
from modeconn.errors import ModeconnError

# Activations whose difference at z and -z is a multiple of z.
_CARRYING = ("relu", "leaky_relu", "gelu", "silu", "softplus", "hardswish")


@dataclass(frozen=True)
class Subnetwork:
    """A network on the kept units of one entry layer of a chain.

    Attributes:
        entry: l, the layer whose features it reads; 0 is the input.
        kept: I_l, the units that it reads, int64 [k], rising.
        weights: of layers l+1, l+2, …; the last is the readout [C, …]. The layers in between are
            followed by the chain's own steps (activation, pooling, …) without norms.
        biases: of the same layers; None where the chain's layer has none.
    """

    entry: int
    kept: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of units of its hidden layers: m_{l,l+1}, …"""
        return tuple(len(weight) for weight in self.weights[:-1])

    @property
    def parameters(self) -> int:
        """Numel of all weights and biases."""
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases) if tensor is not None)

    def to(self, like: Tensor) -> Subnetwork:
        """Converts it to another tensor's dtype and device."""
        biases = tuple(None if bias is None else bias.to(like) for bias in self.biases)
        return replace(
            self,
            kept=self.kept.to(like.device),
            weights=tuple(w.to(like) for w in self.weights),
            biases=biases,
        )


def full_depth(chain: LayerChain, sub: Subnetwork) -> bool:
    """Whether its readout is the chain's own last layer."""
    return sub.entry + len(sub.weights) == chain.length


def restrict(chain: LayerChain, entry: int, h: Tensor, kept: Tensor) -> Tensor:
    """Selects the kept units of h_l: [N, k, …], or [N, k · block] where channels are flattened."""
    layer = chain.layer(entry + 1)
    if len(kept) == chain.widths[entry]:
        return h
    return layer.select(h, kept)


def outputs(chain: LayerChain, sub: Subnetwork, h: Tensor) -> Tensor:
    """Computes logits [N, C] of a subnetwork from h_l [N, n_l, …] of all units."""
    return outputs_of_kept(chain, sub, restrict(chain, sub.entry, h, sub.kept))


def outputs_of_kept(chain: LayerChain, sub: Subnetwork, h: Tensor) -> Tensor:
    """Computes logits [N, C] of a subnetwork from the kept features alone."""
    last = len(sub.weights) - 1
    for index, (weight, bias) in enumerate(zip(sub.weights, sub.biases)):
        layer = chain.layer(sub.entry + 1 + index)
        inner = index < last or layer.index == chain.length
        h = layer.apply(h, weight, bias) if inner else layer.map(h, weight, bias)
    return h


def check_entry(chain: LayerChain, entry: int) -> None:
    """Raises unless there is such an entry layer."""
    if not 0 <= entry < chain.length:
        raise ModeconnError(
            f"entry layer {entry}: {chain.name} has entry layers 0 to {chain.length - 1}"
        )


def initial(
    chain: LayerChain, entry: int, kept: Tensor, widths: Sequence[int], generator: torch.Generator
) -> Subnetwork:
    """Draws new weights, normal with variance 2 / fan-in (He et al. 2015), and zero biases.

    Args:
        entry: the entry layer l.
        kept: I_l.
        widths: units of the hidden layers l+1, l+2, … before the readout, whose layer must be
            linear.
        generator: a CPU generator.
    """
    check_entry(chain, entry)
    readout = entry + 1 + len(widths)
    inside = readout < chain.length and chain.layer(readout).kind != "linear"
    if readout > chain.length or inside:
        raise ModeconnError(
            f"a subnetwork at entry layer {entry} with {len(widths)} hidden layers would have its "
            f"readout at layer {readout} of {chain.length}: it must be a linear layer, or the last"
        )
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    before = len(kept)
    for index, units in enumerate((*widths, chain.classes)):
        layer = chain.layer(entry + 1 + index)
        shape = _shape(layer, units, before)
        deviation = math.sqrt(2.0 / math.prod(shape[1:]))
        weights.append(torch.randn(shape, generator=generator) * deviation)
        biases.append(None if layer.bias is None else torch.zeros(units))
        before = units
    return Subnetwork(entry, kept, tuple(weights), tuple(biases))


def _shape(layer: AffineLayer, units: int, before: int) -> tuple[int, ...]:
    if layer.kind == "linear":
        return (units, before * layer.block)
    return (units, before, *layer.kernel)


def why_not_carried(chain: LayerChain, readout: int) -> str | None:
    """Says why logits of a layer cannot be carried to the top by identity; None if they can.

    Args:
        readout: the layer that gives the logits, from 1 to L.
    """
    for layer in chain.layers[readout - 1 : -1]:
        if layer.kind != "linear" or (layer.index > readout and layer.block != 1):
            return f"layer {layer.index} ({layer.weight}) is not a plain linear layer"
        if carrying_factor(layer) is None:
            return (
                f"layer {layer.index} ({layer.weight}) has the activation {layer.activation}, "
                f"which carries no numbers; {', '.join(_CARRYING)} do"
            )
        odd = [step.op for step in layer.steps if step.op not in (layer.activation, "batch_norm")]
        if odd:
            return f"layer {layer.index} ({layer.weight}) is followed by {odd[0]}"
    return None


def carrying_factor(layer: AffineLayer) -> float | None:
    """Returns κ with σ(z) - σ(-z) = κ z for a layer's activation σ and all z; None without one.

    κ is 1 for ReLU, GELU (both forms), SiLU, softplus and hardswish, whose σ(z) is z times a
    function g with g(z) + g(-z) = 1, or z plus an even function; 1 + slope for LeakyReLU.
    """
    if layer.activation not in _CARRYING:
        return None
    if layer.activation != "leaky_relu":
        return 1.0
    node = next(step for step in layer.steps if step.op == "leaky_relu")
    factor = 1.0 + float(node["negative_slope"])
    return factor if factor > 0 else None


def carry(chain: LayerChain, sub: Subnetwork) -> Subnetwork:
    """Carries the logits z of a shallow subnetwork to the top, which makes it one of full depth.

    They go up as (σ(z), σ(-z)), 2C units a layer, and come out as z = (σ(z) - σ(-z)) / κ. With ReLU
    the layers between are identities, as non-negative values pass unchanged; with other activations
    each makes (z, -z) again. This is exact for every input, but for rounding.

    Raises:
        ModeconnError: a layer above is no linear layer with an activation that carries numbers.
    """
    if full_depth(chain, sub):
        return sub
    readout = sub.entry + len(sub.weights)
    reason = why_not_carried(chain, readout)
    if reason is not None:
        raise ModeconnError(
            f"the subnetwork of entry layer {sub.entry} cannot be carried to the top by identity: "
            f"{reason}"
        )
    weight, bias = sub.weights[-1], sub.biases[-1]
    eye = torch.eye(chain.classes, dtype=weight.dtype, device=weight.device)
    weights = [*sub.weights[:-1], torch.cat([weight, -weight])]
    biases = [*sub.biases[:-1], None if bias is None else torch.cat([bias, -bias])]
    for below, layer in zip(chain.layers[readout - 1 :], chain.layers[readout:]):
        out = torch.cat([eye, -eye], 1) / (carrying_factor(below) or 1.0)
        if layer.index == chain.length:
            weights.append(out)
        elif below.activation == layer.activation == "relu":
            weights.append(torch.eye(2 * chain.classes).to(weight))
        else:
            weights.append(torch.cat([out, -out]))
        biases.append(None if layer.bias is None else weight.new_zeros(len(weights[-1])))
    return Subnetwork(sub.entry, sub.kept, tuple(weights), tuple(biases))


def kept_units(units: int, kept: float | int, generator: torch.Generator) -> Tensor:
    """Draws units to be kept, rising: a fraction of them (rounded, at least one), or a number."""
    count = kept if isinstance(kept, int) else round(kept * units)
    return torch.randperm(units, generator=generator)[: max(1, min(units, count))].sort().values
