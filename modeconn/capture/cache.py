"""Graphs captured earlier, for the next use of the same module.

Exporting a network takes a good part of a second, checking a graph some milliseconds. A graph is
kept with its module and belongs to one kind of computation (dtype, device, inputs). It is used
again only while the module has the structure that was exported, and only if it still gives the
module's own outputs: modules change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from modeconn.capture.graph import Graph
from modeconn.data.inputs import Inputs, keys, leaves

# The modules that copies were made of. A copy, in another dtype or on another device, lives for one
# evaluation only: its graphs are kept with the original.
_ORIGINALS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = (
    weakref.WeakKeyDictionary()
)
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Hashable, Graph]]] = (
    weakref.WeakKeyDictionary()
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def remember_copy(copy: nn.Module, original: nn.Module) -> None:
    """Notes that a module is a copy, whose graphs are those of the original."""
    _ORIGINALS[copy] = weakref.ref(original)


def graph_for(
    model: nn.Module,
    x: Inputs,
    holds: Callable[[Graph], bool],
    export: Callable[[], Graph],
) -> Graph:
    """Returns the graph of a module in eval mode for inputs of some kind.

    Args:
        model: the module, or a copy of it.
        holds: whether a graph gives the module's own outputs.
        export: captures the module anew.
    """
    original = _ORIGINALS[model]() if model in _ORIGINALS else model
    known = {} if original is None else _GRAPHS.setdefault(original, {})
    kind, structure = _kind(model, x), structure_of(model)
    if kind in known:
        exported, graph = known.pop(kind)
        if exported == structure and holds(graph):
            known[kind] = structure, graph
            return graph
    graph = export()
    # What runs as it is calls the module that it was exported from: a copy would go out of date.
    closed = bool(graph.closed) and model is not original
    if graph.fallback is None and not closed:
        known[kind] = structure, graph
    return graph


def _kind(model: nn.Module, x: Inputs) -> Hashable:
    """The computation that a graph is for: dtypes and devices of the module, and the inputs."""
    tensors = [*model.parameters(), *model.buffers()]
    inputs = tuple((key, v.dtype, v.device, *v.shape[1:]) for key, v in zip(keys(x), leaves(x)))
    return frozenset((v.dtype, v.device) for v in tensors), inputs


def structure_of(model: nn.Module) -> Hashable:
    """Everything about a module that can change its graph, as far as it can be compared.

    Submodules by name and class, their settings (numbers, strings, functions, nested as they may
    be), their hooks, the shapes of their tensors. Training flags are left out, since networks are
    captured in eval mode, and so are the values of tensors.
    """
    return tuple(
        (name, type(module), tuple(_settings(module))) for name, module in model.named_modules()
    )


def _settings(module: nn.Module) -> Iterator[Hashable]:
    for key, value in vars(module).items():
        if key in _HOOKS:
            yield key, tuple(map(_frozen, value.values()))
        elif key in ("_parameters", "_buffers") or (key != "training" and not key.startswith("_")):
            yield key, _frozen(value)


def _frozen(value: Any) -> Hashable:
    """A value that is equal for equal settings; for objects of other kinds, their class alone."""
    if value is None or isinstance(value, bool | int | float | str | bytes | complex):
        return type(value), value
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return dict, tuple((str(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_frozen, value))
    # A function is itself in a copy of its module, too; a method is bound to the copy.
    function = getattr(value, "__func__", value)
    return type(value), id(function) if hasattr(function, "__code__") else None
