"""Network states: read from modules, mappings and checkpoint files; checked, matched and written.

A state is a network's parameters and buffers by name, as ``module.state_dict()`` holds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError, listed, warn
from modeconn.files.fingerprints import digest_of_tensors
from modeconn.files.writing import atomic_write
from modeconn.parameters.folders import read_folder
from modeconn.parameters.quantised import refuse_quantised
from modeconn.parameters.reading import DIGEST, NESTS, read
from modeconn.parameters.wrappers import unwrapped

State = dict[str, Tensor]

# Bytes that a tensor may take which is expanded from fewer values in a file.
_MOST_EXPANDED = 1 << 30
# names as DataParallel, AveragedModel and torch.compile write them
_WRAPPERS = ("module.", "_orig_mod.")


def load(
    source: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> State:
    """Load the state of a module, of a mapping, or of a checkpoint file or folder.

    A module's or a mapping's tensors are detached, not copied: they follow later changes of the
    original. A file's tensors are copies on the CPU, so the file may be overwritten later. Its
    first bytes say what kind of file it is: safetensors, or ``torch.save`` (zip or older), read
    with ``weights_only=True``, so no code in the file ever runs. Names that ``torch.save`` wrote as
    one tensor (tied weights) stay one. A folder is one of `save_pretrained` (one file, or shards
    and their index), of accelerate, or a distributed checkpoint. A state that a mapping or file
    holds under "model_state", "state_dict", "model_state_dict", "model" or "net" is found there. In
    a file, the prefixes "module." and "_orig_mod." that wrappers put before every name are removed;
    names of modules and mappings stay as they are.

    Args:
        source: The module, state dict, or name of a file or folder.
        dtype: A floating dtype to convert floating-point tensors to; others stay as they are.

    Raises:
        ModeconnError: The file or a shard is missing, truncated or no checkpoint; it holds objects
            other than weights, or quantised ones; the state is empty, or holds objects that are
            not tensors.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ModeconnError(
            f"dtype is {dtype}: expected a floating one, torch.float32 or torch.float64"
        )
    return load_with_prefix(source, dtype)[0]


def load_with_prefix(
    source: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> tuple[State, str]:
    """Load a state as `load` does; also return the prefix that was removed from a file's names."""
    copy, prefix = False, ""
    if isinstance(source, nn.Module):
        state = _tensors(unwrapped(source).state_dict(), type(source).__name__)
    elif isinstance(source, Mapping):
        state = _tensors(_nested(source, "state dict"), "state dict")
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        found = read_folder(path) if path.is_dir() else read(path)
        state, prefix = _unwrapped(_tensors(_nested(found, str(path)), str(path)))
        _check_expanded(state, str(path))
        # the tensors are still mapped to the file: writing over it would change or crash them
        copy = True
    else:
        raise ModeconnError(
            f"network is of type {type(source).__name__}: "
            "expected an nn.Module, a state dict, or the name of a file or folder"
        )
    if not isinstance(source, nn.Module):
        refuse_quantised(state, str(source) if copy else "state dict")
    return _converted(state, dtype, copy), prefix


def widened(state: State) -> State:
    """Convert half precision to float32, which has all its values; leave all else as it is."""
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in state.items()}


def tracked(source: Any) -> State:
    """Return the tensors of a mapping that require gradients, as they are; of all else, nothing."""
    if not isinstance(source, Mapping):
        return {}
    state = _nested(source, "state dict")
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.requires_grad}


def match(
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    *,
    devices: bool = True,
    dtypes: bool = True,
) -> None:
    """Raise unless all states have the keys, shapes and dtypes of the first, and its device.

    Args:
        states: The states to compare.
        names: What to call each of them in the message.
        devices: Whether the device counts, too.
        dtypes: Whether the dtype counts.

    Raises:
        ModeconnError: States differ; the message lists the first differences and counts them.
    """
    for state, name in zip(states[1:], names[1:], strict=True):
        differences = list(_differences(states[0], state, devices, dtypes))
        if not differences:
            continue
        hint = _prefix_hint(state, name, states[0]) or _prefix_hint(states[0], names[0], state)
        count = f"{len(differences):,} {'entry' if len(differences) == 1 else 'entries'}"
        raise ModeconnError(
            f"{name} does not match {names[0]} in {count}: {listed(differences)}{hint}"
        )


