"""Guards a captured graph: proves, with no forward pass, that a module still is what was captured.

A graph is a function of the inputs and of the state dict; everything else that a forward reads was
fixed when it was captured. The guard is a snapshot of all that: attributes of every submodule and
what they hold, tensors outside of the state dict bit for bit, hooks, the code of the forwards,
class attributes, and the global names and closures that this code reads. Two snapshots are compared
exactly, not by a tolerance. Values of parameters and of buffers in the state dict are no part of
it: the path brings its own.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What every module has and no forward reads: its tensors and children are walked apart, a capture
# sets `training` itself, and hooks of state dicts and of backward passes are no part of a forward.
_NOT_READ = frozenset(
    (
        "_parameters _buffers _modules training _backward_hooks _backward_pre_hooks "
        "_is_full_backward_hook _state_dict_hooks _state_dict_pre_hooks "
        "_load_state_dict_pre_hooks _load_state_dict_post_hooks"
    ).split()
)
_INSTALLED = (
    f"{os.sep}site-packages{os.sep}",
    f"{os.sep}dist-packages{os.sep}",
    sysconfig.get_paths()["stdlib"] + os.sep,
)
_PLAIN = (
    int,
    str,
    bytes,
    bool,
    type(None),
    complex,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)

Atom = Any


@functools.cache
def _installed(module: str) -> bool:
    """Whether a module is PyTorch's, Python's own or an installed package's.

    Their code does not change while a process runs, so only the user's is looked into: a model of
    transformers would lead through most of that library.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or any(part in file for part in _INSTALLED)


class Guard:
    """A snapshot of what a module's forward reads besides its inputs and its state dict.

    Args:
        module: as it was captured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._atoms = [_kept(atom) for atom in _atoms(module)]

    def holds(self, module: nn.Module) -> bool:
        """Whether the module's forward reads the same now."""
        count = 0
        for count, atom in enumerate(_atoms(module), 1):
            if count > len(self._atoms) or not _equal(self._atoms[count - 1], atom):
                return False
        return count == len(self._atoms)


def _kept(atom: Atom) -> Atom:
    """Tensors and arrays may be changed in place: a copy."""
    if isinstance(atom, Tensor):
        return atom.detach().clone()
    return atom.copy() if isinstance(atom, np.ndarray) else atom


def _equal(one: Atom, other: Atom) -> bool:
    if type(one) is not type(other) and not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if isinstance(one, Tensor):
        same_kind = (
            one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        )
        return same_kind and _bits_equal(one, other.detach())
    if isinstance(one, np.ndarray):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return bool(same_kind and one.tobytes() == other.tobytes())
    same: bool = one == other
    return same


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return not one.is_floating_point() or torch.equal(torch.signbit(one), torch.signbit(other))
    # NaN is not equal to itself: the same bits are the same value all the same.
    if not one.is_floating_point() or not bool(one.isnan().any()):
        return False
    return bool(torch.equal(one.isnan(), other.isnan())) and torch.equal(
        one.nan_to_num(0.0), other.nan_to_num(0.0)
    )


def _atoms(module: nn.Module) -> Iterator[Atom]:
    """What a forward reads, flat and in a fixed order."""
    walk = _Walk()
    yield from walk.module(module)


