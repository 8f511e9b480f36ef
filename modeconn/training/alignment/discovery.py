"""Permutation symmetries of any module, found on its captured graph.

Each operation ties the axes of what it takes and returns (plan/rules/); what remains free can be
permuted. Units within a head, or within a group of channels, have a permutation for each head,
where nothing takes them together with those of another. No group is believed: random permutations
of all of them have to leave the network's function as it is, in float64 (proof.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.export import capture, prepare
from modeconn.capture.graph import Graph, Node
from modeconn.capture.trial import Runner, saved_tensors
from modeconn.data.inputs import moved
from modeconn.data.tensors import as_inputs
from modeconn.errors import Unsupported
from modeconn.parameters.comparison import tied
from modeconn.parameters.wrappers import unwrapped
from modeconn.plan.rules.axes import (
    Atom,
    Axis,
    Product,
    Sum,
    atoms,
    freeze,
    is_sliced,
    resolve,
    tie,
)
from modeconn.plan.rules.base import Axes, freeze_axes, own_axes
from modeconn.plan.rules.table import rule_of_axes
from modeconn.training.alignment.groups import Frozen, Group, Groups
from modeconn.training.alignment.layouts import layouts_of, names_of
from modeconn.training.alignment.proof import proved

# Ways to choose a part from each sum among a tensor's axes: with more of them no permutation in it
# is looked at for dependence on another.
_MOST_TERMS = 256
# How an operation that is called in an unforeseen way shows.
_UNFORESEEN = (Unsupported, ValueError, IndexError, KeyError)


def symmetries(model: nn.Module, sample: Any) -> Groups:
    """Find the permutations of a network's units that leave its function as it is.

    Args:
        model: any module; it is left as it was. Norms' running statistics are permuted with their
            channels, and tied weights stay tied.
        sample: a few rows of input, [N, …], as the model takes them.

    Returns:
        The groups of units, and what is frozen, with the operation that froze it. Print it.

    Raises:
        ModeconnError: the model does not run on the sample.
    """
    inputs = as_inputs(sample, "sample")
    state = saved_tensors(unwrapped(model))
    first = next((v for v in state.values() if v.is_floating_point()), torch.zeros(1))
    with torch.no_grad():
        runner = prepare(model, first.dtype, first.device)
        graph = capture(runner, moved(inputs, first.dtype, first.device))
        return proved(Runner(model, torch.float64), groups_of(graph, state), inputs)


def groups_of(graph: Graph, state: Mapping[str, Tensor]) -> Groups:
    """Return the groups of a captured network, as its operations have them."""
    axes = _Tied(graph, state)
    outer = axes.dependent()
    names = axes.names(outer)
    layouts = {
        name: layouts_of(found, names) for name, found in axes.entries.items() if name in state
    }
    for name, other in axes.aliases.items():
        layouts[name] = layouts[other]
    layouts = {name: found for name, found in layouts.items() if names_of(found)}
    values = {i: layouts_of(found, names) for i, found in axes.tensors_of_values()}
    free = [atom for atom in names if not atom.reason]
    groups = []
    for atom in free:
        within = outer.get(atom)
        groups.append(
            Group(
                names[atom],
                atom.size,
                None if within is None else names[within],
                1 if within is None else within.size,
                tuple(_places(layouts, names[atom])),
            )
        )
    return Groups(tuple(groups), tuple(axes.frozen()), layouts, values, graph)


def _places(layouts: Mapping[str, Any], group: str) -> Iterator[tuple[str, int]]:
    for entry, axes in layouts.items():
        for place, axis in enumerate(axes):
            if group in axis.names():
                yield entry, place


class _Tied:
    """The axes of a graph's values and entries, tied by its operations."""

    def __init__(self, graph: Graph, state: Mapping[str, Tensor]) -> None:
        self._mixed: list[tuple[Axis, Axis]] = []
        self.entries: dict[str, list[Axis]] = {}
        for node in graph.nodes:
            for name in node.entries:
                if name not in self.entries:
                    self.entries[name] = _axes_of(name, graph, state)
        self.values: dict[int, Any] = {}
        for node in graph.nodes:
            self.values[node.id] = self._value(node)
        for i in graph.outputs():
            for axis in _flat(self.values[i]):
                freeze(axis, "output")
        self.aliases: dict[str, str] = {}
        for one, other in tied(dict(state)):
            self._tie_names(one, other)

    def _value(self, node: Node) -> Any:
        if node.op == "input":
            return own_axes(node, "input")
        inputs = [self.values[i] for i in node.inputs]
        entries = [self.entries[name] for name in node.entries]
        mixed: list[tuple[Axis, Axis]] = []
        try:
            value = rule_of_axes(node).tie(node, Axes(inputs, entries, mixed))
        except _UNFORESEEN as error:
            why = str(error) if isinstance(error, Unsupported) else "called in an unforeseen way"
            for given in (*inputs, *entries):
                freeze_axes(node, _flat(given), why)
            return own_axes(node, f"{node.op}: {why}")
        self._mixed += mixed
        return value

    def _tie_names(self, one: str, other: str) -> None:
        """Two names of one tensor are permuted alike."""
        if one in self.entries and other in self.entries:
            pairs = list(zip(self.entries[one], self.entries[other]))
            if len(self.entries[one]) != len(self.entries[other]):
                for axis in (*self.entries[one], *self.entries[other]):
                    freeze(axis, "names of one tensor with other shapes")
                return
            for pair in pairs:
                tie(*pair)
        elif one in self.entries:
            self.aliases[other] = one
        elif other in self.entries:
            self.aliases[one] = other

    # -- the result --------------------------------------------------------------------------------

    def tensors_of_values(self) -> Iterator[tuple[int, list[Axis]]]:
        """Values that are tensors with axes of their own."""
        for i, value in self.values.items():
            several = bool(value) and isinstance(value[0], list)
            if not several and not any(map(is_sliced, value)):
                yield i, value

    def dependent(self) -> dict[Atom, Atom]:
        """Atoms whose permutation may depend on the index along another one, with that one.

        It has to be beside them in every tensor, once, and nothing may take several of its indices
        together.
        """
        possible: dict[Atom, set[Atom]] = {}
        # what entries are made of shows only when all values were looked at
        tensors = [axes for _, axes in self.tensors_of_values()]
        for axes in (*tensors, *self.entries.values()):
            terms = _terms(axes)
            if terms is None:
                possible |= {atom: set() for atom in itertools.chain(*map(atoms, axes))}
                continue
            for term in terms:
                for atom, beside in _beside(term):
                    possible[atom] = possible.get(atom, beside) & beside
        for axis, other in self._mixed:
            if is_sliced(axis) or is_sliced(other):
                continue
            near = atoms(axis)
            for atom in atoms(other):
                if atom not in near:
                    possible.get(atom, set()).difference_update(near)
        return _chosen(self._atoms(), possible)

    def _atoms(self) -> list[Atom]:
        """Free atoms of entries, in the order of the graph."""
        found: dict[Atom, None] = {}
        for axis in itertools.chain.from_iterable(self.entries.values()):
            found |= dict.fromkeys(a for a in atoms(axis) if a.size > 1 and not a.reason)
        return list(found)

    def names(self, outer: Mapping[Atom, Atom]) -> dict[Atom, str]:
        """Names of free atoms, and of others that permutations depend on, after their entries."""
        needed = dict.fromkeys([*self._atoms(), *outer.values()])
        names: dict[Atom, str] = {}
        for entry, axes in self.entries.items():
            for place, axis in enumerate(axes):
                for i, atom in enumerate(atoms(axis)):
                    if atom in needed and atom not in names:
                        suffix = (f"[{place}]" if place else "") + (f":{i}" if i else "")
                        names[atom] = entry + suffix
        return {atom: names[atom] for atom in needed if atom in names}

    def frozen(self) -> Iterator[Frozen]:
        """Axes of entries with a part that is not permuted, and why."""
        for entry, axes in self.entries.items():
            for place, axis in enumerate(axes):
                reasons = {a.reason: None for a in atoms(axis) if a.size > 1 and a.reason}
                yield from (Frozen(entry, place, reason) for reason in reasons)


