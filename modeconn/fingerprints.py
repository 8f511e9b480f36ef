"""Digests of what decides an outcome: callables, modules and graphs, alike in every process.

Two objects of equal digests compute the same function: a digest covers classes, the code of the
user's functions, their defaults, closures and the global values that they read, attributes, and
tensors bit for bit. Code of installed packages stands for itself by its name. An object that counts
or caches leaves that out by its ``__getstate__``, as for pickling.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(...))
# What PyTorch keeps beside a module's tensors, children and own attributes; no forward reads it.
_TENSORS = ("_parameters", "_buffers", "_modules")
_BOOKKEEPING = frozenset(vars(nn.Module()))
_INSTALLED = (
    f"{os.sep}site-packages{os.sep}",
    f"{os.sep}dist-packages{os.sep}",
    sysconfig.get_paths()["stdlib"] + os.sep,
)


def digest_of(value: Any, weights: bool = True) -> str:
    """Return the digest of a callable, a module or any nest of plain values.

    Args:
        value: the object; it is only looked at.
        weights: whether the values of modules' parameters and persistent buffers count, or only
            their names and shapes.
    """
    found = hashlib.sha256()
    for atom in _Walk(weights).value(value):
        found.update(atom if isinstance(atom, bytes) else memoryview(atom))
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
    return values.view(torch.uint8).numpy().data


@functools.cache
def _installed(module: str) -> bool:
    """Whether a module is Python's own or an installed package's, whose names mean one code."""
    if module == "__main__":  # the user's script, or text without a file
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or any(part in file for part in _INSTALLED)


class _Walk:
    """Walks objects once each; what is met again stands for its number."""

    def __init__(self, weights: bool) -> None:
        self._weights = weights
        # By id; the objects are kept alive, so that no other gets an id of theirs meanwhile.
        self._seen: dict[int, tuple[int, Any]] = {}

    def value(self, value: Any) -> Iterator[bytes | memoryview]:
        """Anything that an attribute, a closure or a global name may hold."""
        if isinstance(value, _PLAIN):
            yield f"{type(value).__name__} {value!r}".encode()
            return
        number = self._seen.get(id(value))
        if number is not None:
            yield f"again {number[0]}".encode()
            return
        self._seen[id(value)] = (len(self._seen), value)
        if isinstance(value, Tensor):
            yield from self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            yield f"array {value.dtype} {value.shape}".encode()
            yield value.tobytes()
        elif isinstance(value, nn.Module):
            yield from self._module(value)
        elif isinstance(value, Mapping):
            yield f"{_name(type(value))} {len(value)}".encode()
            for key in value:
                yield from self.value(key)
                yield from self.value(value[key])
        elif isinstance(value, (list, tuple)):
            yield f"{_name(type(value))} {len(value)}".encode()
            for item in value:
                yield from self.value(item)
        elif isinstance(value, (set, frozenset)):
            yield f"set {sorted(map(repr, value))}".encode()
        else:
            yield from self._object(value)

    def _tensor(self, tensor: Tensor, values: bool = True) -> Iterator[bytes | memoryview]:
        yield f"tensor {tensor.dtype} {list(tensor.shape)}".encode()
        if values and tensor.layout == torch.strided and tensor.device.type != "meta":
            yield raw_bytes(tensor)

    def _module(self, module: nn.Module) -> Iterator[bytes | memoryview]:
        yield f"module {_name(type(module))}".encode()
        yield from self._class(type(module))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            kept = name not in module._non_persistent_buffers_set
            yield f"entry {name} {kept}".encode()
            if tensor is not None:
                yield from self._tensor(tensor, self._weights or not kept)
        for name, child in module._modules.items():
            yield f"child {name}".encode()
            yield from self.value(child)
        for name, value in vars(module).items():
            if name not in _BOOKKEEPING or name in ("_forward_hooks", "_forward_pre_hooks"):
                yield f"attribute {name}".encode()
                yield from self.value([*value.values()] if name in _BOOKKEEPING else value)

    def _object(self, value: Any) -> Iterator[bytes | memoryview]:
        if isinstance(value, functools.partial):
            yield b"partial"
            yield from self.value([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            yield b"method"
            yield from self.value([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.CodeType):
            yield b"code"
            yield value.co_code
            yield from self.value([*value.co_consts, *value.co_names, *value.co_freevars])
        elif isinstance(value, type):
            yield f"class {_name(value)}".encode()
            yield from self._class(value)
        elif isinstance(value, types.ModuleType):
            yield f"import {value.__name__}".encode()
        elif type(value).__module__.partition(".")[0] == "torch" or not hasattr(value, "__dict__"):
            # Dtypes, devices, operations and generators say what they are; addresses do not count.
            shown = repr(value)
            text = str(value) if " at 0x" in shown or shown.startswith("<") else shown
            yield f"{_name(type(value))} {'' if ' at 0x' in text else text}".encode()
        else:
            yield f"object {_name(type(value))}".encode()
            yield from self._class(type(value))
            yield from self.value(_state(value))

    def _class(self, kind: type) -> Iterator[bytes | memoryview]:
        """The code and plain attributes of the user's classes; those of packages are fixed."""
        for base in kind.__mro__:
            if base is object or _installed(base.__module__) or id(base) in self._seen:
                continue
            self._seen[id(base)] = (len(self._seen), base)
            for name, member in sorted(vars(base).items()):
                special = name.startswith("__") and name not in ("__init__", "__call__")
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if not special and isinstance(function, (types.FunctionType, *_PLAIN, Tensor)):
                    yield f"member {name}".encode()
                    yield from self.value(function)

    def _function(self, function: types.FunctionType) -> Iterator[bytes | memoryview]:
        yield f"function {function.__module__}.{function.__qualname__}".encode()
        if _installed(function.__module__ or ""):
            return
        yield from self.value(function.__code__)
        yield from self.value([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            yield from self.value(_contents(cell))
        for name in sorted(set(_names(function.__code__)) & set(function.__globals__)):
            yield f"global {name}".encode()
            yield from self.value(function.__globals__[name])


def _state(value: Any) -> Any:
    """What an object says its state is."""
    getstate = getattr(value, "__getstate__", None)  # every object has one since Python 3.11
    try:
        return vars(value) if getstate is None else getstate()
    except Exception:  # a lock or a stream, which has no state to compare
        return None


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _names(code: types.CodeType) -> list[str]:
    """The global names that a code object reads, those of functions inside it included."""
    names = [*code.co_names]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names
