"""Walks what objects are made of, alike for digests and for guards.

A callable or a module is what its classes, the code of the user's functions, their defaults,
closures and global values, its attributes and its tensors are. `Walk` yields all of that, flat and
in a fixed order. A digest of it is alike in every process, and decides what can be resumed; a guard
(capture/guard.py) compares it, and decides whether a captured graph still is the module's. Code of
installed packages stands for itself by its name.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(...))
# Objects without attributes whose text tells all that they are.
_TOLD = (
    range,
    slice,
    PurePath,
    np.generic,
    np.dtype,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    types.BuiltinFunctionType,
    type(len),
)
# What PyTorch keeps beside a module's own attributes. Its tensors and children are walked apart,
# and forward hooks, too; no forward reads the rest. A LightningModule has its trainer, which holds
# the data and the history of the run.
TRAINERS = ("_trainer", "_fabric")
_BOOKKEEPING = frozenset([*vars(nn.Module()), *TRAINERS])
# Instructions that look a name up among a function's globals; classes within do it by the second.
_READS_GLOBAL = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
# Hooks of a forward, and by their number which of them are called in another way.
_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
_INSTALLED = (
    f"{os.sep}site-packages{os.sep}",
    f"{os.sep}dist-packages{os.sep}",
    sysconfig.get_paths()["stdlib"] + os.sep,
)


def digest_of(value: Any, weights: bool = True) -> str:
    """Return the digest of a callable, a module or any nest of plain values.

    An object that counts or caches leaves that out by its ``__getstate__``, as for pickling.

    Args:
        value: the object; it is only looked at.
        weights: whether the values of modules' parameters and persistent buffers count, or only
            their names and shapes.
    """
    found = hashlib.sha256()
    for atom in Walk(as_pickled=True).value(value):
        for part in _encoded(atom, weights):
            found.update(part)
            found.update(b"\0")
    return found.hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name: names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()


def digest_of_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a table of JSON values, but for its entry "digest"."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, in row-major order."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    if not len(values):  # of which a view may have no stride to speak of
        return memoryview(b"")
    return values.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Weight:
    """A parameter or persistent buffer, whose values may be another's: a path brings its own."""

    tensor: Tensor


@dataclass(frozen=True)
class Unseen:
    """An object that cannot be looked into; it is known by itself in a process."""

    value: Any


# What a walk yields: text, code, tensors and arrays with their values, and those above.
Atom = str | bytes | Tensor | np.ndarray | Weight | Unseen


def _encoded(atom: Atom, weights: bool) -> Iterator[bytes | memoryview]:
    """The parts of a digest that an atom is."""
    if isinstance(atom, str):
        yield atom.encode()
    elif isinstance(atom, bytes):
        yield atom
    elif isinstance(atom, np.ndarray):
        yield f"array {atom.dtype} {atom.shape}".encode()
        yield atom.tobytes()
    elif isinstance(atom, Unseen):
        # Addresses do not count.
        shown = repr(atom.value)
        text = str(atom.value) if " at 0x" in shown or shown.startswith("<") else shown
        yield f"{_name(type(atom.value))} {'' if ' at 0x' in text else text}".encode()
    else:
        tensor = atom.tensor if isinstance(atom, Weight) else atom
        yield f"tensor {tensor.dtype} {list(tensor.shape)}".encode()
        counts = weights or not isinstance(atom, Weight)
        if counts and tensor.layout == torch.strided and tensor.device.type != "meta":
            yield raw_bytes(tensor)


@functools.cache
def _installed(module: str) -> bool:
    """Whether a module is ours, Python's own or an installed package's: names mean one code.

    It does not change while a process runs, so only the user's is looked into: a model of
    transformers would lead through most of that library.
    """
    if module == "__main__":  # the user's script, or text without a file
        return False
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or any(part in file for part in _INSTALLED)


def is_known_by_name(value: Any) -> bool:
    """Whether the name of a function or class says all of it: installed, and made once."""
    return _installed(value.__module__ or "") and "<" not in value.__qualname__


