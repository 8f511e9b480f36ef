"""Translation of an exported program (torch.export, a graph of torch.fx) into a `Graph`."""

from __future__ import annotations

import itertools
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.capture import ops
from modeconn.capture.graph import Dim, Entry, Graph, In, Node, Size
from modeconn.capture.normalize import normalize
from modeconn.capture.signature import named
from modeconn.data.inputs import Inputs, keys
from modeconn.errors import ModeconnError

_SPLITS = ("split", "split_with_sizes", "chunk", "unbind")
# Operations that may leave a value as it is: see `_unchanged`.
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_COPIES = ("clone", "alias", "contiguous", "detach", "lift_fresh", "lift_fresh_copy")
_CONVERSIONS = ("to", "_to_copy", "type_as")
_RESHAPED = ("view", "_unsafe_view", "reshape", "expand")


def graph_of(program: Any, persistent: set[str], x: Inputs) -> Graph:
    """Translates an exported program.

    Args:
        program: a `torch.export.ExportedProgram`, functional, of high-level operations.
        persistent: names of the parameters and buffers in the model's state dict; all others are
            constants of the graph.
        x: the sample that the program was exported with.
    """
    names, constants = _parameters(program, persistent)
    translation = _Translation(names)
    for fx in program.graph.nodes:
        translation.add(fx)
    output = translation.output(program)
    return Graph(tuple(translation.nodes), output, constants, inputs=_order(program, x))


