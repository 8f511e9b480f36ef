"""Weight matching: the permutation that brings one network's weights closest to the other's.

The inner product of the weights is raised group after group, each by an assignment with all others
fixed, until none gains (Ainsworth et al. 2023, algorithm 1). The first round goes from the inputs
on and compares only what is settled by then, so that a permuted copy is found again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from modeconn.parameters.comparison import tied
from modeconn.training.alignment.assignment import matched
from modeconn.training.alignment.groups import Group, Groups
from modeconn.training.alignment.layouts import Permutations, exposed, names_of, permuted

# Rounds over all groups at most; the search ends in far fewer.
_MOST_ROUNDS = 100
# A gain below this share of the inner product is rounding.
_LEAST_GAIN = 1e-9
_STATISTICS = ("running_mean", "running_var")


class WeightMatching:
    """The search for the best match of two networks' weights.

    Args:
        groups: of the network.
        a, b: state dicts; b is permuted.
    """

    def __init__(self, groups: Groups, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        self._groups, self._within = groups, groups.within
        self._free = {group.name: group for group in groups}
        known = {name: a[name] for name in groups.layouts if name in a}
        again = {name for _, name in tied(known)}  # a tied weight counts once
        names = [
            name
            for name, value in known.items()
            if value.is_floating_point() and not name.endswith(_STATISTICS) and name not in again
        ]
        self._a = {name: a[name].double() for name in names}
        self._b = {name: b[name].double() for name in names}
        self._clusters = groups.clusters()
        self._touched = {outer: self._entries_of(outer) for outer in self._clusters}

    def _entries_of(self, outer: str) -> list[str]:
        names = self._members(outer)
        return [
            name for name in self._a if names.intersection(names_of(self._groups.layouts[name]))
        ]

    def _members(self, outer: str) -> frozenset[str]:
        return frozenset([outer, *(group.name for group in self._clusters[outer])])

    def similarity(self, permutations: Permutations) -> float:
        """The cosine between a's weights and b's permuted ones."""
        norms = math.sqrt(_square(self._a) * _square(self._b))
        return self._product(permutations, self._a) / max(norms, 1e-300)

    def _product(self, permutations: Permutations, entries: Iterable[str]) -> float:
        """The inner product of some of a's weights and b's permuted ones."""
        total = 0.0
        for name in entries:
            axes = self._groups.layouts[name]
            b = permuted(self._b[name], axes, permutations, self._within)
            total += float((self._a[name] * b).sum())
        return total

    def search(self, seed: int = 0) -> Permutations:
        """Search for the permutations of b that raise the inner product the most."""
        permutations = self._groups.identity()
        settled: set[str] = set()
        for outer in self._clusters:
            self._improve(outer, permutations, settled)
            settled |= self._members(outer)
        generator = np.random.default_rng(seed)
        for _ in range(_MOST_ROUNDS):
            order = generator.permutation(list(self._clusters))
            gains = [self._improve(str(outer), permutations) for outer in order]
            if not any(gains):
                break
        return permutations

    def _improve(
        self, outer: str, permutations: Permutations, settled: set[str] | None = None
    ) -> bool:
        """Match the units of a group with all others fixed; tell whether that gains anything.

        Args:
            outer: the group.
            permutations: so far; those of the group are replaced if that is better.
            settled: the groups whose permutations count; None for all of them.
        """
        tables = self.tables(outer, permutations, settled)
        found = matched(outer, self._clusters[outer], tables, outer in permutations)
        if not found:
            return False
        better = permutations | found
        if settled is None:
            before = self._product(permutations, self._touched[outer])
            after = self._product(better, self._touched[outer])
            if after - before <= _LEAST_GAIN * max(abs(before), abs(after)):
                return False
        permutations.update(better)
        return True

    def tables(
        self, outer: str, permutations: Permutations, settled: set[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Inner products of the weights of a group's units, and of those within it.

        Args:
            outer: the group.
            permutations: of b in all other groups.
            settled: the groups whose permutations count; None for all of them.

        Returns:
            by group [n, n], or [n, n, m, m] of those within another one; nothing of groups that no
            weight compares.
        """
        members = self._members(outer)
        known = None if settled is None else settled | members
        found: dict[str, np.ndarray] = {}
        for entry in self._touched[outer]:
            self._compare(entry, members, permutations, known, found)
        return found

    def _compare(
        self,
        entry: str,
        members: frozenset[str],
        permutations: Permutations,
        known: set[str] | None,
        tables: dict[str, np.ndarray],
    ) -> None:
        """Add what an entry says of a group's units to the tables of similarities."""
        axes = self._groups.layouts[entry]
        free = self._free
        for place, axis in enumerate(axes):
            if not members & set(axis.names()):
                continue
            if known is not None and any(n in free and n not in known for n in names_of(axes)):
                continue
            leaving = place, members
            b = permuted(self._b[entry], axes, permutations, self._within, leaving)
            parts = zip(exposed(self._a[entry], axes), exposed(b, axes))
            for (one, names, places), (other, _, _) in parts:
                for i, name in enumerate(names):
                    if places[i] == place and name in members and name in free:
                        self._add(free[name], i, names, (one, other), tables)

    def _add(
        self,
        group: Group,
        axis: int,
        names: list[str],
        pair: tuple[Tensor, Tensor],
        tables: dict[str, np.ndarray],
    ) -> None:
        if group.within is None:
            if any(self._within.get(name) == group.name for name in names):
                return  # its units are matched by what is within them
            one, other = (x.movedim(axis, 0).reshape(group.size, -1) for x in pair)
            table = one @ other.T
        else:
            around = [names.index(group.within), axis]
            one, other = (
                x.movedim(around, [0, 1]).reshape(group.copies, group.size, -1) for x in pair
            )
            table = torch.einsum("imx,jnx->ijmn", one, other)
        found = table.cpu().numpy()
        tables[group.name] = found + tables.get(group.name, 0.0)


def _square(state: Mapping[str, Tensor]) -> float:
    """The square of the norm of all weights together."""
    return sum(float(value.square().sum()) for value in state.values())
