"""Calls of a model as they were recorded: inputs, output, and what they depended on."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.data.inputs import Inputs, leaves

# Two runs of the same operations differ by the order of sums alone. So much of an output's largest
# number, by its dtype; a norm in training mode, or dropout, is further off than that.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class Call:
    """One call of the model within the function, at a point where it ran.

    Attributes:
        inputs: a copy of them.
        output: a copy of its tensors, detached, in the structure that the model returned.
        modes: the training modes of all modules.
        seconds: that the forward took.
        steady: whether it drew nothing, changed nothing, and ran with the point's own weights.
        differentiated: whether a gradient was taken through it.
    """

    inputs: Inputs
    output: Any
    modes: tuple[bool, ...]
    seconds: float
    steady: bool
    differentiated: bool = False

    @property
    def bytes_of_output(self) -> int:
        """Bytes of the output's tensors."""
        found = pytree.tree_leaves(self.output)
        return sum(leaf.nbytes for leaf in found if isinstance(leaf, Tensor))

    def repeats(self, other: Call) -> bool:
        """Whether both are the same call at two points, which can be answered at others."""
        return (
            self.steady
            and other.steady
            and not self.differentiated
            and not other.differentiated
            and self.modes == other.modes
            and same_inputs(self.inputs, other.inputs)
        )


def inputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
    """Return a call's arguments as inputs; None where they are not tensors with rows alone."""
    if args and kwargs:
        with contextlib.suppress(TypeError, ValueError):
            bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
            named = dict(list(bound.arguments.items())[1:])
            args, kwargs = (), named
    if (args and kwargs) or not all(map(_is_plain, [*args, *kwargs.values()])):
        return None
    given: Inputs = kwargs if kwargs else (args[0] if len(args) == 1 else args)
    found = leaves(given)
    rows = {len(tensor) if tensor.dim() else 0 for tensor in found}
    return given if len(rows) == 1 and rows != {0} else None


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def same_inputs(one: Inputs, other: Inputs) -> bool:
    """Whether two calls have the same arguments, number by number."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) != list(other):
        return False
    first, second = leaves(one), leaves(other)
    return (
        isinstance(one, Tensor) == isinstance(other, Tensor)
        and isinstance(one, dict) == isinstance(other, dict)
        and len(first) == len(second)
        and all(map(same_tensor, first, second))
    )


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one value of one kind, bit for bit or number by number."""
    return (
        one.dtype == other.dtype
        and one.device == other.device
        and one.shape == other.shape
        and _equal(one, other)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    bits = (
        _memcmp is not None
        and one.device.type == "cpu"
        and one.is_contiguous()
        and other.is_contiguous()
    )
    if not bits or not one.numel():
        return torch.equal(one, other)
    # three times as fast as torch.equal, which is felt where inputs are many
    return not _memcmp(one.data_ptr(), other.data_ptr(), one.nbytes)


def _compare_memory() -> Callable[[int, int, int], int] | None:
    """The C library's memcmp; None where there is none to be found."""
    try:
        found = ctypes.CDLL(None).memcmp
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    found.restype = ctypes.c_int
    return found


_memcmp: Any = _compare_memory()


def detached(output: Any) -> Any:
    """Return a copy of an output's tensors, in its structure."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


def agree(planned: Any, true: Any) -> bool:
    """Whether a planned output is the model's own, up to the order of sums."""
    ours, spec = pytree.tree_flatten(planned)
    theirs, expected = pytree.tree_flatten(true)
    return spec == expected and len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return not isinstance(other, Tensor) and type(one) is type(other) and bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if one.dtype not in _CLOSE:
        return torch.equal(one, other)
    differs = (one != other) & ~(one.isnan() & other.isnan())
    if not bool(differs.any()):
        return True
    finite = other[other.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    # where either is infinite or NaN and the other is not, the difference is, too
    return bool(((one - other).abs()[differs] <= _CLOSE[one.dtype] * scale).all())
