"""Checkpoint files: their kind by their first bytes, and their content, without running code."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError, listed, out_of_memory
from modeconn.files.fingerprints import digest_of_tensors
from modeconn.files.writing import check_sums

# The entry of a safetensors file's metadata with the digest of its tensors.
DIGEST = "modeconn.sha256"

# The keys under which training scripts save the state beside other things.
NESTS = ("model_state", "state_dict", "model_state_dict", "model", "net")
# torch.save before 1.6: its magic number, pickled
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read(path: Path) -> Any:
    """Read a checkpoint file, its tensors mapped to the file where the format allows it.

    Returns:
        whatever the file holds: a state dict, or a container with one in it.

    Raises:
        ModeconnError: the file is missing, truncated or no checkpoint, or holds objects other than
            weights.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        raise ModeconnError(
            f"{path}: no such file; expected a .safetensors or .pt checkpoint, or a folder of "
            "save_pretrained"
        ) from None
    except OSError as error:
        raise ModeconnError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith(b"PK"):
        _check_archive(path)
        # a name that torch.load goes by
        return _read_torch(path, mmap=path.suffix != ".safetensors")
    if head.startswith(_OLD_TORCH):
        return _read_torch(path, mmap=False)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    raise ModeconnError(
        f"{path}: {_foreign(head)}; expected a .safetensors file or one that torch.save wrote"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            written = (file.metadata() or {}).get(DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if written is not None and written != digest_of_tensors(tensors):
        raise _damaged(
            path,
            f"its tensors are not those that {DIGEST!r} in its metadata was written for "
            "(remove that entry where they were changed on purpose)",
        )
    return tensors


def _read_torch(path: Path, *, mmap: bool) -> Any:
    import pickle

    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            # notes on old formats that the reader can do nothing about
            warnings.simplefilter("ignore")
            return torch.load(
                path if mmap else stream, map_location="cpu", weights_only=True, mmap=mmap
            )
    except pickle.UnpicklingError as error:
        raise _not_weights(path, str(error)) from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        if out_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        raise _damaged(path, reason.splitlines()[0]) from error


def _damaged(path: Path, reason: str) -> ModeconnError:
    return ModeconnError(
        f"{path}: truncated or damaged checkpoint ({path.stat().st_size:,} bytes): {reason}"
    )


def _check_archive(path: Path) -> None:
    """Raise a ModeconnError unless a zip archive is complete and one that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
            check_sums(archive)
    except Exception as error:  # not only BadZipFile: damaged names and versions raise other errors
        raise _damaged(path, str(error)) from error
    if "constants.pkl" in members:
        weights = f"torch.jit.load({str(path)!r}).state_dict()"
        raise ModeconnError(f"{path}: a TorchScript program, not weights; {_recipe(weights)}")
    if "data.pkl" not in members:
        found = listed(sorted(members))
        raise ModeconnError(f"{path}: a zip archive of {found}; expected one that torch.save wrote")


def _not_weights(path: Path, reason: str) -> ModeconnError:
    """Return the error for a pickle of more than weights, with the way to convert it."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # older formats cannot be listed; the reason names the first one
        found = re.findall(r"GLOBAL ([\w.]+)", reason)
    if not found:
        return _damaged(path, "its pickle cannot be decoded")
    whole = any(name.startswith("torch.nn.modules.") for name in found)
    kind = "a whole module" if whole else "a pickle that is not weights alone"
    content = f"torch.load({str(path)!r}, weights_only=False)"
    weights = f"{content}.state_dict()" if whole else _weights(path, content)
    return ModeconnError(
        f"{path}: {kind}: reading {listed(found)} can run code; {_recipe(weights)}"
    )


def _weights(path: Path, content: str) -> str:
    """Say how to take the weights out of what a file holds, by the words in its pickle.

    It is not run.
    """
    import pickletools

    words: set[Any] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [each for each in archive.namelist() if each.endswith("/data.pkl")]
            words = {argument for _, argument, _ in pickletools.genops(archive.read(name))}
    except Exception:  # an older format, or damaged
        words = {"state_dict"}
    keys = [key for key in NESTS if key in words]
    if keys:
        return f"{content}[{keys[0]!r}]"
    return f"{{k: v for k, v in {content}.items() if torch.is_tensor(v)}}"


def _recipe(weights: str) -> str:
    return f"if you trust the file, convert it once: torch.save({weights}, 'weights.pt')"


def _foreign(head: bytes) -> str:
    """Tell what a file that is no checkpoint seems to be, from its first bytes."""
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself (run `git lfs pull`)"
    if head[257:262] == b"ustar":
        return "is a tar archive (PyTorch's format before 0.1.10, or a packed folder: unpack it)"
    if head.startswith(b"\x80"):
        return "is a Python pickle, which could run code when read"
    if head.lstrip()[:1] == b"<":
        return "is a web page (a download that failed?)"
    return f"starts with {head[:12]!r}"


def text_beside(file: str | os.PathLike[str]) -> dict[str, str]:
    """Read the text that a safetensors file has beside its tensors; empty for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as archive:
            return dict(archive.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return {}  # of another format, damaged, or a folder
