"""Checkpoints of `torch.distributed.checkpoint` (FSDP, accelerate, Lightning), read by one process.

PyTorch's own reader unpickles `.metadata`, which could run code. Here a pickle may name plain
records, sizes and dtypes alone, and each tensor is read by `weights_only=True`.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError, first_line, listed, out_of_memory

METADATA = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "Path"},
}


class _Record:
    """Stands for an object in `.metadata`: it keeps what it is given, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class _Reader(pickle.Unpickler):
    """Reads a pickle of records, sizes and dtypes, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for what a pickle names."""
        if name in _RECORDS.get(module, ()):
            return _Record
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_distributed(folder: Path) -> dict[str, Any]:
    """Read the tensors of a distributed checkpoint, each put together from its shards.

    Returns:
        the mapping that was saved, nested as it was; what is no tensor is left out.

    Raises:
        ModeconnError: `.metadata` is damaged or names what could run code; a shard is missing,
            damaged or of another form than PyTorch writes by default.
    """
    metadata = _metadata(folder)
    try:
        tensors = {
            name: about
            for name, about in metadata.state_dict_metadata.items()
            if hasattr(about, "size")
        }
        places = _places(metadata, tensors)
        paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    except (AttributeError, TypeError) as error:
        raise _damaged(folder / METADATA, str(error)) from None
    chunks = itertools.chain.from_iterable(places.values())
    files = sorted({str(chunk.relative_path) for chunk in chunks})
    missing = [f for f in files if Path(f).name != f or not (folder / f).is_file()]
    if missing:
        raise ModeconnError(
            f"{folder}: {len(missing)} of its {len(files)} shards are missing: {listed(missing)}"
        )
    nested: dict[str, Any] = {}
    for name, about in tensors.items():
        whole = _assembled(folder, name, about, places.get(name, {}))
        _put(nested, paths.get(name) or (name,), whole)
    if not nested:
        raise ModeconnError(f"{folder}: a distributed checkpoint without tensors")
    return _innermost(nested)


def _innermost(nested: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping in which networks and optimizers stand, within names of applications."""
    while len(nested) == 1:
        (only,) = nested.values()
        if not isinstance(only, dict) or any(isinstance(v, Tensor) for v in only.values()):
            break
        nested = only
    return nested


def _metadata(folder: Path) -> Any:
    file = folder / METADATA
    try:
        with file.open("rb") as stream:
            found = _Reader(stream).load()
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        if out_of_memory(error):
            raise
        raise _damaged(file, str(error) or type(error).__name__) from None
    if not isinstance(found, _Record):
        raise _damaged(file, f"holds {type(found).__name__}")
    return found


def _places(metadata: Any, tensors: Mapping[str, Any]) -> dict[str, dict[Any, tuple[int, ...]]]:
    """By tensor the places of its chunks in files, each with where it begins in the tensor."""
    places: dict[str, dict[Any, tuple[int, ...]]] = {}
    for index, place in metadata.storage_data.items():
        if index.fqn in tensors:
            offset = getattr(index, "offset", None) or (0,) * len(tensors[index.fqn].size)
            places.setdefault(index.fqn, {})[place] = tuple(offset)
    return places


def _assembled(
    folder: Path, name: str, about: Any, places: Mapping[Any, tuple[int, ...]]
) -> Tensor:
    size = torch.Size(about.size)
    whole: Tensor | None = None
    filled = 0
    for place, offset in places.items():
        chunk = _chunk(folder, name, place)
        if whole is None:
            whole = torch.empty(size, dtype=chunk.dtype)
        ends = [first + length for first, length in zip(offset, chunk.shape)]
        fits = chunk.dim() == len(size) == len(offset) and all(
            first >= 0 and end <= most for first, end, most in zip(offset, ends, size)
        )
        if not fits:
            raise _damaged(
                folder / place.relative_path,
                f"its part {list(chunk.shape)} of '{name}' does not fit {list(size)}",
            )
        whole[tuple(slice(first, end) for first, end in zip(offset, ends))] = chunk
        filled += chunk.numel()
    if whole is None or filled != whole.numel():
        raise _damaged(folder / METADATA, f"{filled:,} numbers of '{name}' {list(size)} are there")
    return whole


def _chunk(folder: Path, name: str, place: Any) -> Tensor:
    """Read a part of a tensor."""
    file = folder / str(place.relative_path)
    if getattr(place, "transform_descriptors", None):
        raise ModeconnError(
            f"{file}: '{name}' is written by {place.transform_descriptors}: expected a checkpoint "
            "without transforms of its files"
        )
    try:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what is cut off makes torch.load raise nearly anything
        if out_of_memory(error):
            raise
        raise _damaged(file, f"'{name}': {first_line(error)}") from error
    if not isinstance(found, Tensor):
        raise _damaged(file, f"'{name}' is a {type(found).__name__}")
    return found.detach()


def _put(nested: dict[str, Any], path: tuple[Any, ...], tensor: Tensor) -> None:
    for part in path[:-1]:
        inner = nested.setdefault(str(part), {})
        if not isinstance(inner, dict):
            return
        nested = inner
    nested[str(path[-1])] = tensor


def _damaged(file: Path, reason: str) -> ModeconnError:
    return ModeconnError(f"{file}: truncated or damaged distributed checkpoint: {reason}")
