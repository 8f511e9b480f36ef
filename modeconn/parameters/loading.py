"""Paths from their files, whatever their kind."""

from __future__ import annotations

import os

from torch import nn

from modeconn.errors import ModeconnError
from modeconn.parameters.path_files import made_of, read_points
from modeconn.parameters.paths import Bezier, Line, Mixture, Path, PolyChain

KINDS: dict[str, type[Path]] = {kind.__name__: kind for kind in (Bezier, Line, Mixture, PolyChain)}


def load_path(file: str | os.PathLike[str], *, model: nn.Module | None = None) -> Path:
    """Read a path that `path.save`, `Fit.save` or `modeconn curve` wrote.

    Args:
        file: a safetensors file.
        model: the network that it is to be of, if that is to be checked.

    Returns:
        A `Bezier`, `PolyChain`, `Line` or `Mixture`, its control points on the CPU, bitwise.

    Raises:
        ModeconnError: the file holds no path, or one of another network.
    """
    about, points = read_points(file, model)
    if about.get("kind") not in KINDS:
        raise ModeconnError(
            f"{file}: holds a path of the kind {about.get('kind')!r}: expected one of "
            f"{', '.join(KINDS)}"
        )
    path: Path = made_of(KINDS[about["kind"]], points)
    return path