def _parameters(program: Any, persistent: set[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The names of parameters, buffers and constants by placeholder, and the constants."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    values = {**program.state_dict, **program.constants}
    constants: dict[str, Tensor] = {}
    for placeholder, name in {**names, **lifted}.items():
        if placeholder in lifted or name not in persistent:
            names[placeholder] = name
            constants[name] = values[name]
    return names, constants


def _order(program: Any, x: Inputs) -> tuple[Any, ...]:
    """Names of the program's inputs in its order: keywords may be ordered as in the signature."""
    if not isinstance(x, Mapping):
        return tuple(keys(x))
    order = tuple(program.call_spec.in_spec.children()[1].context)
    return order if set(order) == set(x) else tuple(x)


class _Translation:
    """The nodes translated so far.

    Args:
        names: of parameters, buffers and constants, by placeholder.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.nodes: list[Node] = []
        self._names = names
        self._ids: dict[str, int] = {}  # name of an fx node → id of the node

    def add(self, fx: Any) -> None:
        """Adds an fx node, unless it has no tensor for a value or is only a part of another."""
        if fx.op == "placeholder" and fx.name not in self._names:
            self._add_input(fx)
        elif fx.op == "call_function" and isinstance(fx.meta.get("val"), Tensor | tuple | list):
            self._add_operation(fx)

    def _add_input(self, fx: Any) -> None:
        self._ids[fx.name] = number = len(self.nodes)
        shape = _shape(fx.meta["val"])
        self.nodes.append(Node(number, "input", ops.placeholder, {}, shape=shape, source="input"))

    def _add_operation(self, fx: Any) -> None:
        given = named(fx.target, fx.args, fx.kwargs)
        same = self._ids.get(getattr(_unchanged(fx, given), "name", ""))
        if same is not None:
            self._ids[fx.name] = same
            return
        if fx.target is not operator.getitem:
            if _packet(fx) not in _SPLITS or _part(fx, 0) is None:
                self._add_call(fx, fx.target, given)
            return
        source, number = fx.args
        known = self._ids.get(source.name)
        if known is not None and self.nodes[known].op == "batch_norm":
            # Batch norm in eval mode returns its value and two empty tensors.
            self._ids[fx.name] = known
        elif _packet(source) in _SPLITS and (part := _part(source, number)) is not None:
            self._add_call(fx, *part)
        else:
            self._add_call(fx, fx.target, given)

    def _add_call(self, fx: Any, function: Any, given: dict[str, Any]) -> None:
        """Adds the call of a function, in the place of an fx node."""
        inputs: list[int] = []
        entries: list[str] = []
        arguments = {name: self._template(value, inputs, entries) for name, value in given.items()}
        value = fx.meta["val"]
        shape = _shape(value[0] if isinstance(value, tuple | list) else value)
        call = normalize(function, arguments, self.nodes, tuple(inputs), shape)
        if call.op == "alias" and call.inputs:
            self._ids[fx.name] = call.inputs[0]
            return
        self._ids[fx.name] = number = len(self.nodes)
        self.nodes.append(
            Node(
                number,
                call.op,
                call.function,
                call.arguments,
                call.inputs,
                tuple(entries),
                shape if call.op == "batch_norm" else _shape(value),
                _source(fx),
                batched=any(self.nodes[i].batched for i in call.inputs),
                random=_draws(call.op, call.arguments, function),
            )
        )

    def _template(self, item: Any, inputs: list[int], entries: list[str]) -> Any:
        """An argument with leaves for fx nodes; adds what they stand for to `inputs`, `entries`."""
        if isinstance(item, (list, tuple)):
            return [self._template(part, inputs, entries) for part in item]
        if not isinstance(item, torch.fx.Node):
            return item
        if item.name in self._names:
            entries.append(self._names[item.name])
            return Entry(len(entries) - 1)
        if item.name in self._ids:
            inputs.append(self._ids[item.name])
            return In(len(inputs) - 1)
        return _size(item.meta.get("val"))

    def output(self, program: Any) -> Any:
        """The template of the program's output."""
        users = set(program.graph_signature.user_outputs)
        (returned,) = [fx.args[0] for fx in program.graph.nodes if fx.op == "output"]
        flat = []
        for item in returned:
            if not isinstance(item, torch.fx.Node):
                flat.append(item)
            elif item.name in users:
                flat.append(In(self._ids[item.name]))
        return pytree.tree_unflatten(flat, program.call_spec.out_spec)


def _packet(fx: Any) -> str:
    """The name of an fx node's operation, without its overload."""
    return str(fx.target).removeprefix("aten.").split(".")[0]


def _unchanged(fx: Any, given: dict[str, Any]) -> Any:
    """The argument whose numbers an operation returns as they are; None where there is none.

    Exported programs are functional: nothing writes into a value, and a copy is the value.
    """
    packet = _packet(fx)
    first: Any = next(iter(given.values()), None)
    if packet == "cat":
        return first[0] if len(first) == 1 else None
    if packet in _DROPOUTS:
        return None if given["train"] else first
    if packet in _COPIES:
        return first
    value = getattr(first, "meta", {}).get("val")
    result = fx.meta["val"]
    if not isinstance(value, Tensor) or not isinstance(result, Tensor):
        return None
    if packet in _CONVERSIONS:
        return first if (value.dtype, value.device) == (result.dtype, result.device) else None
    shapes = [list(map(str, tensor.shape)) for tensor in (value, result)]
    return first if packet in _RESHAPED and shapes[0] == shapes[1] else None


def _part(fx: Any, number: int) -> tuple[Any, dict[str, Any]] | None:
    """A part of a split as an operation on the whole and its arguments; None for parts of rows."""
    given = named(fx.target, fx.args, fx.kwargs)
    whole, axis = given["self"], given["dim"]
    if _packet(fx) == "unbind":
        select = torch.ops.aten.select.int
        return select, named(select, (whole, axis, number))
    ends = [0, *itertools.accumulate(part.shape[axis] for part in fx.meta["val"])]
    if not all(isinstance(end, int) for end in ends):
        return None
    take = torch.ops.aten.slice.Tensor
    return take, named(take, (whole, axis, ends[number], ends[number + 1]))


def _draws(op: str, arguments: dict[str, Any], function: Any) -> bool:
    """Whether an operation draws random numbers, as it is called."""
    if op == "scaled_dot_product_attention":
        return float(arguments["dropout_p"]) > 0
    if op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return bool(arguments["train"]) and float(arguments["dropout"]) > 0
    return torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())


def _shape(value: Any) -> tuple[Dim, ...]:
    return tuple(_size(d) for d in value.shape) if isinstance(value, Tensor) else ()


def _size(value: Any) -> Dim:
    """An int, or a function of the batch size for a symbolic one."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    expression = value.node.expr
    symbols = list(expression.free_symbols)
    if not symbols:
        return int(expression)
    if len(symbols) > 1:
        raise ModeconnError(f"a shape is {expression}: expected a function of the batch size")
    if expression == symbols[0]:
        return Size(lambda rows: rows, "N")
    known: dict[int, int] = {}

    def of(rows: int) -> int:
        if rows not in known:
            known[rows] = int(expression.subs(symbols[0], rows))
        return known[rows]

    return Size(of, str(expression).replace(str(symbols[0]), "N"))


def _source(fx: Any) -> str:
    """The module's path, and the line of the user's code where that is not the module itself."""
    stack = fx.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', fx.meta.get("stack_trace") or "")
    frames = [(file, line) for file, line in frames if f"{os.sep}torch{os.sep}" not in file]
    where = f"{Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""
    return f"{path} {where}".strip()
