"""A path that joins two networks, with its certificates: saved, loaded, evaluated and drawn."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from modeconn.connection import figure
from modeconn.connection.certificate import Certificate
from modeconn.connection.json_values import plain
from modeconn.connection.segment_kinds import KINDS, SWING
from modeconn.connection.storage import pack, unpack
from modeconn.errors import ModeconnError, SystemFailure
from modeconn.evaluation.arguments import positive
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.result import PathResult
from modeconn.files.fingerprints import digest_of_json
from modeconn.files.writing import (
    atomic_write,
    exchange_folders,
    locked,
    restore_folder,
    sweep,
    temporary_of,
)
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "modeconn.Connection/1"
CONTENT, BREAKPOINTS = "connection.json", "breakpoints.safetensors"


@dataclass(eq=False, repr=False)
class Connection:
    """A path between two networks and its certificates, as `connect` returns it.

    Attributes:
        path: the breakpoints; its end points are the two networks, bitwise.
        kinds: "rewrite", "swing" or "shift" for each segment.
        certificate: bounds for the training data. test_certificate: for other data, or None.
        model: the model's spec, such as "mlp:784-245x10-10", or None.
        details: how it was made: plain values that JSON can hold.
    """

    path: PolyChain
    kinds: tuple[str, ...]
    certificate: Certificate
    test_certificate: Certificate | None = None
    model: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = tuple(self.kinds)
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or len(self.kinds) != self.path.segments:
            among = f" with {unknown[0]!r}" if unknown else ""
            raise ModeconnError(
                f"kinds are {len(self.kinds)}{among}: "
                f"expected one for each of the {self.path.segments} segments, of {', '.join(KINDS)}"
            )
        self.details = plain(self.details)

    @property
    def breakpoints(self) -> np.ndarray:
        """t of the breakpoints, float64 [S + 1]."""
        return self.path.grid(self.path.segments + 1)

    def points(self, points_per_segment: int = 25) -> np.ndarray:
        """Returns t values that show the whole path: all breakpoints, and each swing in steps.

        On other segments the function is constant.
        """
        count = positive("points_per_segment", points_per_segment) or 1
        inside = np.arange(1, count) / count
        swings = [k for k, kind in enumerate(self.kinds) if kind == SWING]
        between = [(k + inside) / self.path.segments for k in swings]
        return np.sort(np.concatenate([self.breakpoints, *between]))

    def evaluate(
        self, model: nn.Module, data: Any, points_per_segment: int = 25, **options: Any
    ) -> PathResult:
        """Evaluates loss and error at the breakpoints and at evenly spaced points of each swing.

        Args:
            model: the architecture. data: as for `modeconn.evaluate`.
            points_per_segment: steps of a swing.
            options: further arguments of `modeconn.evaluate`.
        """
        points = self.points(points_per_segment)
        result: PathResult = evaluate(model, self.path, data, points=points, **options)
        return result

    def plot(
        self,
        ax: Axes | None = None,
        line: PathResult | None = None,
        result: PathResult | None = None,
    ) -> Axes:
        """Draws loss and error along the path, with the certified bound and the kinds of segments.

        Args:
            ax: matplotlib axes to draw on; a new figure if None.
            line: the straight line between the two networks, from `modeconn.evaluate`, for
                comparison.
            result: from `evaluate`. Without it the loss of a swing is drawn as its chord, and the
                error of a segment as its largest: upper bounds.

        Raises:
            ModeconnError: where matplotlib is not installed.
        """
        return figure.draw(self.certificate, ax, line, result)

    def __str__(self) -> str:
        certificate = self.certificate
        numbers = {kind: self.kinds.count(kind) for kind in KINDS if kind in self.kinds}
        counts = ", ".join(
            f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in numbers.items()
        )
        model = f" for {self.model}" if self.model else ""
        title = f"path of {self.path.segments} segments ({counts}){model}"
        lines = [title, _bounds(certificate)]
        if self.test_certificate is not None:
            lines.append(f"other data: {_bounds(self.test_certificate)}")
        return "\n".join([*lines, certificate.advice])

    def __repr__(self) -> str:
        certificate, rounding = self.certificate, self.certificate.rounding
        bounds = f"bound={certificate.bound:.4g}, error_bound={certificate.error_bound:.4g}"
        added = "not bounded" if rounding is None else rounding.short
        return f"Connection({self.path.segments} segments, {bounds}, rounding: {added})"

    # -- files -------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes connection.json and breakpoints.safetensors into a folder, both or neither.

        Args:
            folder: a new or empty folder, or one with a connection, which is replaced.

        Raises:
            ModeconnError: the folder holds something else, or cannot be written.
        """
        target = Path(folder).expanduser()
        if _holds_something_else(target):
            raise ModeconnError(
                f"{folder}: holds something else than a connection; expected a new or empty folder"
            )
        target = target.resolve()
        if not target.parent.is_dir():
            raise ModeconnError(f"{folder}: cannot be written: there is no folder {target.parent}")
        temporary = temporary_of(target)
        with locked(target):
            restore_folder(target)
            sweep(target)
            try:
                temporary.mkdir()
                self._write(temporary)
                exchange_folders(temporary, target)
            except OSError as error:
                raise SystemFailure(
                    f"{folder}: cannot be written: {error.strerror or error}"
                ) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        states.save(pack(self.path.control_points), folder / BREAKPOINTS, {"format": FORMAT})
        content = {
            "format": FORMAT,
            "model": self.model,
            "breakpoints": self.path.segments + 1,
            "sha256": _sha256(folder / BREAKPOINTS),
            "kinds": list(self.kinds),
            "certificate": _stored(self.certificate),
            "test_certificate": _stored(self.test_certificate) if self.test_certificate else None,
            "details": self.details,
        }
        content["digest"] = digest_of_json(content)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        atomic_write(folder / CONTENT, lambda stream: stream.write(text.encode()))

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Connection:
        """Reads what `save` wrote; nothing in it is run, and its claims are for `verify` to check.

        Raises:
            ModeconnError: the folder or a file is missing, truncated, of another version, or does
                not fit together.
        """
        where = Path(folder).expanduser()
        restore_folder(where)
        if not where.is_dir():
            problem = "is a file" if where.exists() else "no such folder"
            raise ModeconnError(f"{folder}: {problem}; expected a folder with a connection")
        for name in (CONTENT, BREAKPOINTS):
            if not (where / name).is_file():
                raise ModeconnError(
                    f"{folder}: has no {name}; expected a folder that Connection.save wrote"
                )
        content = _read_json(where / CONTENT)
        if content.get("format") != FORMAT:
            raise ModeconnError(
                f"{where / CONTENT}: format is {content.get('format')!r}, expected {FORMAT!r}"
            )
        packed = states.load(where / BREAKPOINTS)
        try:
            return _connection(content, packed, _sha256(where / BREAKPOINTS))
        except ModeconnError as error:
            raise ModeconnError(f"{folder}: {error}") from error


