"""Networks that have nothing to do with each other, as the points of a path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.parameters.paths import Path, Source
from modeconn.parameters.points import Points, is_count, t_values

# What `points` is by default: it stands for all states, as their own number does.
_DEFAULT = 101


class States(Path):
    """Unrelated states of one architecture: t is the number of a state, 0 to n - 1.

    By default all of them are evaluated, in their order. Nothing is between them; layers that
    some of them have in common are computed once. Files of float32 are mapped, not loaded: of a
    point no more than its own file need be in memory.

    Args:
        states: modules, state dicts or names of checkpoint files.
    """

    def __init__(self, states: Sequence[Source]) -> None:
        super().__init__(states, least=1)

    def __len__(self) -> int:
        return len(self.control_points)

    def points(self, points: Points) -> np.ndarray:
        """Check the numbers of states, float64 [T]; a count stands for all of them.

        Raises:
            ModeconnError: another count than that of the states, or numbers of no state.
        """
        everyone = np.arange(len(self), dtype=np.float64)
        if is_count(points):
            if points not in (len(self), _DEFAULT):
                raise ModeconnError(
                    f"points is {points}, and there are {len(self)} states: expected "
                    f"points={len(self)} for all, or their numbers, such as points=[0, 1]"
                )
            return everyone
        t = t_values(points, 1, "States")
        strangers = t[~np.isin(t, everyone)]
        if len(strangers):
            raise ModeconnError(
                f"points has {strangers[0]:g}: expected numbers of states, 0 to {len(self) - 1}"
            )
        return t

    def _basis(self, t: np.ndarray) -> np.ndarray:
        rows: np.ndarray = np.eye(len(self))[t.astype(np.int64)]
        return rows
