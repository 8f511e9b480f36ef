"""Begins a subnetwork with trained weights: the network's own layer, then the subnetwork above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import Subnetwork


def first_layer_of(
    chain: LayerChain, state: Mapping[str, Tensor], kept: Tensor, above: Subnetwork
) -> Subnetwork:
    """Builds S_l from the network's own layer l+1 between kept units, followed by S_{l+1}.

    The loss then begins near that of S_{l+1}: equal to it where layer l+1 has no norm and S_{l+1}
    finds room for all the units that it reads.

    Args:
        chain: the architecture.
        state: the network's weights.
        kept: I_l.
        above: S_{l+1}, on I_{l+1}.
    """
    entry = above.entry - 1
    layer = chain.layer(entry + 1)
    # As many of the units that the subnetwork above reads as have room beside it.
    count = min(len(above.kept), chain.widths[entry + 1] - len(above.kept))
    units = above.kept[:count]
    own = layer.select(state[layer.weight][units], kept)
    bias = None if layer.bias is None else state[layer.bias][units]
    following = chain.layer(entry + 2).select(above.weights[0], torch.arange(count))
    weights, biases = (own, following, *above.weights[1:]), (bias, *above.biases)
    return _norm_folded(chain, state, units, Subnetwork(entry, kept, weights, biases))


def input_subnetwork(
    chain: LayerChain, state: Mapping[str, Tensor], above: Subnetwork
) -> Subnetwork | None:
    """Builds S_0 for nothing: the network's first layer on the units that S_1 reads, then S_1.

    S_0 reads all inputs, so its function is that of S_1, to rounding.

    Args:
        above: S_1 of this network.

    Returns:
        None where layer 1 has no room for those units twice, or a norm that cannot be folded into
        a layer without a bias.
    """
    layer = chain.layer(1)
    whole = 2 * len(above.kept) <= layer.units
    foldable = layer.norm is None or (
        layer.bias is not None and layer.norm.mean is not None and layer.steps[0].op == "batch_norm"
    )
    if not (whole and foldable):
        return None
    return first_layer_of(chain, state, torch.arange(chain.widths[0]), above)


def _norm_folded(
    chain: LayerChain, state: Mapping[str, Tensor], units: Tensor, sub: Subnetwork
) -> Subnetwork:
    """Folds the batch norm of the first layer into its weights, since subnetworks have no norms.

    This is exact where the norm follows the affine map at once; elsewhere the norm is left out.
    """
    layer = chain.layer(sub.entry + 1)
    norm = layer.norm
    if norm is None or norm.mean is None or norm.var is None or layer.steps[0].op != "batch_norm":
        return sub
    scale = torch.rsqrt(state[norm.var][units] + norm.eps)
    if norm.weight is not None:
        scale = scale * state[norm.weight][units]
    shift = -state[norm.mean][units] * scale
    if norm.bias is not None:
        shift = shift + state[norm.bias][units]
    weight = sub.weights[0] * scale.view(-1, *[1] * (sub.weights[0].dim() - 1))
    bias = sub.biases[0]
    # A convolution without a bias cannot take the shift: training makes up for it.
    if bias is not None:
        bias = bias * scale + shift
    return replace(sub, weights=(weight, *sub.weights[1:]), biases=(bias, *sub.biases[1:]))
