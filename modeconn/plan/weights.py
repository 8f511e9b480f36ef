"""Contents of the control points: which tensors are equal, which weights are zero.

The planner asks the same questions of the same tensors for every segment, so the answers are
remembered here. Equality is decided by content, not by object: two checkpoints that share a layer's
values share its work. Most tensors need no pass over their numbers: sixteen of them tell that two
tensors differ, or that one is not zero, and a few rows that all columns have weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modeconn.parameters.groups import Blocks
from modeconn.parameters.state import State

# How many numbers of a tensor are looked at before all are, and how many of its rows.
_SAMPLE, _ROWS = 16, 4
_NUMPY = frozenset((torch.float32, torch.float64, torch.int64, torch.int32, torch.bool))
# Along each axis of a tensor, the kept indices, or None for all of them.
Cut = tuple["np.ndarray | None", ...]


def cut_key(cut: Cut) -> tuple[bytes | None, ...]:
    """A hashable form of a cut."""
    return tuple(None if index is None else index.tobytes() for index in cut)


class Contents:
    """The control points' tensors, numbered by content.

    Args:
        control_points: K state dicts.
        constants: tensors that no control point has; they keep their dtype.
        dtype, device: what to compute with; tensors that differ are converted once.
        frozen: entries that stay those of the first control point.
        by_content: False for tensors that are to be differentiated, or to change while the plan is
            in use: then a weight that is zero still counts, and only one and the same tensor is
            equal.
        blocks: of entries with coefficients of their own, if the path has such. The control points
            here are then those of each block alone, with zeros for all other entries: number
            b · K + k is block b of control point k.
    """

    def __init__(
        self,
        control_points: Sequence[State],
        constants: State,
        dtype: torch.dtype,
        device: torch.device,
        frozen: frozenset[str] = frozenset(),
        by_content: bool = True,
        blocks: Blocks | None = None,
    ) -> None:
        self.by_content, self._blocks = by_content, blocks
        self._zero: dict[tuple[int, ...], Tensor] = {}  # by shape
        self._points = control_points
        self._constants, self._frozen = constants, frozen
        self._dtype, self._device = dtype, device
        # Further control points: differences of two, as (one, the other) by their number.
        self._differences: dict[int, tuple[int, int]] = {}
        self._numbers_of: dict[tuple[int, int], int] = {}
        self._subtracted: dict[tuple[str, int], Tensor] = {}
        # id of the source → the source (kept alive), converted
        self._converted: dict[int, tuple[Tensor, Tensor]] = {}
        self._cuts: dict[tuple[int, tuple[bytes | None, ...]], Tensor] = {}
        # id of the tensor → its number, and the tensor (kept alive)
        self._numbers: dict[int, tuple[int, Tensor]] = {}
        # sample → tensors with different contents
        self._alike: dict[tuple[object, ...], list[Tensor]] = {}
        self._supports: dict[tuple[int, int], np.ndarray] = {}
        self._zeros: dict[int, bool] = {}
        self._infinite: dict[str, bool] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, k: int, cut: Cut = ()) -> Tensor:
        """Returns parameter or buffer `name` of control point k, cut down.

        Equal contents give the same object.
        """
        whole = self._whole(name, k)
        if all(index is None for index in cut):
            return whole
        key = (id(whole), cut_key(cut))
        if key not in self._cuts:
            self._cuts[key] = self.unique(self._part(whole, cut))
        return self._cuts[key]

    def is_fixed(self, name: str) -> bool:
        """Whether an entry is one tensor at every point of every path.

        So are constants, what is frozen, and what is not floating point. Coefficients do not apply
        to it: those of the first control point are 1 and all others 0, whatever they sum to.
        """
        if name in self._constants or name in self._frozen:
            return True
        return not self._points[0][name].is_floating_point()

    @property
    def apart(self) -> bool:
        """Whether entries have coefficients of their own."""
        return self._blocks is not None

    @property
    def blocks(self) -> int:
        """The number of blocks of entries with coefficients of their own."""
        return 1 if self._blocks is None else 1 + max(self._blocks.of.values())

    def block_of(self, k: int) -> int:
        """Return the block that a control point, or a difference of two, belongs to."""
        return self._differences.get(k, (k, k))[0] // len(self._points)

    def moves_with(self, name: str, k: int) -> bool:
        """Whether control point k is one of those that an entry is made of."""
        if self._blocks is None:
            return True
        return not self.is_fixed(name) and self._blocks.of[name] == self.block_of(k)

    def is_infinite(self, name: str) -> bool:
        """Whether a fixed entry has infinite numbers."""
        if name not in self._infinite:
            whole = self._whole(name, 0)
            self._infinite[name] = whole.is_floating_point() and bool(whole.isinf().any())
        return self._infinite[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer, whole."""
        if name not in self._shapes:
            self._shapes[name] = tuple(self._whole(name, 0).shape)
        return self._shapes[name]

    def difference(self, k: int, base: int) -> int:
        """Returns the number of the further control point that is control point k minus another."""
        key = (k, base)
        if key not in self._numbers_of:
            number = self.blocks * len(self._points) + len(self._differences)
            self._numbers_of[key], self._differences[number] = number, key
        return self._numbers_of[key]

    def _whole(self, name: str, k: int) -> Tensor:
        if k in self._differences and not self.is_fixed(name):
            return self._difference(name, k)
        if name in self._constants:
            source, dtype = self._constants[name], self._constants[name].dtype
        elif not self.is_fixed(name) and not self.moves_with(name, k):
            return self._zeros_of(tuple(self._points[0][name].shape))
        else:
            source = self._points[0 if self.is_fixed(name) else k % len(self._points)][name]
            dtype = self._dtype if source.is_floating_point() else source.dtype
        if id(source) not in self._converted:
            given = source.detach() if self.by_content else source
            self._converted[id(source)] = (source, self.unique(given.to(self._device, dtype)))
        return self._converted[id(source)][1]

    def _zeros_of(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._zero:
            zero = torch.zeros((), dtype=self._dtype, device=self._device)
            self._zero[shape] = self.unique(zero.expand(shape))
        return self._zero[shape]

    def _difference(self, name: str, number: int) -> Tensor:
        if not self.moves_with(name, number):
            return self._zeros_of(tuple(self._points[0][name].shape))
        if (name, number) not in self._subtracted:
            k, base = (each % len(self._points) for each in self._differences[number])
            # In float64, which holds the difference of two float32 numbers but for rare ones.
            difference = self._points[k][name].detach().double() - self._points[base][name].double()
            whole = self.unique(difference.to(self._device, self._dtype))
            self._subtracted[name, number] = whole
        return self._subtracted[name, number]

    def _part(self, tensor: Tensor, cut: Cut) -> Tensor:
        for axis, index in enumerate(cut):
            if index is not None:
                tensor = tensor.index_select(axis, torch.from_numpy(index).to(self._device))
        return tensor

    def number(self, tensor: Tensor) -> int:
        """The content's number, of a tensor that came from here."""
        return self._numbers[id(tensor)][0]

    def is_zero(self, tensor: Tensor) -> bool:
        """Whether all of the tensor's numbers are zero."""
        if not self.by_content:
            return False
        if id(tensor) not in self._zeros:
            self._zeros[id(tensor)] = not any(_sample(tensor)) and not bool(tensor.any())
        return self._zeros[id(tensor)]

    def support(self, tensor: Tensor, axis: int) -> np.ndarray:
        """Whether each index along an axis has a non-zero weight anywhere, bool."""
        if not self.by_content:
            return np.ones(tensor.shape[axis], bool)
        key = (id(tensor), axis)
        if key not in self._supports:
            self._supports[key] = _support(tensor, axis)
        return self._supports[key]

    def unique(self, tensor: Tensor) -> Tensor:
        """Numbers a tensor; returns the one tensor that stands for its content."""
        if id(tensor) in self._numbers:
            return self._numbers[id(tensor)][1]
        if not self.by_content:
            self._numbers[id(tensor)] = (len(self._numbers), tensor)
            return tensor
        alike = self._alike.setdefault((tensor.shape, tensor.dtype, _sample(tensor)), [])
        for other in alike:
            if torch.equal(tensor, other):
                return other
        alike.append(tensor)
        self._numbers[id(tensor)] = (len(self._numbers), tensor)
        return tensor


def _sample(tensor: Tensor) -> tuple[float, ...]:
    """Sixteen of the numbers, which are equal for equal contents."""
    step = max(1, tensor.numel() // _SAMPLE)
    if tensor.device.type == "cpu" and tensor.dtype in _NUMPY:
        return tuple(tensor.detach().numpy().flat[: step * _SAMPLE : step].tolist())
    return tuple(tensor.detach().reshape(-1)[: step * _SAMPLE : step].cpu().tolist())


def _support(tensor: Tensor, axis: int) -> np.ndarray:
    """Whether each index along an axis has a number that is not zero."""
    others = [d for d in range(tensor.dim()) if d != axis]
    if not others:
        return (tensor != 0).cpu().numpy()
    longest = max(others, key=lambda d: tensor.shape[d])
    # In a dense weight a few rows say it all; where they do not, the columns in question do.
    live = _nonzero(tensor.narrow(longest, 0, min(_ROWS, tensor.shape[longest])), others)
    if live.all() or tensor.shape[longest] <= _ROWS:
        return live
    rest = np.flatnonzero(~live)
    index = torch.from_numpy(rest).to(tensor.device)
    live[rest] = _nonzero(tensor.index_select(axis, index), others)
    return live


def _nonzero(tensor: Tensor, others: list[int]) -> np.ndarray:
    live: np.ndarray = (tensor != 0).any(dim=others).cpu().numpy()
    return live
