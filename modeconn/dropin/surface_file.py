"""Goldstein's HDF5 files: directions, and surfaces that are filled in point by point.

A surface file has `xcoordinates` [nx], `ycoordinates` [ny] where there is a second axis, and tables
such as `train_loss` and `train_acc` of shape [nx, ny]. The flat order of a table is that of
`numpy.meshgrid(x, y)`, whose rows are y. Values of at most 0 (-1 when a table is new) are missing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.files.writing import atomic_write

# Groups of a direction file, in the order of the axes.
AXES = ("xdirection", "ydirection")
# More coordinates than anyone looks at are no surface.
_MOST_COORDINATES = 1 << 20
# Attribute of a surface file, per table: the digest of what its values were computed from.
_DIGEST = "modeconn.sha256 of {}"


def hdf5() -> Any:
    """Import h5py.

    Raises:
        ModeconnError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise ModeconnError(
            "HDF5 files need h5py, which is not installed: pip install 'modeconn[h5]'"
        ) from None
    return h5py


@contextmanager
def reading(file: str | os.PathLike[str]) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Raises:
        ModeconnError: it is missing, no HDF5 file, damaged, or another program writes it.
    """
    h5py = hdf5()
    if not Path(file).is_file():
        raise ModeconnError(f"{file}: no such file")
    try:
        opened = h5py.File(file, "r")
    except OSError as error:
        if isinstance(error, BlockingIOError) or "already open" in str(error):
            raise ModeconnError(f"{file} is open in another program: wait for its end") from error
        raise ModeconnError(f"{file}: no HDF5 file, or a damaged one: {error}") from error
    with opened:
        try:
            yield opened
        except (OSError, RuntimeError, KeyError) as error:
            raise ModeconnError(f"{file}: damaged: {error}") from error


def write_directions(
    file: str | os.PathLike[str], directions: Sequence[Sequence[np.ndarray]]
) -> None:
    """Write one or two directions as the groups `xdirection` and `ydirection`, whole or not at all.

    Args:
        file: the file to write.
        directions: of each axis a list of arrays, in the order of `parameters()` or `state_dict()`.
    """
    if not 1 <= len(directions) <= len(AXES):
        raise ModeconnError(f"directions are {len(directions)}: expected one or two")
    content = io.BytesIO()
    with hdf5().File(content, "w") as opened:
        for axis, arrays in zip(AXES, directions):
            group = opened.create_group(axis)
            for i, array in enumerate(arrays):
                group.create_dataset(str(i), data=array)
    atomic_write(file, lambda stream: stream.write(content.getvalue()))


def read_directions(
    file: str | os.PathLike[str], shapes: Mapping[str, Sequence[Sequence[int]]] | None = None
) -> list[list[np.ndarray]]:
    """Read the one or two directions of a file.

    Args:
        file: the file.
        shapes: what the arrays of a direction may be, by a name for messages: lists of shapes, one
            of which each direction must have; None to take any.

    Raises:
        ModeconnError: the file has no directions, or those of another model.
    """
    with reading(file) as opened:
        groups = [opened[axis] for axis in AXES if axis in opened]
        if not groups or AXES[0] not in opened:
            raise ModeconnError(f"{file}: has no group {AXES[0]!r}; expected a direction file")
        for group in groups:
            if any(str(i) not in group for i in range(len(group))):
                raise ModeconnError(
                    f"{file}: {group.name} has {sorted(group)[:4]}, …: expected data sets 0, 1, …"
                )
            if shapes is not None:
                _check_shapes(file, group, shapes)
        return list(map(_arrays, groups))


def _arrays(group: Any) -> list[np.ndarray]:
    return [np.asarray(group[str(i)]) for i in range(len(group))]


def _check_shapes(
    file: str | os.PathLike[str], group: Any, shapes: Mapping[str, Sequence[Sequence[int]]]
) -> None:
    found = [tuple(group[str(i)].shape) for i in range(len(group))]
    if any(found == list(map(tuple, expected)) for expected in shapes.values()):
        return
    counts = " or ".join(f"{len(expected)} ({name})" for name, expected in shapes.items())
    for expected in shapes.values():
        if len(expected) == len(found):
            i = next(i for i, shape in enumerate(expected) if tuple(shape) != found[i])
            raise ModeconnError(
                f"{file}: is of another model: {group.name}/{i} is {list(found[i])}, expected "
                f"{list(expected[i])}"
            )
    raise ModeconnError(
        f"{file}: is of another model: {group.name} has {len(found)} tensors, expected {counts}"
    )


@dataclass
class SurfaceFile:
    """A surface file's axes and tables.

    Attributes:
        file: its name.
        x, y: coordinates [nx] and [ny]; y is None where there is one axis.
        tables: [nx, ny] or [nx], by name.
        digests: of what a table was computed from, by its name, where the file says so.
    """

    file: Path
    x: np.ndarray
    y: np.ndarray | None
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> SurfaceFile:
        """Read a surface file.

        Raises:
            ModeconnError: the file is missing, damaged, or no surface.
        """
        with reading(file) as opened:
            x = _axis(file, opened, "xcoordinates")
            if x is None:
                raise ModeconnError(f"{file}: has no 'xcoordinates'; expected a surface file")
            found = cls(Path(file), x, _axis(file, opened, "ycoordinates"))
            for name, table in opened.items():
                if getattr(table, "shape", None) == found.shape and table.dtype.kind == "f":
                    found.tables[name] = np.asarray(table, np.float64)
                    digest = opened.attrs.get(_DIGEST.format(name))
                    if digest is not None:
                        found.digests[name] = str(digest)
                elif name.endswith(("_loss", "_acc")):
                    raise ModeconnError(
                        f"{file}: {name!r} is {getattr(table, 'shape', 'a group')}, expected "
                        f"numbers {found.shape}, one for each point"
                    )
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each table."""
        return (len(self.x),) if self.y is None else (len(self.x), len(self.y))

    def points(self) -> np.ndarray:
        """Return the coordinates of the points in the flat order of tables, [T] or [T, 2]."""
        if self.y is None:
            return self.x
        return np.stack([part.ravel() for part in np.meshgrid(self.x, self.y)], axis=1)

    def table(self, name: str) -> np.ndarray:
        """Return a table, flat [T], with -1 for what is missing."""
        if name not in self.tables:
            return np.full(int(np.prod(self.shape)), -1.0)
        return self.tables[name].ravel()

    def write(self, dir_file: str, tables: Mapping[str, np.ndarray], digest: str) -> None:
        """Write tables, flat [T], into the file, whole or not at all; all else in it stays.

        Args:
            dir_file: the name of the direction file, where the file is new.
            tables: by name.
            digest: of what they were computed from.
        """
        content = io.BytesIO(self.file.read_bytes() if self.file.exists() else b"")
        with hdf5().File(content, "r+" if content.getvalue() else "w") as opened:
            axes = {"xcoordinates": self.x, "ycoordinates": self.y}
            for name, axis in axes.items():
                if name not in opened and axis is not None:
                    opened[name] = axis
            if "dir_file" not in opened:
                opened["dir_file"] = dir_file
            for name, flat in tables.items():
                if name in opened:
                    opened[name][...] = flat.reshape(self.shape)
                else:
                    opened[name] = flat.reshape(self.shape)
                opened.attrs[_DIGEST.format(name)] = digest
        atomic_write(self.file, lambda stream: stream.write(content.getvalue()))


def _axis(file: str | os.PathLike[str], opened: Any, name: str) -> np.ndarray | None:
    if name not in opened:
        return None
    axis = opened[name]
    shape: tuple[int, ...] = tuple(getattr(axis, "shape", ()))
    if len(shape) != 1 or not 0 < shape[0] <= _MOST_COORDINATES or axis.dtype.kind not in "fiu":
        raise ModeconnError(f"{file}: {name!r} is {list(shape)}: expected a list of numbers")
    return np.asarray(axis, np.float64)
