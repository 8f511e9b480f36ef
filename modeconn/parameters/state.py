"""Network states: read from modules, mappings and checkpoint files; checked, matched and written.

A state is what ``module.state_dict()`` holds: names and tensors, parameters and buffers alike.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError

State = dict[str, Tensor]

# The keys under which training scripts save the state beside other things.
_NESTS = ("model_state", "state_dict", "model_state_dict", "model", "net")
# names as DataParallel, AveragedModel and torch.compile write them
_WRAPPERS = ("module.", "_orig_mod.")
# torch.save before 1.6: its magic number, pickled
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LISTED = 4  # differences that one message spells out


def load(
    source: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> State:
    """The state of a module, of a mapping, or of a checkpoint file.

    A module's or a mapping's tensors are detached, not copied: they follow later changes of the
    original. A file's tensors are copies on the CPU, so the file may be overwritten later. Its
    first bytes say what kind of file it is: safetensors, or ``torch.save`` (zip or older), read
    with ``weights_only=True``, so no code in the file ever runs. A state that a mapping or file
    holds under "model_state", "state_dict", "model_state_dict", "model" or "net" is found there. In
    a file, the prefixes "module." and "_orig_mod." that wrappers put before every name are removed;
    names of modules and mappings stay as they are.

    Args:
        source: The module, state dict, or file name.
        dtype: A floating dtype to convert floating entries to; the others stay as they are.

    Raises:
        ModeconnError: The file is missing, truncated or no checkpoint; it holds objects other than
            weights; the state is empty, or some entries are not tensors.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ModeconnError(
            f"dtype: {dtype} does not float; expected torch.float32 or torch.float64"
        )
    copy = False
    if isinstance(source, nn.Module):
        state = _tensors(source.state_dict(), type(source).__name__)
    elif isinstance(source, Mapping):
        state = _tensors(_nested(source, "state dict"), "state dict")
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        state = _unwrapped(_tensors(_nested(_read(path), str(path)), str(path)))
        # the tensors are still mapped to the file: writing over it would change or crash them
        copy = True
    else:
        raise ModeconnError(
            f"network: of type {type(source).__name__}; expected an nn.Module, a state dict, or a file name"
        )
    return {name: _converted(tensor, dtype, copy) for name, tensor in state.items()}


def match(
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    *,
    devices: bool = True,
    dtypes: bool = True,
) -> None:
    """Raises unless all states have the keys, shapes and dtypes of the first, and its device.

    Args:
        states: The states to compare.
        names: What to call each of them in the message.
        devices: Whether the device counts, too.
        dtypes: Whether the dtype counts.

    Raises:
        ModeconnError: Lists the first differences and says how many there are.
    """
    for state, name in zip(states[1:], names[1:], strict=True):
        differences = list(_differences(states[0], state, devices, dtypes))
        if not differences:
            continue
        hint = _prefix_hint(state, name, states[0]) or _prefix_hint(states[0], names[0], state)
        count = f"{len(differences):,} {'entry' if len(differences) == 1 else 'entries'}"
        raise ModeconnError(
            f"{name} does not match {names[0]} in {count}: {_listed(differences)}{hint}"
        )


def check(state: Mapping[str, Tensor], name: str) -> None:
    """Raises unless the weights are dense, float32 or float64, on one device, and finite.

    Integer and bool entries are fine as counters or masks, and refused as weights.

    Raises:
        ModeconnError: Names the entries and says what is wrong with them.
    """
    _check_storage(state, name)
    _check_dtypes(state, name)
    bad = []
    for key, tensor in state.items():
        # NaN and inf show in the extremes: one pass, where isfinite() would take the tensor's
        # memory again.
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not all(map(torch.isfinite, tensor.aminmax()))
        ):
            nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            bad.append(f"'{key}' has {nan:,} NaN and {inf:,} infinite of {tensor.numel():,} values")
    if bad:
        raise ModeconnError(f"{name}: weights must be finite: {_listed(bad, of=len(state))}")