def _holds_something_else(folder: Path) -> bool:
    """Whether saving a connection there would overwrite what is none."""
    if not folder.exists() or (folder / CONTENT).is_file():
        return False
    return not folder.is_dir() or any(folder.iterdir())


def _bounds(certificate: Certificate) -> str:
    error = certificate.error_bound
    of_error = "" if math.isnan(error) else f", error at most {100 * error:.3g} %"
    rounding = "not bounded" if certificate.rounding is None else certificate.rounding.short
    return (
        f"loss at most {certificate.bound:.4g}{of_error} on {certificate.samples:,} samples "
        f"(rounding: {rounding})"
    )


def _stored(certificate: Certificate) -> dict[str, Any]:
    """Returns what a folder keeps; the advice is made anew from the numbers."""
    content = certificate.to_dict()
    del content["advice"]
    return content


def _connection(content: Mapping[str, Any], packed: states.State, sha256: str) -> Connection:
    """Builds the connection from the content of its two files."""
    required = ("model", "breakpoints", "sha256", "kinds", "certificate", "details")
    missing = [key for key in required if key not in content]
    if missing:
        raise ModeconnError(f"{CONTENT} has no {missing[0]!r}")
    count, kinds, model, details = (
        content[key] for key in ("breakpoints", "kinds", "model", "details")
    )
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise ModeconnError(f"breakpoints is {count!r}: expected a whole number, at least 2")
    words = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    if not words or len(kinds) != count - 1:
        raise ModeconnError(f"kinds is not a list of {count - 1} words, one for each segment")
    if not isinstance(details, dict) or not (model is None or isinstance(model, str)):
        raise ModeconnError("model is no text, or details are no table")
    if content["sha256"] != sha256:
        raise ModeconnError(
            f"{BREAKPOINTS} is not the file that {CONTENT} was written with: its SHA-256 differs"
        )
    certificates = [Certificate.from_dict(content["certificate"])]
    if content.get("test_certificate") is not None:
        certificates.append(Certificate.from_dict(content["test_certificate"]))
    points: Sequence[states.State] = unpack(packed, count)
    path = PolyChain(points, [f"breakpoint {k}" for k in range(count)])
    connection = Connection(
        path, tuple(kinds), certificates[0], (*certificates, None)[1], model, details
    )
    # Last: what does not fit together is named by itself.
    if content.get("digest", digest := digest_of_json(content)) != digest:
        raise ModeconnError(
            f"{CONTENT} is damaged: its content differs from what was written (its digest)"
        )
    return connection


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModeconnError(f"{file}: truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModeconnError(f"{file}: holds a {type(content).__name__}, expected a table")
    return content


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
