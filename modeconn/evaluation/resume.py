"""The sums of an evaluation so far, kept in a file: the same call after an interruption goes on from there.

Results are sums over parts of the data in a fixed order, so what is done after some part is those
sums, the number of parts and a checksum of their data. The parts that are done are read again, to
find the place and to see that they are the same data, and not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.data.inputs import Inputs, leaves
from modeconn.errors import ModeconnError
from modeconn.parameters.paths import Path
from modeconn.parameters.state import atomic_write

FORMAT = "modeconn.unfinished/1"
# Short parts do not wait for the disk.
SECONDS_BETWEEN_SAVES = 2.0


class Unfinished:
    """What is done of an evaluation, pass by pass.

    Args:
        file: to keep it in; None to keep nothing.
        settings: plain values that decide the sums; the file must be of an evaluation with the
            same.

    Raises:
        ModeconnError: the file is something else, or of another evaluation.
    """

    def __init__(self, file: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.file = None if file is None else File(file)
        self._settings = json.loads(json.dumps(settings))
        self._arrays: dict[str, np.ndarray] = {}
        if self.file is not None and self.file.exists():
            self._load()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """One pass over the data; however it ends, what is done of it is written."""
        prefix = f"{name}/"
        saved = {
            key.removeprefix(prefix): value
            for key, value in self._arrays.items()
            if key.startswith(prefix)
        }
        stage = Stage(self, prefix, saved)
        try:
            yield stage
        finally:
            stage.write()

    def write(self, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a pass's arrays, with what is kept of the others."""
        if self.file is None:
            return
        self._arrays |= {prefix + key: value for key, value in arrays.items()}
        meta = np.array(json.dumps({"format": FORMAT, "settings": self._settings}))
        atomic_write(self.file, lambda stream: np.savez(stream, meta=meta, **self._arrays))  # type: ignore[arg-type]

    def _load(self) -> None:
        try:
            with np.load(self.file, allow_pickle=False) as archive:  # type: ignore[arg-type]
                meta = json.loads(str(archive["meta"]))
                arrays = {key: archive[key] for key in archive.files if key != "meta"}
            before, known = meta["settings"], meta["format"] == FORMAT
        except Exception as error:  # zipfile, numpy and json each fail in their own way
            raise ModeconnError(
                f"{self.file} is no unfinished evaluation: remove it, or name another file"
            ) from error
        others = [key for key in self._settings if before.get(key) != self._settings[key]]
        if others or not known:
            raise ModeconnError(
                f"{self.file} is of another evaluation, with other {', '.join(others) or 'format'}: remove it to start anew, "
                "or name another file"
            )
        self._arrays = arrays


class Stage:
    """One pass over the data, part by part.

    Attributes:
        parts: how many are done.
        sums: what they add up to, by name, as it was written; empty at the beginning.
    """

    def __init__(self, owner: Unfinished, prefix: str, saved: dict[str, np.ndarray]) -> None:
        self._owner, self._prefix = owner, prefix
        self.parts, self._expected = (int(v) for v in saved.pop("place", np.zeros(2, np.int64)))
        self.sums = {key: torch.from_numpy(value) for key, value in saved.items()}
        self._seen, self._crc = 0, 0
        self._next: dict[str, np.ndarray] = {}
        self._written = time.monotonic()

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._owner.file is not None

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
                f"{self._owner.file} is of an evaluation on other data: remove it, or name another file"
            )
        return self._seen <= self.parts

    def done(self, sums: Mapping[str, Tensor]) -> None:
        """The part that `has` was last asked for is done, and all so far add up to these sums."""
        if self.kept:
            self.parts = self._seen
            self._next = {key: value.detach().cpu().numpy().copy() for key, value in sums.items()}
            self._next["place"] = np.array([self.parts, self._crc], np.int64)
            if time.monotonic() - self._written >= SECONDS_BETWEEN_SAVES:
                self.write()

    def write(self) -> None:
        """Write what is done, if that is more than what is written."""
        if self._next:
            self._owner.write(self._prefix, self._next)
            self._next, self._written = {}, time.monotonic()


def fingerprint(path: Path, t: np.ndarray) -> dict[str, str]:
    """What identifies a path and points on it: its control points bit for bit, and their coefficients."""
    weights = hashlib.sha256()
    for point in path.control_points:
        for key in sorted(point):
            weights.update(f"{key} {tuple(point[key].shape)} {point[key].dtype}".encode())
            weights.update(_bytes(point[key]))
    points = hashlib.sha256(t.tobytes() + path.coefficients(t).numpy().tobytes())
    return {"path": f"{type(path).__name__} {weights.hexdigest()}", "points": points.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