class Walk:
    """Walks objects once each; what is met again stands for its number.

    Args:
        as_pickled: whether an object is what its ``__getstate__`` says, or all of its attributes.
    """

    def __init__(self, as_pickled: bool = False) -> None:
        self._as_pickled = as_pickled
        # By id; the objects are kept alive, so that no other gets an id of theirs meanwhile.
        self._seen: dict[int, tuple[int, Any]] = {}

    def _again(self, value: Any) -> int | None:
        """The number of an object that was met before; others get the next one."""
        found = self._seen.get(id(value))
        if found is None:
            self._seen[id(value)] = (len(self._seen), value)
            return None
        return found[0]

    def value(self, value: Any) -> Iterator[Atom]:
        """Anything that an attribute, a closure or a global name may hold."""
        if isinstance(value, _PLAIN):
            yield f"{type(value).__name__} {value!r}"
        elif (number := self._again(value)) is not None:
            yield f"again {number}"
        elif isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object):
            yield value
        elif isinstance(value, nn.Module):
            # `eval()` of a network reaches the modules that are registered in it, and no others.
            yield from self._module(value, with_mode=True)
        elif isinstance(value, Mapping):
            yield f"{_name(type(value))} {len(value)}"
            for key in value:
                yield from self.value(key)
                yield from self.value(value[key])
        elif isinstance(value, (list, tuple)):
            yield f"{_name(type(value))} {len(value)}"
            for item in value:
                yield from self.value(item)
        elif isinstance(value, (set, frozenset)):
            yield f"set {sorted(map(repr, value))}"
        else:
            yield from self._object(value)

    def network(self, module: nn.Module) -> Iterator[Atom]:
        """A network whose mode is set before it is used."""
        self._again(module)
        yield from self._module(module, with_mode=False)

    def _module(self, module: nn.Module, with_mode: bool) -> Iterator[Atom]:
        """A module: its class, entries, children, attributes and hooks.

        Args:
            module: the module.
            with_mode: whether `training` counts, since `eval()` does not reach it.
        """
        yield f"module {_name(type(module))}"
        if isinstance(module, torch.jit.ScriptModule):  # compiled: its code is that object's
            yield str(getattr(module, "code", ""))
            yield Unseen(getattr(module, "_c", module))
            return
        yield from self._class(type(module))
        with_mode = with_mode or _has_own_mode(module)
        if with_mode:
            yield f"training {module.training}"
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            kept = name not in module._non_persistent_buffers_set
            yield f"entry {name} {kept}"
            if tensor is not None:
                number = self._again(tensor)  # it shows what is tied
                yield (Weight(tensor) if kept else tensor) if number is None else f"again {number}"
        for name, child in module._modules.items():
            yield f"child {name}"
            if child is None or (number := self._again(child)) is not None:
                yield "none" if child is None else f"again {number}"
            else:
                yield from self._module(child, with_mode)
        for name, value in attributes_of(module).items():
            yield f"attribute {name}"
            yield from self.value(value)

    def _object(self, value: Any) -> Iterator[Atom]:
        if isinstance(value, functools.partial):
            yield "partial"
            yield from self.value([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            yield "method"
            yield from self.value([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.CodeType):
            yield "code"
            yield value.co_code
            yield from self.value([*value.co_consts, *value.co_names, *value.co_freevars])
        elif isinstance(value, type):
            yield f"class {_name(value)}"
            yield from self._class(value)
        elif isinstance(value, types.ModuleType):
            yield f"import {value.__name__}"
        elif (text := _told(value)) is not None:
            yield f"{_name(type(value))} {text}"
        elif (state := self._state(value)) is None:
            yield Unseen(value)
        else:
            yield f"object {_name(type(value))}"
            yield from self._class(type(value))
            yield from self.value(state)

    def _state(self, value: Any) -> Any:
        """Return what an object is made of; None where that cannot be seen."""
        if not hasattr(value, "__dict__"):
            slots = list(itertools.chain.from_iterable(map(_slots, type(value).__mro__)))
            return {name: getattr(value, name, None) for name in slots} if slots else None
        # every object has one since Python 3.11
        getstate = getattr(value, "__getstate__", None) if self._as_pickled else None
        try:
            return vars(value) if getstate is None else getstate()
        except Exception:  # a lock or a stream, which has no state to compare
            return None

    def _class(self, kind: type) -> Iterator[Atom]:
        """The code and attributes of the user's classes; those of packages are fixed."""
        for base in kind.__mro__:
            if base is object or is_known_by_name(base) or self._again(base) is not None:
                continue
            for name, member in sorted(vars(base).items()):
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(function, types.FunctionType) or not name.startswith("__"):
                    yield f"member {name}"
                    yield from self.value(function)

    def _function(self, function: types.FunctionType) -> Iterator[Atom]:
        """A function: its code, defaults, closure, and the global names that it reads."""
        yield f"function {function.__module__}.{function.__qualname__}"
        if is_known_by_name(function):
            return
        yield from self.value(function.__code__)
        yield from self.value([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            yield from self.value(_contents(cell))
        if _installed(function.__module__ or ""):
            return
        for name in sorted(_names(function.__code__) & set(function.__globals__)):
            yield f"global {name}"
            yield from self.value(function.__globals__[name])


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module keeps besides tensors and children: attributes and forward hooks.

    A hook comes with what it is called with, and without its number, which counts all hooks of a
    process.
    """
    found = {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING}
    for name, marks in _HOOKS.items():
        hooks = vars(module).get(name)
        if hooks:
            ways = [vars(module).get(mark, {}) for mark in marks]
            found[name] = []
            for key, hook in hooks.items():
                found[name].append((hook, *(key in way for way in ways)))
    return found


def _has_own_mode(module: nn.Module) -> bool:
    """Whether `eval()` may leave a module, or those in it, in training mode."""
    own, kind = vars(module), type(module)
    replaced = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return replaced or "train" in own or "eval" in own


def _told(value: Any) -> str | None:
    """The text of an object that says all of it; None for any other."""
    if not isinstance(value, _TOLD) and type(value).__module__ != "torch._ops":
        return None
    text = repr(value)
    if text.startswith("<"):
        text = str(value)
    return None if " at 0x" in text else text


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if name not in ("__weakref__", "__dict__")]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The global names that a code object reads, those of functions inside it included.

    Names of attributes are none: a global that bears the same one may be anything.
    """
    names = {i.argval for i in dis.get_instructions(code) if i.opname in _READS_GLOBAL}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return frozenset(names)
