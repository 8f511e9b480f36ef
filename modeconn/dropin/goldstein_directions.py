"""Directions of Goldstein's surfaces: drawn, between networks, read, written, and as a path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.dropin import surface_file as files
from modeconn.errors import ModeconnError
from modeconn.parameters.planes import Plane
from modeconn.parameters.state import State, load
from modeconn.parameters.subspace import Subspace
from modeconn.parameters.wrappers import unwrapped

NORMS = ("", "filter", "layer", "weight", "dfilter", "dlayer")
IGNORES = ("", "biasbn")
DIR_TYPES = ("weights", "states")
# What keeps a filter of zeros from a division by zero.
_TINY = 1e-10

# A direction: a tensor or array for each parameter, or entry of the state dict, in order.
Direction = Sequence[Any]


def create_random_direction(
    net: nn.Module,
    dir_type: str = "weights",
    ignore: str = "biasbn",
    norm: str = "filter",
    *,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Draw a Gaussian direction and scale it to a network (Li et al. 2018, section 4).

    Args:
        net: the network.
        dir_type: "weights" for a tensor per parameter, "states" for one per entry of the state
            dict, norms' running statistics among them.
        ignore: "biasbn" for zeros where a tensor has one dimension or none; "" for the network's
            own values there.
        norm: what tensors of more dimensions are scaled to: "filter" gives each row the norm of the
            network's, "layer" each tensor, "weight" multiplies by the network's values, "dfilter"
            and "dlayer" give each row or tensor norm 1, "" leaves them as drawn.
        generator: of the draws, on the CPU; by default PyTorch's own, as in the original, so that
            the same seed and the same draws before give the same direction.

    Raises:
        ModeconnError: an argument is none of these.
    """
    one_of("norm", norm, NORMS)
    one_of("ignore", ignore, IGNORES)
    direction = []
    for _, value in entries(net, dir_type):
        w = value.detach().cpu()
        drawn = torch.randn(w.shape, generator=generator)
        if w.dim() <= 1:
            drawn = torch.zeros_like(drawn) if ignore == "biasbn" else w.to(drawn)
        else:
            _scale(drawn, w.to(drawn), norm)
        direction.append(drawn)
    return direction


def create_target_direction(
    net: nn.Module, net2: nn.Module, dir_type: str = "states"
) -> list[Tensor]:
    """Return the direction from one network to another.

    Args:
        net: the network at 0.
        net2: the one at 1.
        dir_type: "weights" for a tensor per parameter, "states" for one per entry of the state
            dict, norms' running statistics among them.

    Raises:
        ModeconnError: the networks' tensors differ in number or shape.
    """
    one, other = [*entries(net, dir_type)], [*entries(net2, dir_type)]
    if _shapes(one) != _shapes(other):
        raise ModeconnError(
            f"the networks have {len(one)} and {len(other)} {dir_type} of differing shapes: "
            "expected two of one architecture"
        )
    return [(b - a).detach().cpu() for (_, a), (_, b) in zip(one, other)]


def write_directions(file: str | os.PathLike[str], directions: Sequence[Direction]) -> None:
    """Write one or two directions into a file of groups `xdirection` and `ydirection`.

    Raises:
        ModeconnError: another number of directions; h5py is not installed.
    """
    files.write_directions(file, [list(map(_array, axis)) for axis in directions])


def load_directions(
    dir_file: str | os.PathLike[str], net: nn.Module | None = None
) -> list[list[np.ndarray]]:
    """Read the one or two directions of a file.

    Args:
        dir_file: the file.
        net: the network that they are to fit; None to read any.

    Raises:
        ModeconnError: it is no such file, or of another model; h5py is not installed.
    """
    if net is None:
        return files.read_directions(dir_file)
    shapes = {kind: _shapes(entries(net, kind)) for kind in DIR_TYPES}
    return files.read_directions(dir_file, shapes)


def path_along(
    origin: nn.Module | State,
    directions: Sequence[Direction],
    dir_type: str = "weights",
    net: nn.Module | None = None,
) -> Plane | Subspace:
    """Return the path origin + x·d, or the plane origin + x·d + y·e.

    Args:
        origin: the network at 0, a module or a state dict.
        directions: one or two.
        dir_type: "weights" where they have a tensor per parameter, "states" where they have one per
            entry of the state dict. Integers do not move.
        net: the architecture, where the origin is a state dict.

    Raises:
        ModeconnError: a direction does not fit the network.
    """
    if net is None:
        if not isinstance(origin, nn.Module):
            raise ModeconnError("net is missing: expected the architecture, beside a state dict")
        net = origin
    names = [(name, value) for name, value in entries(net, dir_type)]
    states = [state_of(net, names, direction, dir_type) for direction in directions]
    if len(states) == 2:
        return Plane(load(origin), *states)
    return Subspace(load(origin), states)


def entries(net: nn.Module, dir_type: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors that a direction has a tensor for."""
    one_of("dir_type", dir_type, DIR_TYPES)
    net = unwrapped(net)
    yield from net.named_parameters() if dir_type == "weights" else net.state_dict().items()


def state_of(
    net: nn.Module,
    entries: Sequence[tuple[str, Tensor]],
    direction: Direction,
    dir_type: str,
) -> State:
    """Return a direction as a state dict; names of one parameter have one tensor."""
    if len(direction) != len(entries):
        raise ModeconnError(
            f"a direction has {len(direction)} tensors: expected {len(entries)}, one for each of "
            f"the {dir_type} of {type(net).__name__}"
        )
    state: State = {}
    by_id = {}
    for (name, value), given in zip(entries, direction):
        tensor = torch.as_tensor(_array(given))
        if tensor.shape != value.shape:
            raise ModeconnError(
                f"a direction has shape {list(tensor.shape)} for {name!r}: expected "
                f"{list(value.shape)}"
            )
        if value.is_floating_point():
            state[name] = by_id[id(value)] = tensor.to(value)
    for name, parameter in unwrapped(net).named_parameters(remove_duplicate=False):
        if id(parameter) in by_id:
            state[name] = by_id[id(parameter)]
    return state


def _array(given: Any) -> np.ndarray:
    if isinstance(given, Tensor):
        return given.detach().cpu().numpy()
    return np.asarray(given)


def _scale(drawn: Tensor, w: Tensor, norm: str) -> None:
    """Scale a direction of two or more dimensions in place."""
    axes = tuple(range(1, w.dim()))
    if norm in ("filter", "dfilter"):
        lengths = torch.linalg.vector_norm(drawn, dim=axes, keepdim=True) + _TINY
        wanted = torch.linalg.vector_norm(w, dim=axes, keepdim=True) if norm == "filter" else 1.0
        drawn.mul_(wanted / lengths)
    elif norm in ("layer", "dlayer"):
        drawn.mul_((w.norm() if norm == "layer" else 1.0) / drawn.norm())
    elif norm == "weight":
        drawn.mul_(w)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        expected = ", ".join(repr(each) for each in allowed)
        raise ModeconnError(f"{name} is {value!r}: expected one of {expected}")


def _shapes(named: Iterable[tuple[str, Tensor]]) -> list[list[int]]:
    return [list(value.shape) for _, value in named]
