"""Files of curves: the control points of a path, in one safetensors file.

The entries are named "k/entry", of control point k; the metadata say which kind of path it is, and
of which network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modeconn.errors import ModeconnError
from modeconn.files.fingerprints import digest_of
from modeconn.parameters import state as states
from modeconn.parameters.reading import text_beside
from modeconn.parameters.wrappers import unwrapped

if TYPE_CHECKING:
    from typing_extensions import Self

    from modeconn.parameters.groups import Blocks
    from modeconn.parameters.state import State

FORMAT = "modeconn.curve/1"
# The entry of the metadata with the digest of a network's architecture.
NETWORK = "network"


class PathFile:
    """Reading and writing of a path; mixed into those of one parameter."""

    control_points: list[State]
    unmatched: ModeconnError | None
    blocks: Blocks | None

    def save(self, file: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the path as a safetensors file, whole or not at all.

        Args:
            file: `load_path` and `load` read it.
            metadata: text to keep beside the control points: what "model" it is of, for instance.

        Raises:
            ModeconnError: the file cannot be written; files of the control points leave out names
                that others have; or the path has groups, which a file does not keep.
        """
        if self.unmatched is not None:
            raise ModeconnError(f"{self.unmatched}: evaluate on the module fills in tied names")
        if self.blocks is not None:
            raise ModeconnError(
                f"{self!r} has groups, which a file does not keep: save the path without them, and "
                "name the groups when it is loaded"
            )
        tensors: State = {}
        for number, point in enumerate(self.control_points):
            tensors |= {f"{number}/{name}": value for name, value in point.items()}
        about = {
            **(metadata or {}),
            "format": FORMAT,
            "kind": type(self).__name__,
            "bends": str(len(self.control_points) - 2),
        }
        states.save(tensors, file, about)

    @classmethod
    def load(cls, file: str | os.PathLike[str], *, model: nn.Module | None = None) -> Self:
        """Read a path of this kind that `save` wrote.

        Args:
            file: the file.
            model: the network that it is to be of, if that is to be checked.

        Raises:
            ModeconnError: the file holds no path, or one of another kind or network.
        """
        about, points = read_points(file, model)
        if about["kind"] != cls.__name__:
            raise ModeconnError(
                f"{file}: holds a {about['kind']}, expected a {cls.__name__}: mc.load_path reads "
                "either"
            )
        made: Self = made_of(cls, points)
        return made


def made_of(kind: Any, points: Sequence[State]) -> Any:
    """Return a path of some kind through control points that a file had."""
    return kind(*points) if kind.__name__ == "Line" else kind(points)


def digest_of_architecture(model: nn.Module) -> str:
    """Return the digest of a network without its weights, which files of its paths keep."""
    return digest_of(unwrapped(model), weights=False)


def metadata_of(file: str | os.PathLike[str]) -> dict[str, str]:
    """Return the text in a file of a path; empty for any other file."""
    about = text_beside(file)
    return about if about.get("format") == FORMAT else {}


def read_points(
    file: str | os.PathLike[str], model: nn.Module | None = None
) -> tuple[dict[str, str], list[State]]:
    """Read the metadata and the control points of a path's file.

    Raises:
        ModeconnError: it is no such file, damaged, or of another network.
    """
    content = states.load(file)  # says what is wrong with a file that cannot be read
    about = metadata_of(file)
    if not about:
        raise ModeconnError(
            f"{file}: holds no path (its format is not {FORMAT!r}): expected a file that "
            "path.save wrote; a checkpoint of one network is a control point"
        )
    points = _points(Path(file), about, content)
    if model is not None:
        _check_network(file, about, points[0], model)
    return about, points


def _points(file: Path, about: Mapping[str, str], content: Mapping[str, Tensor]) -> list[State]:
    found: dict[int, State] = {}
    for key, value in content.items():
        number, slash, name = key.partition("/")
        if not slash or not number.isdecimal():
            raise ModeconnError(f"{file}: entry {key!r} is of no control point: expected 0/NAME")
        found.setdefault(int(number), {})[name] = value
    bends = about.get("bends", "")
    if sorted(found) != list(range(len(found))) or bends != str(len(found) - 2):
        raise ModeconnError(
            f"{file}: has the control points {sorted(found)}, and its metadata tell of {bends!r} "
            "bends: it is damaged, or was changed"
        )
    return [found[number] for number in range(len(found))]


def _check_network(
    file: str | os.PathLike[str], about: Mapping[str, str], first: State, model: nn.Module
) -> None:
    """Raise a ModeconnError for a path of another network."""
    states.match(
        [states.load(model), first],
        [f"the model {type(model).__name__}", str(file)],
        devices=False,
        dtypes=False,
    )
    written = about.get(NETWORK)
    if written is not None and written != digest_of_architecture(model):
        raise ModeconnError(
            f"{file}: is a path of another network with parameters of such names and shapes "
            f"({about.get('model', 'whose name it does not tell')}): expected the module that it "
            "was made with; without model= it is read as it is"
        )
