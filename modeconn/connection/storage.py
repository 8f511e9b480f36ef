"""Packs the breakpoints of a path as one checkpoint and differences.

Tensors, rows and columns that a segment does not touch are not written again. The first breakpoint
is stored whole. Each further one stores, for every tensor that differs from the one before, the
rows and columns in which it does and the new values of that block: values, not arithmetic
differences, so every bit comes back.

Names in the safetensors file: "0/KEY" for the first breakpoint; "K/values/KEY", and where only a
part changed "K/rows/KEY" (and "K/columns/KEY" for tensors of two or more dimensions), for
breakpoint K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.parameters.state import State


def pack(points: Sequence[State]) -> State:
    """Returns tensors by name, from which `unpack` makes the points again; all on the CPU."""
    packed = {f"0/{key}": value.cpu() for key, value in points[0].items()}
    for k in range(1, len(points)):
        for key, value in points[k].items():
            before = points[k - 1][key]
            if value is before:
                continue
            for part, tensor in _difference(before.cpu(), value.cpu()).items():
                packed[f"{k}/{part}/{key}"] = tensor
    return packed


def _difference(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Returns the block in which a tensor changed; {} where it did not."""
    if bitwise_equal(before, after):
        return {}
    if after.dim() == 0:
        return {"values": after}
    changed = bits(before) != bits(after)
    rows = _places(changed)
    block = {"rows": rows, "values": after[rows]}
    if after.dim() > 1:
        block["columns"] = _places(changed.transpose(0, 1))
        block["values"] = block["values"][:, block["columns"]]
    small = sum(tensor.numel() * tensor.element_size() for tensor in block.values())
    return block if small < after.numel() * after.element_size() else {"values": after}


def _places(changed: Tensor) -> Tensor:
    """Returns the indices along the first axis at which anything changed."""
    along = changed.flatten(1).any(1) if changed.dim() > 1 else changed
    return along.nonzero().flatten()


def unpack(packed: State, count: int) -> list[State]:
    """Makes the points again, `count` of them; a tensor that does not change is shared.

    Raises:
        ModeconnError: a name, index or shape that does not fit.
    """
    parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(count)]
    first: State = {}
    for name, tensor in packed.items():
        number, _, rest = name.partition("/")
        part, _, key = rest.partition("/")
        if number == "0":
            first[rest] = tensor
        elif not (_is_below(number, count) and part in ("values", "rows", "columns") and key):
            raise ModeconnError(f"{name!r} is no part of a path of {count} breakpoints")
        else:
            parts[int(number)].setdefault(key, {})[part] = tensor
    if not first:
        raise ModeconnError("the first breakpoint is missing")
    points = [first]
    for k in range(1, count):
        point = dict(points[-1])
        for key, block in parts[k].items():
            if key not in point:
                raise ModeconnError(
                    f"breakpoint {k} changes {key!r}, which the first breakpoint does not have"
                )
            point[key] = _applied(point[key], block, f"breakpoint {k}, {key!r}")
        points.append(point)
    return points


def _is_below(number: str, count: int) -> bool:
    return number.isdecimal() and int(number) < count


def _applied(before: Tensor, block: dict[str, Tensor], what: str) -> Tensor:
    """Writes a block into a copy of a tensor, checked in every respect: files are not trusted."""
    if "values" not in block:
        raise ModeconnError(f"{what}: the values are missing")
    values = block["values"]
    if values.dtype != before.dtype:
        raise ModeconnError(f"{what}: values are {values.dtype}, expected {before.dtype}")
    indices = [name for name in ("rows", "columns") if name in block]
    partial = ["rows"] if before.dim() == 1 else ["rows", "columns"]
    if indices not in ([], partial):
        raise ModeconnError(
            f"{what}: has {', '.join(indices)}, which do not fit {before.dim()} dimensions"
        )
    expected = list(before.shape)
    for axis, name in enumerate(indices):
        index = block[name]
        if index.dtype != torch.int64 or index.dim() != 1 or not len(index):
            raise ModeconnError(
                f"{what}: {name} are {index.dtype} {list(index.shape)}, expected int64 numbers"
            )
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= before.shape[axis]:
            raise ModeconnError(
                f"{what}: {name} go from {low} to {high}, expected 0 to {before.shape[axis] - 1}"
            )
        expected[axis] = len(index)
    if list(values.shape) != expected:
        raise ModeconnError(f"{what}: values have shape {list(values.shape)}, expected {expected}")
    if not indices:
        return values
    after = before.clone()
    if len(indices) == 1:
        after[block["rows"]] = values
    else:
        after[block["rows"][:, None], block["columns"][None]] = values
    return after


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape and dtype hold the same bits.

    -0.0 differs from 0.0, and a NaN equals itself.
    """
    return torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    """Views a tensor's bits as integers, to compare."""
    kinds = {torch.float64: torch.int64, torch.float32: torch.int32}
    return tensor.view(kinds[tensor.dtype]) if tensor.dtype in kinds else tensor
