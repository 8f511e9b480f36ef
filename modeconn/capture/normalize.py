"""Normal form of operations: one name for what can be written in many ways.

Arguments are named here, once, by the operation's schema and with its defaults
(capture/signature.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from modeconn.capture import ops
from modeconn.capture.graph import Dim, In, Node, Size
from modeconn.capture.signature import named
from modeconn.capture.stubs import closed_part, is_stub

_VIEWS = ("view", "_unsafe_view", "reshape")
_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """An operation with its arguments, and the nodes whose values it takes."""

    op: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    inputs: tuple[int, ...]


def normalize(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    nodes: Sequence[Node],
    inputs: tuple[int, ...],
    shape: tuple[Dim, ...],
) -> Call:
    """Names an operation for the rules, and replaces those that would not run on every layout.

    Args:
        function, arguments: the call; arguments by name.
        nodes: those before it.
        inputs: ids of the nodes that it takes.
        shape: of its value.
    """
    if is_stub(function):
        part = closed_part(arguments.pop("number"))
        return Call("module", part, arguments, inputs)
    call = _named(function, arguments, inputs, shape)
    before = nodes[inputs[0]] if inputs and _first(arguments) == In(0) else None
    if before is not None:
        call = _merged(call, before, nodes, shape) or _simplified(call, before, shape) or call
    if call.op in _VIEWS:
        # A view of a channels-last value would need a copy; reshape makes it where needed.
        return _replaced(call, "reshape", _ATEN.reshape.default, *call.arguments.values())
    return call


def _named(
    function: Any, arguments: dict[str, Any], inputs: tuple[int, ...], shape: tuple[Dim, ...]
) -> Call:
    """The call under the operation's name without its overload."""
    name = getattr(function, "__name__", str(function))
    call = Call(name.rpartition(".")[0] or name, function, arguments, inputs)
    if call.op in ("batch_norm", "_native_batch_norm_legit_no_training"):
        names = ("input", "running_mean", "running_var", "weight", "bias", "eps")
        values = [arguments[name] for name in names]
        return _replaced(call, "batch_norm", ops.batch_norm, *values)
    if function is operator.getitem:
        return _replaced(call, "getitem", ops.element, *arguments.values())
    if call.op == "flatten":  # as it is decomposed; to rows, it becomes itself again
        return _replaced(call, "reshape", _ATEN.reshape.default, arguments["self"], list(shape))
    if function is _ATEN.conv2d.default:
        return _replaced(call, "conv2d", ops.conv2d, *arguments.values())
    if call.op == "linear":
        return _replaced(call, "linear", ops.linear, *arguments.values())
    if call.op == "rsub" and arguments["alpha"] == 1:
        return _replaced(call, "sub", ops.subtract, arguments["other"], arguments["self"])
    return call


def _simplified(call: Call, before: Node, shape: tuple[Dim, ...]) -> Call | None:
    """The call as one of a simpler operation, where it is one for a value of this shape."""
    flat = len(shape) == 2 and len(before.shape) > 2 and _same_rows(before.shape, shape)
    if flat and call.op in _VIEWS:
        return _flattened(call)
    if call.op == "slice" and _is_whole(call.arguments, before.shape):
        return _replaced(call, "alias", _ATEN.alias.default, In(0))
    if call.op == "squeeze" and before.shape:
        return _squeezed(call, before.shape)
    return None


def _squeezed(call: Call, shape: Sequence[Dim]) -> Call | None:
    """A squeeze without the rows' axis, which is one long in a batch of one row."""
    dims = call.arguments.get("dim", [*range(len(shape))])
    axes = [axis % len(shape) for axis in (dims if isinstance(dims, (list, tuple)) else [dims])]
    ones = [axis for axis in axes if shape[axis] == 1]
    if "dim" in call.arguments and len(ones) == len(axes):
        return None
    if not ones:
        return _replaced(call, "alias", _ATEN.alias.default, In(0))
    return _replaced(call, "squeeze", _ATEN.squeeze.dims, In(0), ones)


def _merged(call: Call, before: Node, nodes: Sequence[Node], shape: tuple[Dim, ...]) -> Call | None:
    """Two calls that take the axes of an image [N, C, H, W] one by one, as a single call."""
    if len(before.inputs) != 1 or before.first != In(0):
        return None
    image = nodes[before.inputs[0]]
    if len(image.shape) != 4 or len(shape) != 2 or not _same_rows(image.shape, shape):
        return None
    from_image = replace(call, inputs=(image.id,))
    pixel = image.shape[1:] == (shape[1], 1, 1)
    if pixel and call.op in ("squeeze", "select") and before.op in ("squeeze", "select"):
        return _flattened(from_image)
    means = call.op == "mean" == before.op
    if means and _averaged(before.arguments, 4) in (2, 3) and _averaged(call.arguments, 3) == 2:
        return _replaced(from_image, "mean", _ATEN.mean.dim, In(0), [2, 3])
    return None


def _flattened(call: Call) -> Call:
    return _replaced(call, "flatten", _ATEN.flatten.using_ints, In(0), 1)


def _replaced(call: Call, op: str, function: Callable[..., Any], *args: Any) -> Call:
    return Call(op, function, named(function, args), call.inputs)


def _first(arguments: dict[str, Any]) -> Any:
    return next(iter(arguments.values()), None)


def _same_rows(before: Sequence[Dim], after: Sequence[Dim]) -> bool:
    """Whether both begin with the rows of the batch."""
    first, second = before[0], after[0]
    return isinstance(first, Size) and isinstance(second, Size) and str(first) == str(second)


def _is_whole(arguments: dict[str, Any], shape: Sequence[Dim]) -> bool:
    """Whether a slice takes all of its axis."""
    size, end = shape[arguments["dim"]], arguments["end"]
    if arguments["start"] not in (0, None) or arguments["step"] != 1:
        return False
    most = size if isinstance(size, int) else torch.iinfo(torch.int64).max
    return end is None or (isinstance(end, int) and end >= most)


def _averaged(arguments: dict[str, Any], axes: int) -> int | None:
    """The only axis that a mean is taken over, if it is one and is left out."""
    dim = arguments.get("dim")
    if arguments.get("keepdim") or arguments["dtype"] is not None:
        return None
    if not isinstance(dim, list) or len(dim) != 1 or not isinstance(dim[0], int):
        return None
    return dim[0] % axes
