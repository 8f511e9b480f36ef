"""Guards a captured graph: proves, with no forward pass, that a module still is what was captured.

A graph is a function of the inputs and of the state dict; everything else that a forward reads was
fixed when it was captured. The guard is a snapshot of all that, as `fingerprints.Walk` finds it:
attributes of every submodule and what they hold, tensors outside of the state dict bit for bit,
hooks, the code of the forwards, class attributes, and the global names and closures that this code
reads. Two snapshots are compared exactly, not by a tolerance. Values of parameters and of buffers
in the state dict are no part of it: the path brings its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.files.fingerprints import Atom, Unseen, Walk, Weight


class Guard:
    """A snapshot of what a module's forward reads besides its inputs and its state dict.

    Args:
        module: as it was captured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._atoms = [_kept(_without_values(atom)) for atom in Walk().network(module)]

    def holds(self, module: nn.Module) -> bool:
        """Whether the module's forward reads the same now."""
        return _same(self._atoms, Walk().network(module))


def alike(one: Any, other: Any) -> bool:
    """Whether two objects are made of the same."""
    return _same(map(_without_values, Walk().value(one)), Walk().value(other))


def _same(kept: Iterable[Any], atoms: Iterable[Atom]) -> bool:
    return all(_equal(one, _without_values(atom)) for one, atom in zip_longest(kept, atoms))


def _without_values(atom: Atom) -> Any:
    """A parameter or saved buffer is all but its values."""
    if not isinstance(atom, Weight):
        return atom
    return tuple(atom.tensor.shape), atom.tensor.dtype, atom.tensor.device


def _kept(atom: Any) -> Any:
    """Tensors and arrays may be changed in place: a copy."""
    if isinstance(atom, Tensor):
        return atom.detach().clone()
    return atom.copy() if isinstance(atom, np.ndarray) else atom


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = (
            one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        )
        return same_kind and _bits_equal(one.detach(), other.detach())
    if type(one) is not type(other):
        return False
    if isinstance(one, Unseen):
        return one.value is other.value
    if isinstance(one, np.ndarray):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return bool(same_kind and one.tobytes() == other.tobytes())
    same: bool = one == other
    return same


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    if one.device.type == "meta":
        return True
    if torch.equal(one, other):
        return not one.is_floating_point() or torch.equal(torch.signbit(one), torch.signbit(other))
    # NaN is not equal to itself: the same bits are the same value all the same.
    if not one.is_floating_point() or not bool(one.isnan().any()):
        return False
    return bool(torch.equal(one.isnan(), other.isnan())) and torch.equal(
        one.nan_to_num(0.0), other.nan_to_num(0.0)
    )
