"""Pairs of small networks, and their losses along a line by plain float64 passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(20) % 3
T = [0.0, 0.3, 1.0]


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(1)
    return first, make()


def right(make: Callable[[], nn.Module], a: dict[str, Tensor], b: dict[str, Tensor]) -> np.ndarray:
    """The loss of a fresh float64 network at each point, loaded before eval()."""
    losses = []
    for t in T:
        network = make().double()
        network.load_state_dict(
            {
                k: (1 - t) * v.double() + t * b[k].double() if v.is_floating_point() else v
                for k, v in a.items()
            }
        )
        with torch.no_grad():
            losses.append(float(F.cross_entropy(network.eval()(X.double().clone()), Y)))
    return np.array(losses)
