"""Spherical interpolation between two networks, tensor by tensor."""

from __future__ import annotations

import numpy as np

from modeconn.parameters.groups import Blocks, Patterns
from modeconn.parameters.paths import Path, Source
from modeconn.parameters.state import State

# Tensors whose angle's cosine is beyond this are interpolated linearly: the sine of their angle is
# lost to rounding. It is the value that merges of language models use.
_PARALLEL = 0.9995


class Slerp(Path):
    """Spherical interpolation, for each tensor by the angle Ω between its two values.

    θ(t) = (sin((1 - t) Ω) a + sin(t Ω) b) / sin Ω (Shoemake 1985), where a and b are a tensor of
    the two networks as one vector; tensors that are zero, nearly parallel or opposite are
    interpolated linearly. t outside [0, 1] goes on along the circle.

    Args:
        a, b: the networks at t = 0 and at t = 1.
        groups: patterns of entries with a t of their own each, as for `Line`; points are [T, G].
    """

    def __init__(self, a: Source, b: Source, *, groups: Patterns | None = None) -> None:
        super().__init__([a, b])
        self.check_names()
        self.move_apart(groups)
        first, second = self.control_points
        moving = [k for k in first if first[k].is_floating_point() and k not in self.fixed]
        angles = {name: _angle(first, second, name) for name in moving}
        kinds = [(-1 if self.groups is None else self.groups.of[k], angles[k]) for k in moving]
        # Equal angles are one block: norms' scales that are ones everywhere, and tied tensors.
        self._kinds = list(dict.fromkeys(kinds))
        place = {kind: number for number, kind in enumerate(self._kinds)}
        self.blocks = Blocks({k: place[kind] for k, kind in zip(moving, kinds)}, 2)

    def _coefficients(self, t: np.ndarray) -> np.ndarray:
        of_groups = [t] if self.groups is None else list(self.groups.split(t))
        columns: list[np.ndarray] = []
        for group, angle in self._kinds:
            u = of_groups[max(group, 0)]
            columns += [1.0 - u, u] if angle == 0.0 else _on_circle(u, angle)
        return np.stack(columns, axis=1)


def _angle(a: State, b: State, name: str) -> float:
    """The angle between two values of a tensor, 0 where they are to be interpolated linearly."""
    one, other = a[name].detach().double().flatten(), b[name].detach().double().flatten()
    norms = float(one.norm()) * float(other.norm())
    if not norms:
        return 0.0
    cosine = float(one @ other) / norms
    return 0.0 if abs(cosine) > _PARALLEL else float(np.arccos(cosine))


def _on_circle(t: np.ndarray, angle: float) -> list[np.ndarray]:
    """The coefficients of both ends; exactly 1 and 0 at the ends, which stay bitwise."""
    first, second = np.sin((1.0 - t) * angle), np.sin(t * angle)
    whole = np.sin(angle)
    return [
        np.where(t == 1.0, 0.0, np.where(t == 0.0, 1.0, first / whole)),
        np.where(t == 0.0, 0.0, np.where(t == 1.0, 1.0, second / whole)),
    ]
