"""Permutation groups of a network: axes of its entries that are permuted together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from modeconn.capture.graph import Graph
from modeconn.errors import ModeconnError
from modeconn.parameters.state import State
from modeconn.training.alignment.layouts import Layouts, Permutations, permuted

# Places and reasons that a printed line shows.
_SHOWN = 3


@dataclass(frozen=True)
class Group:
    """Units that can be permuted: channels, heads, units of a layer.

    Attributes:
        name: after the first entry that they are an axis of.
        size: the number of units.
        within: the group, or the axis, for each of whose indices they have a permutation of their
            own, as units within a head; None for one permutation.
        copies: the number of permutations: 1, or the size of `within`.
        places: (entry, axis) of all tensors that are permuted.
    """

    name: str
    size: int
    within: str | None
    copies: int
    places: tuple[tuple[str, int], ...]

    @property
    def log10(self) -> float:
        """The decimal logarithm of the number of its permutations."""
        return self.copies * math.lgamma(self.size + 1) / math.log(10)


@dataclass(frozen=True)
class Frozen:
    """An axis of an entry, or a part of it, that is not permuted.

    Attributes:
        entry, axis: of the state dict.
        operation: that froze it, and why.
    """

    entry: str
    axis: int
    operation: str


@dataclass(frozen=True)
class Groups:
    """Permutation groups of a network, as `symmetries` finds them.

    Attributes:
        groups: those that are free.
        frozen: axes that are not permuted, with the reason.
        layouts: for each entry its axes in terms of groups.
        values: for each node of the graph the axes of its value.
        graph: the captured network; None for groups that were read from a file.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    layouts: Mapping[str, Layouts] = field(repr=False)
    values: Mapping[int, Layouts] = field(default_factory=dict, repr=False, compare=False)
    graph: Graph | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def within(self) -> dict[str, str]:
        """By group, the one on whose index its permutation depends."""
        return {g.name: g.within for g in self.groups if g.within is not None}

    @property
    def log10(self) -> float:
        """The decimal logarithm of the number of permutations of the network."""
        return sum(group.log10 for group in self.groups)

    def clusters(self) -> dict[str, list[Group]]:
        """Groups that are matched together: an outer one, by name, with those within it."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            found.setdefault(group.within or group.name, [])
            if group.within is not None:
                found[group.within].append(group)
        return found

    def identity(self) -> Permutations:
        """Return the permutations that leave everything where it is."""
        return {
            g.name: np.tile(np.arange(g.size), (g.copies, 1)) if g.within else np.arange(g.size)
            for g in self.groups
        }

    def random(self, seed: int = 0) -> Permutations:
        """Draw a random permutation of each group."""
        generator = np.random.default_rng(seed)
        found: Permutations = {}
        for group in self.groups:
            drawn = [generator.permutation(group.size) for _ in range(group.copies)]
            found[group.name] = np.stack(drawn) if group.within else drawn[0]
        return found

    def permuted(self, state: Mapping[str, Tensor], permutations: Permutations) -> State:
        """Return a state dict with its units permuted; what does not move is not copied."""
        within = self.within
        found = dict(state)
        for name, axes in self.layouts.items():
            if name in state:
                found[name] = permuted(state[name], axes, permutations, within)
        return found

    def without(self, names: frozenset[str], reason: str) -> Groups:
        """Freeze some groups, and those within them, for a reason."""
        gone = {g.name for g in self.groups if g.name in names or g.within in names}
        frozen = list(self.frozen)
        for group in self.groups:
            if group.name in gone:
                frozen += [Frozen(entry, axis, reason) for entry, axis in group.places]
        kept = tuple(group for group in self.groups if group.name not in gone)
        return replace(self, groups=kept, frozen=tuple(frozen))

    def check_some(self, model: str) -> None:
        """Raise a ModeconnError, naming the operations in the way, where no group is free."""
        if self.groups:
            return
        reasons = Counter(each.operation for each in self.frozen)
        blamed = [each for each in reasons if each not in ("input", "output")] or list(reasons)
        raise ModeconnError(
            f"the model {model} has no units that can be permuted: all axes are frozen, by "
            f"{'; '.join(blamed[:_SHOWN])}"
        )

    def __str__(self) -> str:
        return self.described()

    def described(self, most: int | None = None) -> str:
        """Return what is printed, with some of the groups at most, and all that is frozen."""
        units = sum(group.size * group.copies for group in self.groups)
        head = f"{len(self.groups)} groups, {units:,} units, 10^{self.log10:.1f} permutations"
        lines = [head, *map(_line, self.groups[:most])]
        if most is not None and len(self.groups) > most:
            lines.append(f"  and {len(self.groups) - most} more groups")
        reasons: dict[str, list[str]] = {}
        for each in self.frozen:
            reasons.setdefault(each.operation, []).append(f"{each.entry}[{each.axis}]")
        if reasons:
            lines.append("frozen:")
        for reason, places in reasons.items():
            lines.append(f"  {reason}: {_some(places)}")
        return "\n".join(lines)


def _line(group: Group) -> str:
    times = f" × {group.copies} (within {group.within})" if group.within else ""
    places = [f"{entry}[{axis}]" for entry, axis in group.places]
    return f"  {group.name}: {group.size:,}{times}; {_some(places)}"


def _some(places: list[str]) -> str:
    more = len(places) - _SHOWN
    return ", ".join(places[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
