"""Comparison of a path's control points: warnings of those that are not what they seem."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modeconn.errors import ModeconnError, listed, warn
from modeconn.parameters.state import State, check, match


def checked(
    points: Sequence[State], names: Sequence[str], directions: bool, in_turn: bool
) -> frozenset[str]:
    """Check a path's control points, and warn of those that are not what they seem.

    Args:
        points: the control points.
        names: what messages call them.
        directions: whether all but the first are directions.
        in_turn: whether only those that follow each other are compared.

    Returns:
        the names of masks, see `check_points`.

    Raises:
        ModeconnError: they do not match each other, or cannot be weights.
    """
    match(points, names)
    masks = check_points(points, names, directions)
    warn_of_equal(points, names, in_turn)
    if directions:
        warn_of_zero(points[1:], names[1:])
    else:
        warn_of_fixed(points, names)
    return masks


def warn_of_zero(directions: Sequence[State], names: Sequence[str]) -> None:
    """Warn of directions along which nothing changes.

    The first tensor of others has a number that is not zero already, so that this takes no time.
    """
    for direction, name in zip(directions, names):
        if not any(bool(value.any()) for value in direction.values()):
            warn(
                f"{name} is zero in every tensor, so that the network does not change along it: "
                "expected a state dict of differences; are its two networks one?"
            )


def warn_of_equal(points: Sequence[State], names: Sequence[str], in_turn: bool) -> None:
    """Warn of control points that share their memory, or are equal in every tensor.

    The first tensors of two networks differ already, so that this takes next to no time.

    Args:
        points: the control points.
        names: what messages call them.
        in_turn: whether only those that follow each other are compared: a path may be closed.
    """
    # Floating-point tensors first: integers are often equal.
    keys = sorted(points[0], key=lambda key: not points[0][key].is_floating_point())
    for i, k in itertools.combinations(range(len(points)), 2):
        if in_turn and k > i + 1:
            continue
        one, other = points[i], points[k]
        if all(same_memory(one[key], other[key]) for key in keys):
            warn(
                f"{names[i]} and {names[k]} share memory: they are one network, and what is "
                "between them is a point; training a network changes the state dict that was taken "
                "from it before: keep a copy, copy.deepcopy(model.state_dict())"
            )
        elif all(_equal(one, other, key) for key in keys):
            warn(
                f"{names[i]} and {names[k]} are equal in every tensor, so that what is between "
                "them is a point: expected two networks; is one of them the wrong checkpoint?"
            )


def warn_of_fixed(points: Sequence[State], names: Sequence[str]) -> None:
    """Warn of buffers that are not floating point and differ, which no path interpolates.

    Counters, which are single numbers, are none of the network's function.
    """
    first = points[0]
    kept = [key for key, value in first.items() if not value.is_floating_point() and value.dim()]
    for point, name in zip(points[1:], names[1:]):
        found = [f"'{key}' ({first[key].dtype})" for key in kept if not _equal(first, point, key)]
        if found:
            warn(
                f"{name} has other values than {names[0]} in buffers that are not interpolated: "
                f"{listed(found)}; the whole path has those of {names[0]}, so that it does not end "
                f"at {name}: give both the same, or convert them to float32"
            )


def check_points(points: Sequence[State], names: Sequence[str], directions: bool) -> frozenset[str]:
    """Check that control points can be weights, which are finite, or masks.

    Args:
        points: the control points.
        names: what messages call them.
        directions: whether all but the first are directions, which are zero where nothing moves.

    Returns:
        the names of masks: entries that are infinite somewhere, and alike in all points.

    Raises:
        ModeconnError: see `state.check`.
    """
    masks: frozenset[str] = frozenset()
    try:
        for point, name in zip(points, names):
            check(point, name)
    except ModeconnError:
        masks = _infinite_alike(points, directions)
        if not masks:
            raise
        for point, name in zip(points, names):
            check(point, name, masks)
    return masks


def _infinite_alike(points: Sequence[State], directions: bool) -> frozenset[str]:
    """The names of entries that are infinite somewhere, without NaN, and alike in all points."""

    def values(key: str) -> list[Tensor]:
        return [point[key] for point in points]

    return frozenset(key for key in points[0] if is_mask(values(key), directions))


def is_mask(values: Sequence[Tensor], directions: bool = False) -> bool:
    """Whether an entry is infinite somewhere, without NaN, and alike in all points."""
    first, *others = values
    if not first.is_floating_point() or not bool(first.isinf().any()) or first.isnan().any():
        return False
    return all(torch.equal(first, other) or (directions and not other.any()) for other in others)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
        and one.data_ptr() != 0
    )


def tied(state: State) -> Iterator[tuple[str, str]]:
    """Yield the names of a state that are one tensor, each with the first of them."""
    first: dict[tuple[object, ...], str] = {}
    for name, value in state.items():
        if value.numel() == 0 or value.data_ptr() == 0:
            continue
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device)
        if place in first:
            yield first[place], name
        first.setdefault(place, name)


def _equal(one: State, other: State, key: str) -> bool:
    return same_memory(one[key], other[key]) or torch.equal(one[key], other[key])
