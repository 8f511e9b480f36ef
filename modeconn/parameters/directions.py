"""Directions that span a plane: random ones, and the principal components of a trajectory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError
from modeconn.parameters.comparison import tied
from modeconn.parameters.state import State, load
from modeconn.parameters.wrappers import unwrapped

_STATISTICS = ("running_mean", "running_var")


def principal_plane(
    states: Sequence[State], centre: int, fixed: frozenset[str] = frozenset()
) -> tuple[State, State, np.ndarray, np.ndarray]:
    """Find the principal components of checkpoints around one of them (Li et al. 2018, sec. 7.2).

    The components are those of the differences to the centre, over all parameters; norms' running
    statistics follow along but do not count. That takes the n × n matrix of products of n
    checkpoints, and never one of the size of the parameters.

    Returns:
        Two directions of length 1, at right angles; the checkpoints' coordinates [n, 2]; the share
        of the sum of squared distances that each direction explains, [2].

    Raises:
        ModeconnError: the checkpoints lie on one line, or at one point.
    """
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    moving = {key: value for key, value in states[centre].items() if key not in fixed}
    for key, base in moving.items():
        if base.is_floating_point() and not key.endswith(_STATISTICS):
            differences = [state[key].double() - base.double() for state in states]
            rows = torch.stack([each.flatten().cpu() for each in differences])
            gram += rows @ rows.t()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
    total = float(values.clamp_min(0).sum())
    if not total or float(values[1]) <= 1e-12 * total:
        raise ModeconnError(
            f"the {len(states)} checkpoints lie on one line: "
            "expected a trajectory that spans a plane"
        )
    weights = vectors[:, :2] / values[:2].sqrt()
    places = gram @ weights
    # an eigenvector's sign is anyone's choice: fix it
    sign = torch.where(places[int(centre == 0)] < 0, -1.0, 1.0)
    weights, places = weights * sign, places * sign
    u, v = (_combined(states, centre, weights[:, i], moving) for i in range(2))
    return u, v, places.numpy(), (values[:2] / total).numpy()


def _combined(states: Sequence[State], centre: int, weights: Tensor, moving: State) -> State:
    """Return Σ_i weights[i] · (states[i] - states[centre]) for the entries that move."""
    direction = {}
    for key, base in moving.items():
        if base.is_floating_point():
            total = torch.zeros(base.shape, dtype=torch.float64)
            for weight, state in zip(weights.tolist(), states):
                total += weight * (state[key].double() - base.double()).cpu()
            direction[key] = total.to(base)
    return direction


class RandomDirections:
    """Draws directions, scaled to a network (Li et al. 2018, section 4).

    Args:
        base: the network.
        norm: "filter", "layer" or None: the norms of the network that the direction's are set to.
        biases: whether vectors have a direction, too.
        module: the architecture, of which parameters alone move, those that it ties together; None
            where it is unknown: then all but norms' running statistics move.
    """

    def __init__(
        self, base: State, norm: str | None, biases: bool, module: nn.Module | None = None
    ) -> None:
        self._norm = norm
        moving, self._ties = None, {}
        if module is not None:
            moving = _parameters_of(unwrapped(module))
            self._ties = {name: first for first, name in tied(load(module))}
        self._base = {
            key: value
            for key, value in base.items()
            if value.is_floating_point()
            and (value.dim() > 1 or biases)
            and (not key.endswith(_STATISTICS) if moving is None else key in moving)
            and not bool(value.isinf().any())  # a mask
        }
        # Tensors by the memory that they lie in: tied weights, or views of one tensor, are several.
        self._sharing = Counter(_memory(value) for value in self._base.values())

    def draw(self, generator: torch.Generator) -> State:
        """Draw a direction from a generator on the CPU; names that share memory have one draw."""
        direction: State = {}
        of_first: State = {}  # by the first of the names that the module ties
        drawn: dict[tuple[object, ...], Tensor] = {}
        for key, value in self._base.items():
            first = self._ties.get(key, key)
            if first not in of_first:
                of_first[first] = self._drawn(value, drawn, generator)
            direction[key] = of_first[first]
        return direction

    def _drawn(
        self, value: Tensor, drawn: dict[tuple[object, ...], Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw a tensor's direction.

        Args:
            value: the network's tensor.
            drawn: what was drawn for memory that several tensors lie in, as they do.
            generator: of the random numbers.
        """
        memory = _memory(value)
        if self._sharing[memory] == 1:
            return self._scaled(value, generator).to(value)
        if memory not in drawn:
            size = value.untyped_storage().nbytes() // value.element_size()
            drawn[memory] = torch.full((size,), math.nan, dtype=torch.float64)
        part = drawn[memory].as_strided(value.shape, value.stride(), value.storage_offset())
        new = part.isnan()
        if new.any():  # what another name has drawn stays
            part[new] = self._scaled(value, generator)[new]
        return part.to(value)

    def _scaled(self, value: Tensor, generator: torch.Generator) -> Tensor:
        d = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        w, norm = value.detach().double().cpu(), self._norm
        if norm == "layer" or (norm == "filter" and w.dim() <= 1):
            d *= w.norm() / d.norm().clamp_min(1e-10)
        elif norm == "filter":
            axes = tuple(range(1, w.dim()))
            norms = [torch.linalg.vector_norm(v, dim=axes, keepdim=True) for v in (w, d)]
            d *= norms[0] / norms[1].clamp_min(1e-10)
        return d


def _parameters_of(module: nn.Module) -> frozenset[str]:
    """The names in a module's state that are parameters, or share memory with one."""
    named = dict(module.named_parameters(remove_duplicate=False))
    memory = {parameter.untyped_storage().data_ptr() for parameter in named.values()} - {0}
    return frozenset(
        name
        for name, value in load(module).items()
        if name in named or value.untyped_storage().data_ptr() in memory
    )


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.dtype, tensor.untyped_storage().data_ptr() or id(tensor)
