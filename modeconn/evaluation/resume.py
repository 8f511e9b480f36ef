"""The sums of an evaluation that can be resumed, pass by pass and part by part.

Results are sums over parts of the data in a fixed order. So what is done after some part is those
sums, the number of parts and rows, and a digest of their data, of the captured network and of the
statistics that it was given. An evaluation that is resumed reads those parts again, which finds the
place and shows that they are the same data, and does not compute them again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.capture.graph import Graph, Size
from modeconn.data.inputs import Inputs, leaves, rows
from modeconn.errors import ModeconnError
from modeconn.files.fingerprints import digest_of, digest_of_tensors, raw_bytes
from modeconn.parameters.paths import Path
from modeconn.resuming import Record


@dataclass(frozen=True)
class Place:
    """Records how far a pass has come.

    Attributes:
        parts: of the data that are done.
        rows: in them.
        data: digest of them.
        network: digest of the network that they were done with.
    """

    parts: int = 0
    rows: int = 0
    data: str = ""
    network: str = ""

    @classmethod
    def read(cls, found: Any) -> Place:
        """Check a place that was kept as plain values."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError("a pass has no place")
        if any(type(found[name]) is not kind for name, kind in kinds.items()):
            raise ValueError("the place of a pass is of another type")
        return cls(**found)


class Unfinished:
    """The finished part of an evaluation, pass by pass.

    Args:
        file: to keep it in; None to keep nothing.
        settings: the plain values that decide the sums.

    Raises:
        ModeconnError: the file is something else, or of an evaluation with other settings.
    """

    def __init__(self, file: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.record = Record(file, "unfinished evaluation", settings)
        self._sums, places = self.record.read()
        try:
            self._places = {name: Place.read(found) for name, found in places.items()}
        except ValueError as error:
            raise self.other(f"is damaged ({error})") from error

    def other(self, what: str) -> ModeconnError:
        """Return the error for a file that this evaluation cannot go on from."""
        return ModeconnError(
            f"{self.record.file} {what}: remove it to start anew, or name another file"
        )

    @contextmanager
    def stage(self, name: str, network: str = "") -> Iterator[Stage]:
        """Begin or continue one pass over the data; however it ends, its sums are written.

        Args:
            name: of the pass.
            network: digest of what it computes, besides the settings (`digest_of_network`).

        Raises:
            ModeconnError: what is done was done with another network, or on more data.
        """
        prefix = f"{name}/"
        saved = {
            key.removeprefix(prefix): value.clone()
            for key, value in self._sums.items()
            if key.startswith(prefix)
        }
        place = self._places.get(name, Place(network=network))
        if place.network != network:
            raise self.other("holds an unfinished evaluation of another network")
        stage = Stage(self, name, saved, place)
        try:
            yield stage
            stage.check_complete()
        finally:
            stage.write()

    def write(self, name: str, sums: Mapping[str, Tensor], place: Place) -> None:
        """Write a pass's sums and place, with those of the other passes."""
        self._sums |= {f"{name}/{key}": value for key, value in sums.items()}
        self._places[name] = place
        places = {each: asdict(reached) for each, reached in self._places.items()}
        self.record.write(self._sums, places)


class Stage:
    """One pass over the data.

    Attributes:
        place: how far it has come.
        sums: over the parts that an earlier call has done, by name; empty at the beginning.
    """

    def __init__(self, owner: Unfinished, name: str, sums: dict[str, Tensor], place: Place) -> None:
        self._owner, self._name = owner, name
        self.place = place
        self.sums = sums
        self._seen, self._rows, self._data = 0, 0, hashlib.sha256()
        self._unwritten: dict[str, Tensor] = {}

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._owner.record.file is not None

    def has(self, inputs: Inputs, targets: Tensor | None = None) -> bool:
        """Whether the next part is done already; called for every part, in order.

        Raises:
            ModeconnError: the parts that are done were of other data.
        """
        if not self.kept:
            return False
        for tensor in (*leaves(inputs), *([] if targets is None else [targets])):
            self._data.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            self._data.update(raw_bytes(tensor))
        self._seen += 1
        self._rows += rows(inputs)
        if self._seen == self.place.parts and self._data.hexdigest() != self.place.data:
            raise self._owner.other("holds an unfinished evaluation on other data")
        return self._seen <= self.place.parts

    def check_complete(self) -> None:
        """Raise a ModeconnError if the data ended before all that is done was met again."""
        if self._seen < self.place.parts:
            raise self._owner.other(
                f"holds an unfinished evaluation on other data: {self.place.rows:,} rows are "
                f"done, and the data has {self._rows:,}"
            )

    def done(self, sums: Mapping[str, Tensor]) -> None:
        """Take note that all parts up to the last that `has` was asked for add up to these sums."""
        if not self.kept:
            return
        self.place = Place(self._seen, self._rows, self._data.hexdigest(), self.place.network)
        # Copies: the caller goes on adding.
        self._unwritten = {key: value.detach().cpu().clone() for key, value in sums.items()}
        if self._owner.record.due:
            self.write()

    def write(self) -> None:
        """Write the sums, if parts were done since they were written."""
        if self._unwritten:
            self._owner.write(self._name, self._unwritten, self.place)
            self._unwritten = {}


def fingerprint(path: Path, t: np.ndarray) -> dict[str, str]:
    """Hashes that identify a path's control points, bit for bit, and the points on it."""
    weights = hashlib.sha256(type(path).__name__.encode())
    for point in path.control_points:
        weights.update(digest_of_tensors(point).encode())
    if path.blocks is not None:
        weights.update(repr(sorted(path.blocks.of.items())).encode())
    points = hashlib.sha256(t.tobytes() + path.coefficients(t).numpy().tobytes())
    return {"path": weights.hexdigest(), "points": points.hexdigest()}


def digest_of_network(graph: Graph, statistics: Mapping[str, Tensor] | None = None) -> str:
    """Return the digest of what a pass computes besides the path's weights.

    Args:
        graph: the captured network: its operations, arguments, shapes and constants count.
        statistics: of norms at the points, where they were recomputed.
    """
    nodes: list[Any] = []
    for node in graph.nodes:
        nodes += [node.op, _text(node.arguments), node.inputs, node.entries, _text(node.shape)]
        # An operation of PyTorch is known by its name, a closed part by the module itself.
        nodes.append(node.function)
    parts = [nodes, graph.output, graph.constants, graph.mixes_rows, graph.inputs]
    return digest_of([*parts, dict(statistics or {})], weights=False)


def _text(template: Any) -> Any:
    """Sizes that depend on the rows, as text, in a nest of arguments or a shape."""
    if isinstance(template, dict):
        return {name: _text(item) for name, item in template.items()}
    if isinstance(template, (list, tuple)):
        return [_text(item) for item in template]
    return template.text if isinstance(template, Size) else template
