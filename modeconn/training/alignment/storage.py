"""Files of permutations: JSON, or safetensors for large ones; checked on reading."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeconn.errors import ModeconnError
from modeconn.files.fingerprints import digest_of_tensors
from modeconn.files.writing import atomic_write
from modeconn.training.alignment.groups import Group, Groups
from modeconn.training.alignment.layouts import (
    Layouts,
    Permutations,
    as_json,
    from_json,
    names_of,
)

FORMAT = "modeconn.permutations.1"
_HEADER = "permutations"


def digest(permutations: Permutations) -> str:
    """Return a name for permutations, equal for equal ones."""
    tensors = {k: torch.from_numpy(v.astype(np.int64)) for k, v in permutations.items()}
    return digest_of_tensors(tensors)[:16]


def save(
    file: str | os.PathLike[str],
    groups: Groups,
    permutations: Permutations,
    about: Mapping[str, Any],
) -> None:
    """Write permutations with what is needed to apply them.

    Args:
        file: safetensors by its suffix, else JSON.
        groups: that they are of.
        permutations: by group.
        about: plain values to keep beside them.
    """
    tensors = Path(file).suffix == ".safetensors"
    described: dict[str, dict[str, Any]] = {}
    for group in groups:
        described[group.name] = {
            "size": group.size,
            "places": [list(place) for place in group.places],
            "within": group.within,
            "copies": group.copies,
        }
        if not tensors:
            described[group.name]["index"] = permutations[group.name].tolist()
    layouts = {name: list(map(as_json, axes)) for name, axes in groups.layouts.items()}
    finite = {key: _finite(value) for key, value in about.items()}
    content = {"format": FORMAT, **finite, "groups": described, "layouts": layouts}
    text = json.dumps(content, indent=None if tensors else 1)
    if not tensors:
        atomic_write(file, lambda stream: stream.write(text.encode()))
        return
    from safetensors.numpy import save as to_bytes

    arrays = {name: np.ascontiguousarray(index, np.int64) for name, index in permutations.items()}
    packed = to_bytes(arrays, metadata={_HEADER: text})
    atomic_write(file, lambda stream: stream.write(packed))


def load(file: str | os.PathLike[str]) -> tuple[Groups, Permutations, dict[str, Any]]:
    """Read permutations that `save` wrote.

    Returns:
        their groups, the permutations, and what was kept beside them.

    Raises:
        ModeconnError: it is no such file, or an index in it is no permutation.
    """
    content, arrays = _read(Path(file).expanduser())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModeconnError(f'{file}: expected permutations, with "format": "{FORMAT}"')
    described, laid = content.pop("groups", None), content.pop("layouts", None)
    if not isinstance(described, dict) or not isinstance(laid, dict):
        raise ModeconnError(f"{file}: expected an object of groups, and one of layouts")
    layouts: dict[str, Layouts] = {}
    for name, axes in laid.items():
        if not isinstance(axes, list):
            raise ModeconnError(f"{file}: layouts of '{name}': expected a list, one for each axis")
        layouts[name] = tuple(from_json(axis, f"{file}: '{name}'") for axis in axes)
    groups, permutations = [], {}
    for name, about in described.items():
        group = _group(file, name, about)
        index = arrays[name] if name in arrays else about.get("index")
        permutations[name] = _checked(file, group, index)
        groups.append(group)
    found = Groups(tuple(groups), (), layouts)
    _check_layouts(file, found)
    return found, permutations, content


def _read(file: Path) -> tuple[Any, dict[str, np.ndarray]]:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        if raw[:1] == b"{":
            return json.loads(raw), {}
        from safetensors import safe_open
        from safetensors.numpy import load as arrays_of

        with safe_open(file, framework="np") as archive:
            header = (archive.metadata() or {}).get(_HEADER, "null")
        return json.loads(header), arrays_of(raw)
    except Exception as error:  # safetensors raises what it likes
        reason = str(error).split("\n")[0]
        raise ModeconnError(f"{file}: holds no permutations: {reason}") from error


def _group(file: Any, name: str, about: Any) -> Group:
    """A group as a file has it."""
    try:
        places = tuple((str(entry), int(axis)) for entry, axis in about["places"])
        within = about["within"]
        size, copies = int(about["size"]), int(about["copies"])
        if within is not None and not isinstance(within, str):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ModeconnError(
            f"{file}: group '{name}': expected its size, places, within and copies"
        ) from None
    return Group(name, size, within, copies, places)


def _checked(file: Any, group: Group, index: Any) -> np.ndarray:
    """The permutation of a group, checked to be one."""
    shape = (group.copies, group.size) if group.within else (group.size,)
    try:
        found = np.asarray(index)
    except ValueError:
        found = np.zeros(0, object)
    if found.dtype.kind not in "iu" or found.shape != shape:
        raise ModeconnError(
            f"{file}: group '{group.name}' has an index of {found.dtype} {list(found.shape)}: "
            f"expected whole numbers {list(shape)}"
        )
    lines = found.reshape(-1, group.size)
    if not (np.sort(lines, axis=1) == np.arange(group.size)).all():
        raise ModeconnError(
            f"{file}: group '{group.name}' has an index that is no permutation: expected each of 0 "
            f"to {group.size - 1} once"
        )
    return found.astype(np.int64)


def _check_layouts(file: Any, groups: Groups) -> None:
    """Check that layouts and groups are of each other."""
    sizes = {group.name: group.size for group in groups}
    outer = {group.within: group.copies for group in groups if group.within}

    def check(entry: str, axis: Any) -> None:
        expected = sizes.get(axis.group, outer.get(axis.group))
        if axis.group and axis.size != expected:
            raise ModeconnError(
                f"{file}: '{entry}' has {axis.size} indices of '{axis.group}': expected {expected}"
            )
        for part in axis.parts:
            check(entry, part)

    for entry, axes in groups.layouts.items():
        names = set(names_of(axes))
        for axis in axes:
            check(entry, axis)
        for group in groups:
            if group.name in names and group.within and group.within not in names:
                raise ModeconnError(
                    f"{file}: '{entry}' has '{group.name}' without '{group.within}': expected both"
                )


def _finite(value: Any) -> Any:
    """A plain value with None in the place of numbers that JSON does not have."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