def save(
    state: Mapping[str, Tensor],
    file: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a state as a safetensors file, atomically.

    Tensors that share memory (tied weights) are written one by one, each in full: the format has no
    sharing.

    Args:
        state: Names and dense tensors, on any device.
        file: The file to write; an older file there is replaced only by a complete new one.
        metadata: Text to keep in the file's header.

    Raises:
        ModeconnError: The state is empty or holds something else than tensors; the file cannot be
            written.
    """
    from safetensors.torch import save as to_bytes

    seen: set[int] = set()
    packed = {}
    for name, tensor in _tensors(state, "state").items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    content = to_bytes(packed, metadata={"format": "pt", **(metadata or {})})
    atomic_write(file, lambda stream: stream.write(content))


def atomic_write(file: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that at every moment there is either the old content or the complete new one.

    Args:
        file: The file to write; its folder must exist.
        write: Called with the stream to write to. If it raises, or is interrupted, nothing stays
            behind.

    Raises:
        ModeconnError: The file cannot be written, with the system's reason.
    """
    # through a link to the file that it stands for
    target = Path(os.path.realpath(Path(file).expanduser()))
    if target.is_dir():
        raise ModeconnError(f"{file}: is a folder; expected the name of a file to write")
    if not target.parent.is_dir():
        raise ModeconnError(f"{file}: cannot be written: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well
            temporary.unlink()


# ----------------------------------------------------------------------------------------------
# files


def _read(path: Path) -> Any:
    """Whatever the checkpoint file holds, its tensors mapped to the file where the format allows it."""
    if path.is_dir():
        files = sorted(
            p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth")
        )
        inside = f" in it: {_listed(files)}" if files else ""
        raise ModeconnError(f"{path}: is a folder; expected a checkpoint file{inside}")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        raise ModeconnError(
            f"{path}: no such file; expected a .safetensors or .pt checkpoint"
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


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


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
        raise _damaged(
            path, (str(error).strip() or type(error).__name__).splitlines()[0]
        ) from error


def _damaged(path: Path, reason: str) -> ModeconnError:
    return ModeconnError(
        f"{path}: truncated or damaged checkpoint ({path.stat().st_size:,} bytes): {reason}"
    )


def _check_archive(path: Path) -> None:
    """Raises unless the zip archive is complete and one that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception as error:  # not only BadZipFile: damaged names and versions raise other errors
        raise _damaged(path, str(error)) from error
    if "constants.pkl" in members:
        weights = f"torch.jit.load({str(path)!r}).state_dict()"
        raise ModeconnError(f"{path}: a TorchScript program, not weights; {_recipe(weights)}")
    if "data.pkl" not in members:
        raise ModeconnError(
            f"{path}: a zip archive of {_listed(sorted(members))}; expected one that torch.save wrote"
        )


def _not_weights(path: Path, reason: str) -> ModeconnError:
    """What a pickle holds besides weights, and how its owner can convert it."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # older formats cannot be listed; the reason names the first one
        found = re.findall(r"GLOBAL ([\w.]+)", reason)
    if not found:
        return _damaged(path, "its pickle cannot be decoded")
    whole = any(name.startswith("torch.nn.modules.") for name in found)
    kind = "a whole module" if whole else "a pickle that is not weights alone"
    weights = f"torch.load({str(path)!r}, weights_only=False)" + (
        ".state_dict()" if whole else "['state_dict']"
    )
    return ModeconnError(
        f"{path}: {kind}: reading {_listed(found)} can run code; {_recipe(weights)}"
    )


def _recipe(weights: str) -> str:
    return f"if you trust the file, convert it once: torch.save({weights}, 'weights.pt')"


def _foreign(head: bytes) -> str:
    """What a file that is no checkpoint seems to be, from its first bytes."""
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself (run `git lfs pull`)"
    if head[257:262] == b"ustar":
        return (
            "is a tar archive (the format of PyTorch before 0.1.10, or a packed folder: unpack it)"
        )
    if head.startswith(b"\x80"):
        return "is a Python pickle, which could run code when read"
    if head.lstrip()[:1] == b"<":
        return "is a web page (a download that failed?)"
    return f"starts with {head[:12]!r}"


# --------------------------------------------------------------------------------------------
# entries


def _nested(found: Any, name: str) -> Mapping[str, Any]:
    """The state in what a training script saved: the mapping itself, or the one under a usual key."""
    if not isinstance(found, Mapping):
        raise ModeconnError(
            f"{name}: holds a value of type {type(found).__name__}; expected a state dict"
        )
    inner = {key: found[key] for key in _NESTS if isinstance(found.get(key), Mapping)}
    states = [
        key for key, value in inner.items() if any(isinstance(v, Tensor) for v in value.values())
    ]
    if len(states) > 1:
        raise ModeconnError(
            f"{name}: holds several states, {states}; save or pass the one that you mean"
        )
    return inner[states[0]] if states else found


def _tensors(state: Mapping[Any, Any], name: str) -> State:
    """The mapping as a state, if every entry is a tensor."""
    if not state:
        raise ModeconnError(f"{name}: holds no entries; expected names and tensors")
    others = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    wrong = [f"{key!r} is {type(value).__name__}" for key, value in others.items()]
    wrong += [
        f"the name {key!r} is {type(key).__name__}" for key in state if not isinstance(key, str)
    ]
    if wrong:
        nests = ", ".join(repr(key) for key in _NESTS)
        count = _listed(wrong, of=len(state))
        raise ModeconnError(
            f"{name}: not tensors: {count}; expected a state dict, alone or under {nests}"
        )
    lazy = [repr(key) for key, value in state.items() if nn.parameter.is_lazy(value)]
    if lazy:
        raise ModeconnError(
            f"{name}: not initialised yet: {_listed(lazy)}; run the module once on a batch first"
        )
    return {key: value.detach() for key, value in state.items()}


def _unwrapped(state: State) -> State:
    """The state without the prefixes that wrappers put before every name."""
    while True:
        names = [name for name in state if name != "n_averaged"]  # AveragedModel's own counter
        prefix = next(
            (p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), None
        )
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): state[name] for name in names}


def _converted(tensor: Tensor, dtype: torch.dtype | None, copy: bool = False) -> Tensor:
    return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=copy)


