"""Reuse of captured graphs between tests: torch.export takes most of the suite's time.

A graph that was captured for one module is offered to another of equal architecture: equal types,
attributes, hooks, and shapes of parameters and buffers, called with equal kinds of inputs. It is
accepted under the condition that the library holds its own captures to: it gives the module's
outputs, for the rows together and apart. What is not understood completely is captured anew.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture import export
from modeconn.capture.graph import Graph
from modeconn.data.inputs import Inputs, keys, leaves

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Compared by identity; the table of graphs keeps them alive, so that an identity stays unique.
NAMED = (type, types.FunctionType, types.BuiltinFunctionType)
HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs"))]
OWN = {*HOOKS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
OWN |= {name for name in vars(nn.Module()) if name.endswith(("_always_called", "_pre_hook"))}


class Unknown(Exception):
    """A module has something whose equality cannot be told."""


def value_key(value: Any) -> object:
    """A hashable stand-in that is equal for equal attributes."""
    if isinstance(value, PLAIN):
        return type(value), repr(value)
    if isinstance(value, NAMED):
        return value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(value_key, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(value_key, value))
    if hasattr(value, "to_dict"):  # the configuration of one of transformers' models
        return type(value), value_key(value.to_dict())
    if isinstance(value, dict):
        return type(value), tuple((value_key(k), value_key(v)) for k, v in value.items())
    raise Unknown(type(value).__name__)


def tensor_key(value: Tensor | None) -> object:
    """The kind of a tensor, without its values."""
    if value is None:
        return None
    kind = (type(value), value.dtype, value.device, tuple(value.shape), value.stride())
    return *kind, value.requires_grad


def module_key(model: nn.Module) -> object:
    """A hashable stand-in that is equal for modules of equal architecture.

    Raises:
        Unknown: a module has hooks, or attributes that are more than plain values.
    """
    parts: list[object] = []
    seen: dict[int, int] = {}  # shared modules and tied tensors are a part of the architecture
    for name, module in model.named_modules(remove_duplicate=False):
        if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):
            raise Unknown(f"hooks of {name}")
        own = {k: v for k, v in vars(module).items() if k not in OWN}
        parts.append((name, type(module), seen.setdefault(id(module), len(seen)), value_key(own)))
        for key, value in module._parameters.items():
            parts.append((key, tensor_key(value), seen.setdefault(id(value), len(seen))))
        for key, value in module._buffers.items():
            parts.append((key, tensor_key(value), seen.setdefault(id(value), len(seen))))
            if value is not None and key in module._non_persistent_buffers_set:
                parts.append(tuple(value.flatten().tolist()))  # the graph holds its values
    return tuple(parts)


def input_key(x: Inputs) -> object:
    """The kinds of the inputs, without their values and the number of rows: a graph takes any."""
    kinds = tuple((v.dtype, v.device, *v.shape[1:]) for v in leaves(x))
    return type(x), tuple(keys(x)), kinds


class Reuse:
    """Stands in for the library's capture of a module that it has no graph of yet."""

    def __init__(self, captured: Callable[[nn.Module, Inputs, Any], Graph]) -> None:
        self.captured = captured
        self.graphs: dict[object, Graph] = {}
        self.on = True
        self.reused = 0

    def __call__(self, model: nn.Module, x: Inputs, expected: Any) -> Graph:
        try:
            key = (module_key(model), input_key(x)) if self.on else None
        except Unknown:
            key = None
        known = self.graphs.get(key) if key else None
        if known is not None:
            try:
                graph = export._checked(known, model, x, expected)
            except Exception:  # not this module's graph after all
                del self.graphs[key]
            else:
                self.reused += 1
                return graph
        graph = self.captured(model, x, expected)
        # What runs as it is belongs to this module alone.
        if key and graph.fallback is None and not graph.closed:
            self.graphs[key] = graph
        return graph

    @contextmanager
    def off(self) -> Iterator[None]:
        """Capture anew, as the tests of capture must."""
        before, self.on = self.on, False
        yield
        self.on = before
