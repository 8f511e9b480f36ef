"""The graph of a captured network: the planner reads it, and the backends run it.

A graph is a list of nodes in execution order. A node applies one operation to the values of earlier
nodes, to *entries* (parameters and buffers, by their state-dict names) and to plain Python
constants. Its arguments are kept as a template with three kinds of leaves, so that a backend can
fill in tensors of its choice, for any number of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.capture.signature import call

# Rows of a block, for averages over its rows.
_BLOCK = 64


@dataclass(frozen=True)
class In:
    """Leaf: the node's i-th input value."""

    index: int


@dataclass(frozen=True)
class Entry:
    """Leaf: the node's i-th entry (parameter or buffer)."""

    index: int


@dataclass(frozen=True)
class Size:
    """Leaf: a size that depends on the number of rows; `of` computes it."""

    of: Callable[[int], int]
    text: str

    def __str__(self) -> str:
        return self.text


Dim = int | Size


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        id: its position in the graph.
        op: the operation's name, which selects its rule (plan/rules/table.py); operations without a
            rule still run.
        function: computes the value from the filled template.
        arguments: the template, by the names of the function's schema and in its order, defaults
            included: Python constants, `In`, `Entry` and `Size` leaves, in nested lists and tuples.
            PyTorch calls the first tensor `input` (linear, convolutions, norms) or `self` (most
            others).
        inputs: ids of the nodes whose values it takes.
        entries: names of the parameters and buffers it takes.
        shape: of its value; the batch axis and what follows from it are `Size`.
        source: the module and line it comes from.
        batched: whether the value depends on the input batch (False: on parameters and buffers
            alone).
        random: whether it draws random numbers.
    """

    id: int
    op: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    inputs: tuple[int, ...] = ()
    entries: tuple[str, ...] = ()
    shape: tuple[Dim, ...] = ()
    source: str = ""
    batched: bool = True
    random: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def first(self) -> Any:
        """The first argument: the tensor that the operation is about, for most operations."""
        return next(iter(self.arguments.values()))

    def run(self, values: Sequence[Tensor], entries: Sequence[Tensor], rows: int) -> Any:
        """The node's value from its inputs' values, its entries' tensors and the number of rows."""
        filled = {name: _fill(leaf, values, entries, rows) for name, leaf in self.arguments.items()}
        return call(self.function, filled)

    def numel(self) -> float:
        """The value's numbers per row, on average over a block of rows."""
        return self._numel

    @functools.cached_property
    def _numel(self) -> float:
        total = math.prod(d.of(_BLOCK) if isinstance(d, Size) else d for d in self.shape)
        return total / _BLOCK if self.batched else total


def _fill(leaf: Any, values: Sequence[Tensor], entries: Sequence[Tensor], rows: int) -> Any:
    """Fills tensors and sizes into a template.

    It is no closure: one that calls itself would keep the tensors until garbage is collected.
    """
    if isinstance(leaf, In):
        return values[leaf.index]
    if isinstance(leaf, Entry):
        return entries[leaf.index]
    if isinstance(leaf, Size):
        return leaf.of(rows)
    if isinstance(leaf, (list, tuple)):
        return type(leaf)([_fill(item, values, entries, rows) for item in leaf])
    return leaf


@dataclass(frozen=True)
class Graph:
    """A captured network.

    Attributes:
        nodes: in execution order; the first are the inputs.
        output: template of the network's output, with `In(node id)` leaves.
        constants: tensors that are not in the state dict (lifted constants, buffers that are not
            persistent).
        fallback: why the network could not be captured and runs as one opaque node; None if it was
            captured.
        closed: the parts of it that could not be captured and run as they are, each with its
            reason.
        takes: the only number of rows that the network runs on, 0 for any; others are cut or filled
            up.
        mixes_rows: whether a row's output depends on the other rows of its batch.
        inputs: per input None if it is the only one, else its place or its name.
        random: whether two runs of the network give different outputs.
        example: the network's output for a few rows, on the meta device: shapes and dtypes alone.
    """

    nodes: tuple[Node, ...]
    output: Any
    constants: dict[str, Tensor]
    fallback: str | None = None
    closed: tuple[str, ...] = ()
    takes: int = 0
    mixes_rows: bool = False
    inputs: tuple[Any, ...] = (None,)
    random: bool = False
    example: Any = None

    def given(self, inputs: Any) -> list[Tensor]:
        """The tensors of a batch of inputs, one for each of the graph's input nodes."""
        return [inputs if key is None else inputs[key] for key in self.inputs]

    @property
    def tensor_output(self) -> int | None:
        """The id of the node that is the output; None where it is a tuple, dict or the like."""
        return self.output.index if isinstance(self.output, In) else None

    def only_logits(self) -> Graph:
        """The graph whose output is the logits alone, where they are a part of the output."""
        logits = None if self.fallback else getattr(self.output, "logits", None)
        return replace(self, output=logits) if isinstance(logits, In) else self

    def before_log_softmax(self) -> Graph:
        """The graph without a last log_softmax over classes [N, C].

        The cross-entropy of its output is the same.
        """
        last = None if self.tensor_output is None else self.nodes[self.tensor_output]
        if (
            last is None
            or last.op != "log_softmax"
            or len(last.shape) != 2
            or last["self"] != In(0)
            or last["dim"] not in (1, -1)
            or last["dtype"] is not None
        ):
            return self
        return replace(self, output=In(last.inputs[0]))

    def outputs(self) -> list[int]:
        """Ids of all nodes that the output is made of."""
        return [leaf.index for leaf in pytree.tree_leaves(self.output) if isinstance(leaf, In)]

    def fill_output(self, values: Mapping[int, Any]) -> Any:
        """The output's structure with node values in place of its leaves."""
        return pytree.tree_map(
            lambda leaf: values[leaf.index] if isinstance(leaf, In) else leaf, self.output
        )