def _differences(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], devices: bool, dtypes: bool
) -> Iterable[str]:
    yield from (f"'{key}' is missing" for key in first if key not in other)
    for key, tensor in other.items():
        if key not in first:
            yield f"'{key}' {list(tensor.shape)} is not expected"
            continue
        expected = first[key]
        if tensor.shape != expected.shape:
            yield f"'{key}' is {list(tensor.shape)}, expected {list(expected.shape)}"
        elif dtypes and tensor.dtype != expected.dtype:
            yield f"'{key}' is {tensor.dtype}, expected {expected.dtype}"
        elif devices and tensor.device != expected.device:
            yield f"'{key}' is on {tensor.device}, expected on {expected.device}"


def _prefix_hint(state: Iterable[str], name: str, other: Iterable[str]) -> str:
    """How to make the names agree, if those of `state` are those of `other` behind a prefix; else nothing."""
    first = next(iter(other), "")
    for key in state:
        prefix = key.removesuffix(first)
        if prefix and {prefix + short for short in other} == set(state):
            fix = f"{{k.removeprefix({prefix!r}): v for k, v in state.items()}}"
            return f" (every name in {name} begins with {prefix!r}; remove it: {fix})"
    return ""


def _check_storage(state: Mapping[str, Tensor], name: str) -> None:
    packed = {key: t for key, t in state.items() if t.layout != torch.strided or t.is_quantized}
    if packed:
        listed = _listed(
            [f"'{key}' is {t.layout}, {t.dtype}" for key, t in packed.items()], of=len(state)
        )
        raise ModeconnError(f"{name}: weights must be dense float32 or float64: {listed}")
    where: dict[torch.device, str] = {}
    for key, tensor in state.items():
        where.setdefault(tensor.device, key)
    if torch.device("meta") in where:
        raise ModeconnError(
            f"{name}: '{where[torch.device('meta')]}' is on the meta device: it has no values"
        )
    if len(where) > 1:
        places = _listed([f"'{key}' on {device}" for device, key in where.items()])
        raise ModeconnError(
            f"{name}: all entries must be on one device: {places}; move them by .to(device)"
        )


def _check_dtypes(state: Mapping[str, Tensor], name: str) -> None:
    unfit = {key: t for key, t in state.items() if t.dtype not in (torch.float32, torch.float64)}
    rule = f"{name}: weights must be float32 or float64"
    low = [
        f"'{key}' is {tensor.dtype}" for key, tensor in unfit.items() if tensor.is_floating_point()
    ]
    if low:
        listed = _listed(low, of=len(state))
        raise ModeconnError(f"{rule}: {listed}; convert: mc.load(file, dtype=torch.float32)")
    # Counters and masks may be integers; what is called a weight is meant to be interpolated.
    wrong = [
        f"'{key}' is {tensor.dtype}"
        for key, tensor in unfit.items()
        if tensor.is_complex() or (tensor.dim() and key.rpartition(".")[2] in ("weight", "bias"))
    ]
    if wrong:
        raise ModeconnError(f"{rule}: {_listed(wrong, of=len(state))}")


# ----------------------------------------------------------------------------------------------
# words


def _listed(items: Sequence[str], of: int | None = None) -> str:
    """The first few items and how many more there are: "2 of 22: x; y"."""
    count = f"{len(items):,} of {of:,}: " if of else ""
    more = f"; and {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return count + "; ".join(items[:_LISTED]) + more
