"""Spectral norm's u and v, which are buffers but follow from the weight that they belong to.

A path blends them like weights, and what it gives is no pair of singular vectors: the norm that is
divided by comes out too small, layer after layer. Where u or v of a network is no unit vector, both
are computed anew from the weight; those of a trained network are its own and stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

# Power iteration leaves unit vectors up to rounding; the blend of two that differ is shorter by the
# square of their angle.
_UNIT = 1e-5


def has_spectral_norm(model: nn.Module) -> bool:
    """Whether any weight of a module is divided by its spectral norm."""
    return next(_pairs(model), None) is not None


def renew(model: nn.Module) -> None:
    """Computes u and v of every weight whose own are no unit vectors, in place."""
    for weight, u, v in _pairs(model):
        lengths = torch.stack([u.norm(), v.norm()])
        if bool(((lengths - 1).abs() > _UNIT).any()):
            left, _, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
            u.copy_(left[:, 0])
            v.copy_(right[0])


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each weight as a matrix, with its u and v."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight = getattr(module, f"{hook.name}_orig")
                vectors = (getattr(module, f"{hook.name}_{which}") for which in "uv")
                yield (hook.reshape_weight_to_matrix(weight), *vectors)
        if isinstance(module, ParametrizationList):
            for part in module:
                if isinstance(part, _SpectralNorm) and hasattr(part, "_u"):
                    yield part._reshape_weight_to_matrix(module.original), part._u, part._v
