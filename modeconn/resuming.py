"""Computations that continue after an interruption, from a file or folder that keeps what is done.

A `Record` is a file: the settings that decide the outcome, and tensors and plain values of what is
done so far, with a digest of all that. `claim` does the same for a folder of such files. Equal
settings continue; others are refused by one error that names what differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modeconn.errors import ModeconnError, SystemFailure
from modeconn.files.fingerprints import digest_of_tensors
from modeconn.files.writing import atomic_write, is_temporary, sweep, sweep_inside
from modeconn.parameters import state as states

FORMAT = "modeconn.record/2"
# Short steps do not wait for the disk; a kill loses at most so much work, and one step.
SECONDS_BETWEEN_WRITES = 5.0
# Formats of older versions, by the entry of a file's metadata that tells them.
_OLDER = {"training": "modeconn.training/1", "fit": "modeconn.fit/1"}
# Rounding that differs between machines changes sums over all samples by less.
_TOLERANCE = 1e-5


class Record:
    """The finished part of a computation, kept in a safetensors file.

    Args:
        file: the file, which need not exist; None to keep nothing.
        kind: what messages call it, such as "unfinished training".
        settings: the plain values that decide the outcome of the computation.
    """

    def __init__(
        self, file: str | os.PathLike[str] | None, kind: str, settings: Mapping[str, Any]
    ) -> None:
        self.file = None if file is None else Path(file)
        self.kind = kind
        self._settings = _plain(settings)
        # The first write is due at once: a file that cannot be written is reported early.
        self._written = -math.inf
        if self.file is not None:
            sweep(self.file)

    @property
    def exists(self) -> bool:
        """Whether something is kept already."""
        return self.file is not None and self.file.exists()

    @property
    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        waited = time.monotonic() - self._written
        return self.file is not None and waited >= SECONDS_BETWEEN_WRITES

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the plain values that were written last, both empty if none were.

        Raises:
            ModeconnError: the file is no such record, or one of other settings.
        """
        if self.file is None or not self.file.exists():
            return {}, {}
        metadata, tensors = self._content(self.file)
        about = _about(metadata)
        if not isinstance(about.get("format"), str):
            raise self._foreign("its description cannot be read")
        if about["format"] != FORMAT:
            raise ModeconnError(
                f"{self.file} has format {about.get('format')!r}, expected {FORMAT!r}: "
                "remove it to start anew"
            )
        self._check_whole(about, tensors)
        if about["kind"] != self.kind:
            raise self._foreign(f"it is a record of the kind {about['kind']!r}")
        _check_same(self.file, self.kind, about["settings"], self._settings)
        state: dict[str, Any] = about["state"]
        return tensors, state

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write what is done, whole or not at all.

        Args:
            tensors: at least one, by name.
            state: plain values.
        """
        if self.file is None:
            return
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "settings": self._settings,
            "state": _plain(state),
        }
        about["sha256"] = _digest(about, tensors)
        states.save(tensors, self.file, {"record": json.dumps(about)})
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the computation is finished, or cannot be continued."""
        if self.file is not None:
            try:
                self.file.unlink(missing_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise SystemFailure(f"{self.file}: cannot be removed: {reason}") from error
            sweep(self.file)

    def _content(self, file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        if _is_archive_of_sums(file):
            return {"record": json.dumps({"format": "modeconn.unfinished/1"})}, {}
        try:
            with safe_open(file, framework="pt") as archive:
                metadata = archive.metadata() or {}
                tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118  # it is no dict
        except (SafetensorError, OSError, ValueError) as error:
            raise self._foreign(str(error)) from error
        if not {"record", *_OLDER} & set(metadata):
            raise self._foreign("it has no settings")
        return metadata, tensors

    def _check_whole(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Raise a ModeconnError unless a record is as it was written, to the bit."""
        kinds = {"kind": str, "settings": dict, "state": dict, "sha256": str}
        wrong = [name for name in kinds if not isinstance(about.get(name), kinds[name])]
        if wrong:
            raise self._foreign(f"its {wrong[0]} is missing or of another type")
        if about["sha256"] != _digest(about, tensors):
            raise ModeconnError(
                f"{self.file} is damaged: its content differs from what was written (SHA-256): "
                "remove it to start anew"
            )

    def _foreign(self, reason: str) -> ModeconnError:
        return ModeconnError(
            f"{self.file} is no {self.kind}, {reason}: remove it, or name another file"
        )


def claim(
    folder: Path,
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    approximate: Collection[str] = (),
) -> None:
    """Make a folder that keeps the parts of a computation, or check that it is of this one.

    Args:
        folder: the folder; it is new, empty, or was claimed before with equal settings.
        name: of the JSON file in it that has the settings.
        kind: what messages call the computation, such as "search".
        settings: the plain values that decide its outcome.
        approximate: names of settings, lists of numbers, that may differ in rounding.

    Raises:
        ModeconnError: the folder holds something else, or a computation with other settings.
    """
    file = folder / name
    if not file.exists():
        if folder.exists() and (
            not folder.is_dir() or not all(map(is_temporary, folder.iterdir()))
        ):
            raise ModeconnError(
                f"{folder} is there already and holds no {kind}: name another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemFailure(f"{folder}: cannot be made: {error.strerror or error}") from error
        sweep_inside(folder)
        text = json.dumps(settings, indent=1)
        atomic_write(file, lambda stream: stream.write(text.encode()))
        return
    sweep_inside(folder)
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise ModeconnError(
            f"{file} does not describe a {kind}: remove {folder} to start anew"
        ) from error
    _check_same(folder, kind, before, _plain(settings), approximate)


def _check_same(
    place: Path,
    kind: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    approximate: Collection[str] = (),
) -> None:
    """Raise a ModeconnError that names the settings which differ."""
    differences = []
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if old == new or (name in approximate and _close(old, new)):
            continue
        # Fingerprints and lists say nothing to a reader.
        shown = all(isinstance(v, (int, float, str, type(None))) for v in (old, new))
        if shown and max(len(str(old)), len(str(new))) <= 20:
            differences.append(f"{name} {old}, not {new}")
        else:
            differences.append(f"other {name}")
    if differences:
        raise ModeconnError(
            f"{place} holds another {kind}, started with {'; '.join(differences)}: "
            "remove it to start anew, or name another place"
        )


def _close(before: Any, now: Any) -> bool:
    if not isinstance(before, list) or not isinstance(now, list) or len(before) != len(now):
        return False
    pairs = [*zip(before, now)]
    if not all(type(item) in (int, float) for item in [*before, *now]):
        return False
    return all(math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in pairs)


def _digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of a record: of its description, but for the digest there, and tensors."""
    described = {name: value for name, value in about.items() if name != "sha256"}
    text = json.dumps(described, sort_keys=True) + digest_of_tensors(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the description of a record; for a file of an older version, its format alone."""
    if "record" in metadata:
        try:
            about = json.loads(metadata["record"])
        except (ValueError, RecursionError):
            about = None
        return about if isinstance(about, dict) else {}
    return {"format": next(_OLDER[key] for key in _OLDER if key in metadata)}


def _is_archive_of_sums(file: Path) -> bool:
    """Whether a file is an unfinished evaluation of an older version, which wrote npz files."""
    try:
        with zipfile.ZipFile(file) as archive:
            return "meta.npy" in archive.namelist()
    except Exception:  # no archive, or a damaged one, which raises errors of many kinds
        return False


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: with lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
