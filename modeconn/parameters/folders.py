"""Folders that `save_pretrained` and accelerate write: weights in one file or in shards.

Nothing but tensors is read: safetensors, or PyTorch's format by `weights_only=True`. Nothing is
fetched, and no code that lies in a folder runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modeconn.errors import ModeconnError, listed
from modeconn.parameters.distributed import METADATA, read_distributed
from modeconn.parameters.quantised import refuse_quantised_config
from modeconn.parameters.reading import read

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# As transformers looks for them, in its order: safetensors first, and one file before shards.
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_INDEX = ".index.json"


def read_folder(path: Path) -> Mapping[str, Any]:
    """Read the weights of a folder of `save_pretrained`, or of a distributed checkpoint.

    Returns:
        its tensors by name; of a distributed checkpoint the mapping that was saved.

    Raises:
        ModeconnError: there are no weights in it, a shard is missing or damaged, or its config
            says that they are quantised.
    """
    if (path / ADAPTER).is_file():
        raise ModeconnError(
            f"{path}: is the folder of an adapter ({ADAPTER}): expected a network; for the one "
            f"that it makes of its base: mc.lora(base, {str(path)!r})"
        )
    refuse_quantised_config(read_config(path) or {}, str(path))
    for name in _WEIGHTS:
        if (path / name).is_file():
            found = read(path / name)
            return _mapping(found, path / name)
        if (path / f"{name}{_INDEX}").is_file():
            return _read_shards(path / f"{name}{_INDEX}")
    if (path / METADATA).is_file():
        return read_distributed(path)
    raise ModeconnError(f"{path}: {_found_instead(path)}")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has a file that only the folders of networks and adapters have."""
    indices = [f"{name}{_INDEX}" for name in _WEIGHTS]
    return any((path / name).exists() for name in (*_WEIGHTS, *indices, CONFIG, ADAPTER, METADATA))


def read_config(path: Path) -> dict[str, Any] | None:
    """Read the config.json of a folder; None where there is none.

    Raises:
        ModeconnError: it is no JSON object.
    """
    return read_json(path / CONFIG) if (path / CONFIG).is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ModeconnError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModeconnError(f"{file}: no such file") from None
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModeconnError(f"{file}: is no JSON ({error}): truncated or damaged?") from None
    if not isinstance(found, dict):
        raise ModeconnError(f"{file}: holds {type(found).__name__}: expected a JSON object")
    return found


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the shards that an index lists, each of them whole."""
    place = read_json(index).get("weight_map")
    if not isinstance(place, dict) or not place or not all(_is_name(n) for n in place.values()):
        raise ModeconnError(
            f"{index}: has no weight_map of names to files in its folder; expected the index that "
            "save_pretrained writes"
        )
    shards = sorted(set(place.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        count = f"{len(missing)} of its {len(shards)} shards"
        raise ModeconnError(
            f"{index.parent}: {count} are missing: {listed(missing)}; expected the files that "
            f"{index.name} lists"
        )
    state: dict[str, Tensor] = {}
    for shard in shards:
        found = _mapping(read(index.parent / shard), index.parent / shard)
        wanted = [name for name, file in place.items() if file == shard]
        absent = [f"'{name}'" for name in wanted if name not in found]
        more = [f"'{name}'" for name in found if place.get(name) != shard]
        for names, what in ((absent, "lacks"), (more, "holds, beside those,")):
            if names:
                raise ModeconnError(
                    f"{index.parent / shard}: {what} {listed(names)}; expected the {len(wanted)} "
                    f"tensors that {index.name} lists for it"
                )
        state.update({name: found[name] for name in wanted})
    return {name: state[name] for name in place}


def _is_name(file: object) -> bool:
    """Whether an index names a file of its own folder, and none elsewhere."""
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def _mapping(found: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ModeconnError(
            f"{file}: holds a value of type {type(found).__name__}; expected names and tensors"
        )
    return found


def _found_instead(path: Path) -> str:
    """Say what a folder without weights holds."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    try:
        files = sorted(each.name for each in path.iterdir() if each.suffix in suffixes)
        folders = sorted(f"{each.parent.name}/" for each in path.glob(f"*/{METADATA}"))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    inside = f" in it: {listed(files)}" if files else ""
    if folders:
        inside = f", or a distributed checkpoint in it: {listed(folders)}"
    names = f"{_WEIGHTS[0]}, {_WEIGHTS[1]} or the index of their shards"
    return f"is a folder without {names}; expected a checkpoint file{inside}"
