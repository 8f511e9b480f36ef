"""Graphs captured earlier, for the next use of the same module.

Exporting a network takes a good part of a second. A graph is kept with its module and belongs to
one kind of computation (dtype, device, inputs). It is used again only while a guard proves, without
running the module, that its forward reads what it read then (capture/guard.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modeconn.capture.graph import Graph
from modeconn.capture.guard import Guard
from modeconn.capture.optimisations import current
from modeconn.capture.rows import rows_are_independent
from modeconn.capture.trial import Runner
from modeconn.data.inputs import Inputs, keys, leaves, rows
from modeconn.parameters.forking import Lock

# Whether samples mix, of a graph, the parameters and buffers, and a batch.
Mixes = Callable[[Graph, "dict[str, Tensor]", Inputs], bool]


@dataclass
class _Known:
    """A graph, what proves it, and the largest batch that was searched for samples that mix."""

    guard: Guard
    graph: Graph
    proved: bool
    searched: int = 0


_GRAPHS: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Known]] = weakref.WeakKeyDictionary()
_LOCK = Lock()


def graph_for(runner: Runner, x: Inputs, captured: Callable[[], Graph], mixes: Mixes) -> Graph:
    """Returns the graph of a module in eval mode for inputs of some kind.

    Args:
        x: a batch of inputs.
        captured: captures the module anew.
        mixes: looks for samples that depend on each other in a batch, where nothing is proved.
    """
    with _LOCK:  # one module is captured once, whoever asks for it
        graphs = _GRAPHS.setdefault(runner.model, {})
        kind = _kind(runner, x)
        known = _found(runner.model, kind) if current().reuse else None
        if known is not None:
            graphs[kind] = known
        else:
            guard = Guard(runner.model)
            graph = captured()
            known = graphs[kind] = _Known(guard, graph, rows_are_independent(graph))
        if not known.proved and not known.graph.mixes_rows and rows(x) > known.searched:
            known.searched = rows(x)
            with torch.no_grad():
                mixed = not known.graph.random and mixes(known.graph, runner.state(), x)
            known.graph = replace(known.graph, mixes_rows=mixed)
        return known.graph


def guard_of(runner: Runner, x: Inputs) -> Guard | None:
    """The guard of the graph that a module has for inputs of some kind.

    It is that of the module's state when the graph was last given out.
    """
    with _LOCK:
        known = _GRAPHS.get(runner.model, {}).get(_kind(runner, x))
        return None if known is None else known.guard


def is_known(runner: Runner, x: Inputs) -> bool:
    """Whether a module was captured before, or a copy of it, for inputs of some kind."""
    with _LOCK:
        return _found(runner.model, _kind(runner, x)) is not None


def _found(model: nn.Module, kind: Hashable) -> _Known | None:
    """Keeps what is known of a module, or of one that reads the same: a copy, in most cases.

    A graph with parts that run as they are belongs to its module alone: those are modules, too.
    """
    own = _GRAPHS.get(model, {}).get(kind)
    if own is not None and own.guard.holds(model):
        return own
    for other, graphs in list(_GRAPHS.items()):
        known = graphs.get(kind)
        if known is None or other is model or type(other) is not type(model):
            continue
        if not known.graph.fallback and not known.graph.closed and known.guard.holds(model):
            return replace(known, searched=0)  # with these weights rows are looked at again
    return None


def _kind(runner: Runner, x: Inputs) -> Hashable:
    """The computation that a graph is for: dtype and device of the module, and the inputs."""
    inputs = tuple((key, v.dtype, v.device, *v.shape[1:]) for key, v in zip(keys(x), leaves(x)))
    return runner.dtype, runner.device, type(x), inputs
