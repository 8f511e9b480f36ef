"""Names of files that begin with a wrapper's prefix, and of models that have it themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from modeconn.parameters.paths import Path


def give_back_prefix(path: Path, names: Collection[str]) -> None:
    """Give the entries of files the prefix back that was removed, where a model has it, too.

    A network whose only child is called `module` has the names of one in DataParallel.

    Args:
        path: it is changed where its names are those of the model without the prefix.
        names: of the model's entries.
    """
    parts = [prefix.split(".")[:-1] for prefix in path.prefixes]
    ends: set[str] = set()
    for each in parts:
        ends.update(".".join([*each[i:], ""]) for i in range(len(each)))
    for prefix in ends:  # a wrapper may be around such a network
        if {prefix + key for key in path.control_points[0]} == set(names):
            path.control_points = [_prefixed(prefix, point) for point in path.control_points]
            path.fixed = frozenset(prefix + key for key in path.fixed)
            path.prefixes = set()


def _prefixed(prefix: str, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in point.items()}
