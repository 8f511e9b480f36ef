"""The one tolerance table: errors are measured against float64, and compared with plain PyTorch's.

A result passes if its error is at most twice that of a plain PyTorch pass per point at the same
precision, plus a floor of a few rounding errors of the largest value (plain PyTorch may happen to
be exact). The precision is that of the values: sums of float32 losses have the floor of float32,
whatever they are added up in.
"""

from __future__ import annotations

import numpy as np
import torch

# Rounding errors that are allowed where plain PyTorch makes none, as a multiple of the precision's
# epsilon.
FLOOR = {torch.float32: 8.0, torch.float64: 64.0}
FACTOR = 2.0


def assert_within_policy(
    name: str, got: object, plain: object, exact: object, dtype: torch.dtype
) -> None:
    """Compare with a float64 referee.

    Args:
        name: of the values, for the message.
        got: the values to judge.
        plain: the same computation in plain PyTorch at `dtype`; the referee again where the floor
            alone is allowed.
        exact: the referee, computed in float64.
        dtype: the precision that `got` and `plain` are computed in.
    """
    got, plain, exact = (np.asarray(v, np.float64) for v in (got, plain, exact))
    assert got.shape == exact.shape == plain.shape, (
        f"{name}: shapes {got.shape}, {plain.shape}, {exact.shape}"
    )
    if not exact.size:
        return
    scale = np.abs(exact).max()
    error, allowed = np.abs(got - exact).max(), FACTOR * np.abs(plain - exact).max()
    floor = FLOOR[dtype] * torch.finfo(dtype).eps * scale
    assert error <= allowed + floor, (
        f"{name}: error {error:.3g} against float64, plain PyTorch's {allowed / FACTOR:.3g}, "
        f"allowed {allowed + floor:.3g}"
    )