def left_out(
    states: Sequence[Mapping[str, Tensor]], names: Sequence[str], files: Sequence[bool]
) -> ModeconnError | None:
    """Return the error of states that differ in names alone, which files may leave out.

    A module may tie such a name to another one that is there, or have no use for it.
    """
    if all(state.keys() == states[0].keys() for state in states):
        return None
    shapes: dict[str, torch.Size] = {}
    names_of_all = set[str]().union(*states)
    for state, is_file in zip(states, files):
        if not is_file and len(state) < len(names_of_all):
            return None
        for key, value in state.items():
            if shapes.setdefault(key, value.shape) != value.shape:
                return None
    try:
        match(states, names)
    except ModeconnError as error:
        return error
    return None


def check(state: Mapping[str, Tensor], name: str, infinite: frozenset[str] = frozenset()) -> None:
    """Raise unless the weights are dense, float32 or float64, on one device, and finite.

    Integer and bool tensors are fine as counters or masks, and refused as weights.

    Args:
        state: Names and tensors.
        name: What to call it in the message.
        infinite: Entries that may be infinite, as masks are.

    Raises:
        ModeconnError: The message names the tensors and what is wrong with them.
    """
    _check_storage(state, name)
    _check_dtypes(state, name)
    bad = []
    for key, tensor in state.items():
        if key not in infinite and not is_finite(tensor):
            nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            bad.append(f"'{key}' has {nan:,} NaN and {inf:,} infinite of {tensor.numel():,} values")
    if bad:
        raise ModeconnError(
            f"{name}: weights must be finite: {listed(bad, of=len(state))}"
            " (masks may be infinite, without NaN and alike in all control points)"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, which show in its extremes.

    That is one pass, where isfinite() would take the tensor's memory again.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(map(torch.isfinite, tensor.aminmax()))


def save(
    state: Mapping[str, Tensor],
    file: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state as a safetensors file, whole or not at all.

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
    about = {"format": "pt", **(metadata or {}), DIGEST: digest_of_tensors(packed)}
    content = to_bytes(packed, metadata=about)
    atomic_write(file, lambda stream: stream.write(content))


def _check_expanded(state: State, name: str) -> None:
    """Raise a ModeconnError for tensors that a file holds far fewer values of than they have."""
    for key, tensor in state.items():
        if tensor.layout != torch.strided:
            continue
        size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if size > max(stored, _MOST_EXPANDED):
            raise ModeconnError(
                f"{name}: '{key}' {list(tensor.shape)} takes {size:,} bytes, expanded from "
                f"{stored:,} in the file: save it by .contiguous()"
            )


def _nested(found: Any, name: str) -> Mapping[str, Any]:
    """Find the state in what a training script saved: the mapping, or the one under a usual key."""
    if not isinstance(found, Mapping):
        raise ModeconnError(
            f"{name}: holds a value of type {type(found).__name__}; expected a state dict"
        )
    inner = {key: found[key] for key in NESTS if isinstance(found.get(key), Mapping)}
    states = [key for key, value in inner.items() if _has_tensors(value)]
    if len(states) > 1:
        raise ModeconnError(
            f"{name}: holds several states, {states}; save or pass the one that you mean"
        )
    if not states:
        return found
    taken: Mapping[str, Any] = inner[states[0]]
    others = [
        repr(key)
        for key, value in found.items()
        if key not in inner and isinstance(value, Mapping) and value.keys() == taken.keys()
    ]
    if others:
        warn(
            f"{name}: the state under {states[0]!r} is taken, and not {', '.join(others)}, which "
            f"has the same names: for that pass torch.load(…)[{others[0]}]"
        )
    return taken


def _has_tensors(found: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in found.values())


def _tensors(state: Mapping[Any, Any], name: str) -> State:
    """Return the mapping as a state, if it holds tensors by name alone."""
    # What `get_extra_state` returns is no weight, and no forward reads it from a state dict.
    state = {k: v for k, v in state.items() if not str(k).endswith("_extra_state")}
    if not state:
        raise ModeconnError(f"{name}: holds no entries; expected names and tensors")
    others = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    wrong = [f"{key!r} is {type(value).__name__}" for key, value in others.items()]
    wrong += [
        f"the name {key!r} is {type(key).__name__}" for key in state if not isinstance(key, str)
    ]
    if wrong:
        nests = ", ".join(repr(key) for key in NESTS)
        count = listed(wrong, of=len(state))
        raise ModeconnError(
            f"{name}: not tensors: {count}; expected a state dict, alone or under {nests}"
        )
    lazy = [repr(key) for key, value in state.items() if nn.parameter.is_lazy(value)]
    if lazy:
        raise ModeconnError(
            f"{name}: not initialised yet: {listed(lazy)}; run the module once on a batch first"
        )
    return {key: value.detach() for key, value in state.items()}


def _unwrapped(state: State) -> tuple[State, str]:
    """Remove the prefixes that wrappers put before every name, and return them as well."""
    removed = ""
    while True:
        names = [name for name in state if name != "n_averaged"]  # AveragedModel's own counter
        prefix = _common_wrapper(names)
        if prefix is None:
            return state, removed
        removed += prefix
        state = {name.removeprefix(prefix): state[name] for name in names}


def _common_wrapper(names: Sequence[str]) -> str | None:
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return None


def _converted(state: State, dtype: torch.dtype | None, copy: bool) -> State:
    """Convert a state's tensors; those that are one and the same (tied weights) stay one."""
    made: dict[tuple[object, ...], Tensor] = {}
    converted = {}
    for name, tensor in state.items():
        to = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.data_ptr():
            converted[name] = tensor.to(to, copy=copy)
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in made:
            made[place] = tensor.to(to, copy=copy)
        converted[name] = made[place]
    return converted


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
    """Say how to make the names agree, where those of `state` are those of `other` and a prefix."""
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
        found = [f"'{key}' is {t.layout}, {t.dtype}" for key, t in packed.items()]
        raise ModeconnError(
            f"{name}: weights must be dense float32 or float64: {listed(found, of=len(state))}"
        )
    where: dict[torch.device, str] = {}
    for key, tensor in state.items():
        where.setdefault(tensor.device, key)
    if torch.device("meta") in where:
        raise ModeconnError(
            f"{name}: '{where[torch.device('meta')]}' is on the meta device: it has no values"
        )
    if len(where) > 1:
        places = listed([f"'{key}' on {device}" for device, key in where.items()])
        raise ModeconnError(
            f"{name}: all tensors must be on one device: {places}; move them by .to(device)"
        )


def _check_dtypes(state: Mapping[str, Tensor], name: str) -> None:
    unfit = {key: t for key, t in state.items() if t.dtype not in (torch.float32, torch.float64)}
    rule = f"{name}: weights must be float32 or float64"
    low = [
        f"'{key}' is {tensor.dtype}" for key, tensor in unfit.items() if tensor.is_floating_point()
    ]
    if low:
        found = listed(low, of=len(state))
        raise ModeconnError(f"{rule}: {found}; convert: mc.load(file, dtype=torch.float32)")
    # Counters and masks may be integers; what is called a weight is meant to be interpolated.
    wrong = [
        f"'{key}' is {tensor.dtype}"
        for key, tensor in unfit.items()
        if tensor.is_complex() or (tensor.dim() and key.rpartition(".")[2] in ("weight", "bias"))
    ]
    if wrong:
        raise ModeconnError(f"{rule}: {listed(wrong, of=len(state))}")
