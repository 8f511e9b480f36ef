"""The layout of images in memory, channels last, and the sizes that windows leave."""

from __future__ import annotations

from torch import Tensor

from modeconn.errors import ModeconnError

Pair = tuple[int, int]


def channels_last(x: Tensor) -> Tensor:
    """Returns […, C, H, W] as contiguous […, H, W, C]: a view where memory is so, else a copy."""
    return x.movedim(-3, -1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """Views […, H, W, C] as […, C, H, W]; memory stays as it is."""
    return x.movedim(-1, -3)


def checked_pair(op: str, name: str, value: Pair, least: int) -> Pair:
    """Checks that a value is two integers, each at least `least`, and returns them."""
    if not (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(type(v) is int and v >= least for v in value)
    ):
        raise ModeconnError(f"{op}: {name} is {value!r}: expected two integers of at least {least}")
    return value[0], value[1]


def outputs_of(op: str, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Returns the height and width of the output of a window that slides over images.

    Raises:
        ModeconnError: the window is larger than the padded image.
    """
    found = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding)]
    if min(found) < 1:
        raise ModeconnError(
            f"{op}: a window of {list(kernel)} does not fit into images of {list(size)} "
            f"with padding {list(padding)}: expected one no larger than the padded image"
        )
    return found[0], found[1]
