"""Checks of the user's losses and metrics: one number per row, which the other rows do not change.

Sums over blocks of rows are sums over the data set for such callables alone. So each of them is
called once with some rows together and in two parts, and the numbers are compared row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.errors import ModeconnError, out_of_memory

# (outputs, targets) → one number per sample, [N].
PerSample = Callable[[Any, Tensor], Tensor]
# Difference of two computations of one number that counts as rounding: relative to it, and to the
# largest of all. Sums in another order differ by some units in the last place.
_RELATIVE = {torch.float64: 1e-9}
_RELATIVE_OF_OTHERS, _OF_LARGEST = 1e-4, 0.1


def values_of(name: str, function: PerSample, outputs: Any, targets: Tensor) -> Tensor:
    """Call a loss or metric, and check what it returns.

    Raises:
        ModeconnError: it is not one number per sample.
    """
    value = function(outputs, targets)
    samples = len(targets)
    if not isinstance(value, Tensor) or value.shape != (samples,):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModeconnError(
            f"{name} gives {shape} for {samples} samples: expected one number per sample, "
            f'[{samples}] (reduction="none" in PyTorch\'s losses)'
        )
    return value


def check_rows(
    name: str, function: PerSample, outputs: Any, targets: Tensor, together: Tensor
) -> bool:
    """Check that the number of a row is the same whatever the other rows are.

    Args:
        name: of the loss or metric.
        function: the loss or metric.
        outputs, targets: of a block of rows.
        together: what the function gives for them.

    Returns:
        Whether the rows could show it: there are two, and numbers that are finite.

    Raises:
        ModeconnError: the number of a row depends on others, or is random.
    """
    count = len(targets)
    finite = together.isfinite()
    if count < 2 or not bool(finite.any()):
        return False
    middle = max(1, (count // 2 - 1) | 1)  # odd: pairs of rows that belong together are torn
    parts = []
    for start, stop in ((0, middle), (middle, count)):
        part = _cut(outputs, start, stop, count)
        parts.append(_of_part(name, function, part, targets[start:stop]))
    differing = _differing(together, torch.cat(parts))
    if not differing.numel():
        return True
    if _differing(together, function(outputs, targets)).numel():
        raise ModeconnError(
            f"{name} gives other numbers when it is called again: expected a function of outputs "
            "and targets alone"
        )
    row = int(differing[0])
    apart = float(parts[0][row] if row < middle else parts[1][row - middle])
    raise ModeconnError(
        f"{name} gives row {row} the number {float(together[row]):.6g} among {count} rows and "
        f"{apart:.6g} among fewer: the value of a row depends on other rows, and expected is one "
        "number per row, of that row alone; look for shapes that broadcast ([N, 1] with [N]) or "
        "means over axis 0; a metric of the whole data set is given as mc.DatasetMetric(…)"
    )


def _of_part(name: str, function: PerSample, outputs: Any, targets: Tensor) -> Tensor:
    try:
        return values_of(name, function, outputs, targets)
    except ModeconnError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModeconnError(
            f"{name} fails for the first or last {len(targets)} of its rows alone "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): expected is "
            "one number per row, of that row alone"
        ) from error


def _differing(together: Tensor, apart: Tensor) -> Tensor:
    """Return the rows whose two numbers differ by more than rounding."""
    relative = _RELATIVE.get(together.dtype, _RELATIVE_OF_OTHERS)
    one, other = together.double(), apart.double()
    largest = one[one.isfinite()].abs().max() if bool(one.isfinite().any()) else 0.0
    near = torch.isclose(one, other, rtol=relative, atol=0.0, equal_nan=True)
    near |= (one - other).abs() <= relative * _OF_LARGEST * largest
    return (~near).nonzero().flatten()


def _cut(value: Any, start: int, stop: int, rows: int) -> Any:
    """Return some rows of what a network returns: a tensor, or containers or objects of them."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # by layer, a recurrent network's states have their rows on axis 1
            axis = next((i for i, size in enumerate(leaf.shape[:2]) if size == rows), None)
            return leaf if axis is None else leaf.narrow(axis, start, stop - start)
        if not hasattr(leaf, "__dict__") or callable(leaf):
            return leaf
        part = copy.copy(leaf)
        for name, field in vars(leaf).items():
            part.__dict__[name] = pytree.tree_map_only(Tensor, cut, field)
        return part

    return pytree.tree_map(cut, value)
