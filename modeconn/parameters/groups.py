"""Groups of parameters, by patterns of their names, and coefficients that differ between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.errors import ModeconnError, listed
from modeconn.parameters.points import Points

# Groups as users give them: patterns, or lists of patterns, in a list or by name.
Patterns = Sequence[Any] | Mapping[str, Any]
# The pattern of all entries that no other group has.
REST = "*"


@dataclass(frozen=True)
class Groups:
    """Groups of entries of a state dict that have a t of their own each.

    Attributes:
        names: of the groups, in the order of their t.
        of: by entry its group; entries that move with no group are absent.
        coordinates: of the t of one group.
    """

    names: tuple[str, ...]
    of: dict[str, int]
    coordinates: int = 1

    @classmethod
    def read(cls, groups: Patterns, state: Mapping[str, Tensor], coordinates: int) -> Groups:
        """Find the entries of each group.

        Args:
            groups: a list of patterns, or a dict of them by name. A pattern is the prefix of a
                module ("layers.0"), an entry, a regular expression of whole names, or "*" for what
                no other group has; a list of patterns is one group.
            state: whose entries they are.
            coordinates: of the t of one group.

        Raises:
            ModeconnError: patterns that match nothing, or entries that two groups match: all of
                them are listed.
        """
        patterns = _patterns(groups)
        taken: dict[str, list[str]] = {}
        wrong: list[str] = []
        for name, parts in patterns.items():
            for part in parts:
                found = [] if part == REST else _matching(part, state)
                if not found and part != REST:
                    wrong.append(f"{part!r} matches no entry")
                for key in found:
                    taken.setdefault(key, [])
                    if name not in taken[key]:
                        taken[key].append(name)
        rest = [name for name, parts in patterns.items() if REST in parts]
        if len(rest) > 1:
            wrong.append(f"groups {_quoted(rest)} both take the rest ({REST!r})")
        for key, of_key in taken.items():
            if len(of_key) > 1:
                wrong.append(f"'{key}' is in groups {_quoted(of_key)}")
        if rest and not state.keys() - taken.keys():
            wrong.append(f"{REST!r} takes what no other group has, which is nothing")
        if wrong:
            raise ModeconnError(
                f"groups: {'; '.join(wrong)}: expected prefixes of modules or regular expressions "
                "that match entries of the state dict, each entry in one group at most"
            )
        place = {name: number for number, name in enumerate(patterns)}
        of = {key: place[names[0]] for key, names in taken.items()}
        if rest:
            of |= {key: place[rest[0]] for key in state if key not in of}
        return cls(tuple(patterns), of, coordinates)

    def flat(self, points: Points) -> Points:
        """Return t given as [T, G, coordinates] in rows, [T, G · coordinates]."""
        try:
            given = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points)
        except ValueError:  # rows of different lengths: told with all other shapes
            return points
        whole = given.ndim == 3 and given.shape[1:] == (len(self.names), self.coordinates)
        return given.reshape(len(given), -1) if whole else points

    def together(self, t: np.ndarray) -> np.ndarray:
        """Return the points [T, G · coordinates] at which all groups have the same t."""
        together: np.ndarray = np.tile(t.reshape(len(t), -1), (1, len(self.names)))
        return together[:, 0] if together.shape[1] == 1 else together

    def split(self, t: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the t of each group, [T] or [T, coordinates]."""
        of_groups = t.reshape(len(t), len(self.names), self.coordinates)
        for group in range(len(self.names)):
            yield of_groups[:, group, 0] if self.coordinates == 1 else of_groups[:, group]


@dataclass(frozen=True)
class Blocks:
    """Entries that share their coefficients, where a path does not have one row for all.

    Attributes:
        of: by entry its block; others are those of the first control point everywhere.
        points: the number K of control points. Coefficients are [T, B · K], those of a block
            together.
    """

    of: Mapping[str, int]
    points: int

    def columns(self, name: str) -> slice:
        """Return the places of an entry's coefficients in a row."""
        start = self.of[name] * self.points
        return slice(start, start + self.points)

    def renamed(self, rename: Callable[[str], str], state: Mapping[str, Tensor]) -> Blocks:
        """Return the blocks under other names; names of one tensor are in one block.

        Args:
            rename: gives the new names.
            state: a control point under these, in which tied names may have been filled in.
        """
        of = {rename(name): block for name, block in self.of.items()}
        block_of = {id(state[name]): block for name, block in of.items()}
        for name, value in state.items():
            if id(value) in block_of:
                of.setdefault(name, block_of[id(value)])
        return replace(self, of=of)


def _patterns(groups: Patterns) -> dict[str, list[str]]:
    """The patterns of each group, by its name."""
    if isinstance(groups, str) or not isinstance(groups, (Sequence, Mapping)) or not groups:
        raise ModeconnError(
            f"groups is {groups!r}: expected a list of patterns, or a dict of them by name"
        )
    if not isinstance(groups, Mapping):
        groups = {_label(each): each for each in _all_different(groups)}
    read: dict[str, list[str]] = {}
    for name, given in groups.items():
        parts = [given] if isinstance(given, str) else given
        if not isinstance(parts, Iterable) or not all(isinstance(p, str) for p in parts):
            raise ModeconnError(f"groups has {given!r}: expected a pattern or a list of patterns")
        read[str(name)] = list(parts)
        if not read[str(name)]:
            raise ModeconnError(f"groups has {name!r} without a pattern: expected at least one")
    return read


def _all_different(groups: Sequence[Any]) -> Sequence[Any]:
    labels = [_label(each) for each in groups]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ModeconnError(f"groups has {_quoted(twice)} twice: expected each once")
    return groups


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])


def _label(given: Any) -> str:
    if isinstance(given, str) or not isinstance(given, Iterable):
        return str(given)
    return "+".join(map(str, given))


def _matching(pattern: str, state: Mapping[str, Tensor]) -> list[str]:
    """The entries that a pattern matches: below a module, by name, or as a regular expression."""
    below = [name for name in state if name == pattern or name.startswith(f"{pattern}.")]
    if below:
        return below
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ModeconnError(
            f"groups has {pattern!r}, which is no regular expression: {error}"
        ) from None
    return [name for name in state if compiled.fullmatch(name)]