def _axes_of(name: str, graph: Graph, state: Mapping[str, Tensor]) -> list[Axis]:
    tensor = state[name] if name in state else graph.constants[name]
    reason = "" if name in state else "a constant of the network"
    if not tensor.is_floating_point():
        reason = reason or "whole numbers"
    return [Atom(size, reason) for size in tensor.shape]


def _flat(value: Any) -> list[Axis]:
    """All axes of a value, or of several."""
    found: list[Axis] = []
    for each in value:
        found += _flat(each) if isinstance(each, list) else [each]
    return found


# -- dependence ------------------------------------------------------------------------------------


def _terms(axes: Sequence[Axis]) -> list[list[list[Atom]]] | None:
    """A tensor's parts, one of each sum among its axes: for each axis its atoms."""
    choices = [_choices(axis) for axis in axes]
    count = math.prod(map(len, choices))
    return [list(term) for term in itertools.product(*choices)] if count <= _MOST_TERMS else None


def _choices(axis: Axis) -> list[list[Atom]]:
    axis = resolve(axis)
    if isinstance(axis, Sum):
        return list(itertools.chain.from_iterable(map(_choices, axis.parts)))
    if isinstance(axis, Product):
        combined = itertools.product(*map(_choices, axis.parts))
        return [list(itertools.chain.from_iterable(each)) for each in combined]
    return [[axis] if isinstance(axis, Atom) else []]


def _beside(term: Sequence[Sequence[Atom]]) -> Iterator[tuple[Atom, set[Atom]]]:
    """Each atom, with those that have one index for each of its own: in its axis, or in another."""
    everywhere = list(itertools.chain.from_iterable(term))
    once = {atom for atom in everywhere if everywhere.count(atom) == 1}
    for axis in term:
        own = {atom for atom in axis if list(axis).count(atom) == 1}
        for atom in axis:
            yield atom, (own | (once - set(axis))) - {atom}


def _chosen(free: Sequence[Atom], possible: Mapping[Atom, set[Atom]]) -> dict[Atom, Atom]:
    """For each atom the largest one that it may depend on, and that depends on none itself."""
    outer: dict[Atom, Atom] = {}
    # the fewest possibilities first: units have their heads, and heads have nothing
    for atom in sorted(free, key=lambda each: len(possible.get(each, ()))):
        found = [c for c in possible.get(atom, ()) if c.size > 1 and c not in outer]
        if found and atom not in outer.values():
            outer[atom] = max(found, key=lambda c: c.size)
    return outer