class _Walk:
    """Walks objects once each; what is met again stands for its number."""

    def __init__(self) -> None:
        # By id; the objects are kept alive, so that no other gets an id of theirs meanwhile.
        self._seen: dict[int, tuple[int, Any]] = {}

    def _known(self, value: Any) -> int | None:
        found = self._seen.get(id(value))
        if found is None:
            self._seen[id(value)] = (len(self._seen), value)
            return None
        return found[0]

    def module(self, module: nn.Module) -> Iterator[Atom]:
        """A module: its class, tensors' kinds, children and attributes."""
        number = self._known(module)
        if number is not None:
            yield ("again", number)
            return
        if isinstance(module, torch.jit.ScriptModule):  # compiled: its code is that object's
            yield ("script", type(module), _Identity(getattr(module, "_c", module)))
            return
        yield ("module", type(module))
        yield from self._class(type(module))
        persistent = [
            name for name in module._buffers if name not in module._non_persistent_buffers_set
        ]
        saved = {**module._parameters, **{name: module._buffers[name] for name in persistent}}
        for name, tensor in saved.items():
            yield ("state", name, self._kind(tensor))
        for name in module._non_persistent_buffers_set:
            yield ("buffer", name)
            yield from self.value(module._buffers.get(name))
        for name, child in module._modules.items():
            yield ("child", name)
            yield from self.value(child)
        for name, value in vars(module).items():
            # A dict of hooks that is empty is as good as none: most are.
            if name not in _NOT_READ and not (name.endswith("_hooks") and not value):
                yield ("attribute", name)
                yield from self.value(value)

    def _kind(self, tensor: Tensor | None) -> tuple[Any, ...] | None:
        """All of a parameter but its values; its number shows what is tied."""
        if tensor is None:
            return None
        return tuple(tensor.shape), tensor.dtype, tensor.device, self._known(tensor)

    def value(self, value: Any) -> Iterator[Atom]:
        """Anything that an attribute, a closure or a global name may hold."""
        if isinstance(value, _PLAIN):
            yield (type(value), value)
        elif isinstance(value, float):
            yield (float, struct.pack("d", value))
        elif isinstance(value, nn.Module):
            yield from self.module(value)
        elif (number := self._known(value)) is not None:
            yield ("again", number)
        elif isinstance(value, (Tensor, np.ndarray)):
            yield value
        elif isinstance(value, Mapping):
            yield (type(value), len(value))
            for key, item in value.items():
                yield from self.value(key)
                yield from self.value(item)
        elif isinstance(value, (list, tuple)):
            yield (type(value), len(value))
            for item in value:
                yield from self.value(item)
        elif isinstance(value, (set, frozenset)):
            yield (type(value), frozenset(map(repr, value)))
        else:
            yield from self._object(value)

    def _object(self, value: Any) -> Iterator[Atom]:
        if isinstance(value, functools.partial):
            yield ("partial",)
            yield from self.value([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            yield ("method",)
            yield from self.value([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, type):
            yield ("class", value)
            yield from self._class(value)
        elif isinstance(value, types.ModuleType) or not hasattr(value, "__dict__"):
            # Nothing of it can be seen: the object itself, which the snapshot keeps alive.
            yield _Identity(value)
        else:
            yield ("object", type(value))
            yield from self.value(vars(value))

    def _class(self, kind: type) -> Iterator[Atom]:
        """The code and attributes of the user's classes; those of PyTorch's are fixed."""
        for base in kind.__mro__:
            if base is object or _installed(base.__module__) or self._known(base) is not None:
                continue
            for name, value in vars(base).items():
                if name.startswith("__") and name not in ("__init__", "__call__"):
                    continue
                function = getattr(value, "__func__", getattr(value, "fget", value))
                yield ("member", name)
                yield from self.value(function)

    def _function(self, function: types.FunctionType) -> Iterator[Atom]:
        """A function: its code, defaults, closure, and the global names that it reads."""
        yield ("function", function.__code__)
        if _installed(function.__module__ or ""):
            return
        yield from self.value(function.__defaults__)
        yield from self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            yield from self.value(_contents(cell))
        for name in _names(function.__code__):
            if name in function.__globals__:
                yield ("global", name)
                yield from self._global(function.__globals__[name])

    def _global(self, value: Any) -> Iterator[Atom]:
        """A global: classes and modules stand for themselves, as the import made them."""
        if isinstance(value, (type, types.ModuleType)):
            yield _Identity(value)
        else:
            yield from self.value(value)


class _Identity:
    """Equal to the same object alone, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: Any) -> list[str]:
    """The global names that a code object reads, those of functions inside it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = [*code.co_names]
    for constant in inner:
        names += _names(constant)
    return names
