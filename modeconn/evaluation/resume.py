"""The sums of an evaluation that can be resumed, pass by pass and part by part.

Results are sums over parts of the data in a fixed order. So what is done after some part is those
sums, the number of parts, and a checksum of their data. An evaluation that is resumed reads those
parts again, which finds the place and shows that they are the same data, and does not compute them
again.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.data.inputs import Inputs, leaves
from modeconn.errors import ModeconnError
from modeconn.parameters.paths import Path
from modeconn.resuming import Record


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
        self._sums, self._places = self.record.read()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Begin or continue one pass over the data; however it ends, its sums are written."""
        prefix = f"{name}/"
        saved = {
            key.removeprefix(prefix): value.clone()
            for key, value in self._sums.items()
            if key.startswith(prefix)
        }
        stage = Stage(self, name, saved, tuple(self._places.get(name, (0, 0))))
        try:
            yield stage
        finally:
            stage.write()

    def write(self, name: str, sums: Mapping[str, Tensor], place: tuple[int, int]) -> None:
        """Write a pass's sums and place, with those of the other passes."""
        self._sums |= {f"{name}/{key}": value for key, value in sums.items()}
        self._places[name] = place
        self.record.write(self._sums, self._places)


class Stage:
    """One pass over the data.

    Attributes:
        parts: how many are done.
        sums: over the parts that an earlier call has done, by name; empty at the beginning.
    """

    def __init__(
        self, owner: Unfinished, name: str, sums: dict[str, Tensor], place: tuple[int, int]
    ) -> None:
        self._owner, self._name = owner, name
        self.parts, self._expected = place
        self.sums = sums
        self._seen, self._crc = 0, 0
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
            self._crc = zlib.crc32(_bytes(tensor), self._crc)
        self._seen += 1
        if self._seen == self.parts and self._crc != self._expected:
            raise ModeconnError(
                f"{self._owner.record.file} holds an unfinished evaluation on other data: "
                "remove it to start anew, or name another file"
            )
        return self._seen <= self.parts

    def done(self, sums: Mapping[str, Tensor]) -> None:
        """Take note that all parts up to the last that `has` was asked for add up to these sums."""
        if not self.kept:
            return
        self.parts, self._expected = self._seen, self._crc
        # Copies: the caller goes on adding.
        self._unwritten = {key: value.detach().cpu().clone() for key, value in sums.items()}
        if self._owner.record.due:
            self.write()

    def write(self) -> None:
        """Write the sums, if parts were done since they were written."""
        if self._unwritten:
            self._owner.write(self._name, self._unwritten, (self.parts, self._expected))
            self._unwritten = {}


def fingerprint(path: Path, t: np.ndarray) -> dict[str, str]:
    """Hashes that identify a path's control points, bit for bit, and the points on it."""
    weights = hashlib.sha256(type(path).__name__.encode())
    for point in path.control_points:
        for key in sorted(point):
            weights.update(f"{key} {tuple(point[key].shape)} {point[key].dtype}".encode())
            weights.update(_bytes(point[key]))
    points = hashlib.sha256(t.tobytes() + path.coefficients(t).numpy().tobytes())
    return {"path": weights.hexdigest(), "points": points.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
