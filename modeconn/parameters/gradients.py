"""Control points that gradients lead to."""

from __future__ import annotations

import copy

from modeconn.parameters.paths import Path
from modeconn.parameters.state import State


def with_gradients(path: Path) -> Path:
    """Return the path through the tensors that it was given, where they require gradients.

    Those of state dicts are meant. A path's own control points are detached from them, and share
    their memory. Tensors of half precision stay detached.
    """
    if not any(path.tracked):
        return path
    made = copy.copy(path)
    made.control_points = list(map(_tracked, path.control_points, path.tracked))
    return made


def _tracked(point: State, given: State) -> State:
    """A control point with the given tensors in place of those of equal dtype."""
    return point | {k: v for k, v in given.items() if k in point and v.dtype == point[k].dtype}
