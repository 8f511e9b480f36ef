"""nn.Module → graph, by torch.export and an empty decomposition table.

That intermediate form is functional, still high level (linear, conv2d, layer_norm, …) and free of
the module's Python, so one table of rules covers every way of writing a network. What cannot be
exported (control flow that depends on the data, shapes fixed to one batch) runs as it is: the
submodule that holds it where the rest can be exported around it, else the whole module, as a node
that calls it (capture/opaque.py): slower, never wrong.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import operator
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.capture import ops
from modeconn.capture.graph import Entry, Graph, In, Node, Size
from modeconn.capture.normalize import canonical
from modeconn.capture.opaque import (
    eval_mode,
    line_of,
    parts_of,
    reason_of,
    stubs,
    tensors_of,
    whole,
)
from modeconn.data.inputs import Inputs, arguments, call, describe, join, keys, leaves, rows, take
from modeconn.errors import ModeconnError

# Rows of the sample that the network is traced and checked with.
_SAMPLE_ROWS = 4
# Tracing takes a good part of a second. A graph is taken up again if it still gives the module's
# own outputs.
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Graph]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export prints on its way to an exception, which is reported in one line instead."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def prepare(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model itself where it has that dtype and device already, else a converted copy: the user's is never changed."""
    tensors = [*model.parameters(), *model.buffers()]
    fits = all(
        (not v.is_floating_point() or v.dtype == dtype) and v.device == device for v in tensors
    )
    return model if fits else copy.deepcopy(model).to(device=device, dtype=dtype)


def capture(model: nn.Module, sample: Inputs) -> Graph:
    """Capture a model, in eval mode, as a graph that takes any number of rows.

    Args:
        model: any module that takes tensors; it is left as it was.
        sample: a few rows of input, of the dtype and on the device to compute with: a tensor, or a
            tuple or dict of them.

    Raises:
        ModeconnError: the model does not run on the sample.
    """
    x = take(sample, 0, _SAMPLE_ROWS)
    if rows(x) < 2:  # export takes a batch of one for a constant
        x = join([x, x])
    with eval_mode(model), torch.no_grad(), _quiet():
        try:
            expected = call(model, x)
        except Exception as error:
            raise ModeconnError(
                f"the model does not run on inputs of shape {describe(x)}: {line_of(error)}"
            ) from error
        known = _CAPTURED.setdefault(model, {})
        kind = tuple((key, v.dtype, v.device, *v.shape[1:]) for key, v in zip(keys(x), leaves(x)))
        if kind not in known or not _holds(known[kind], model, x, expected):
            known.pop(kind, None)
            graph = _captured(model, x, expected)
            if graph.fallback:
                return graph
            known[kind] = graph
        return known[kind]


def _captured(model: nn.Module, x: Inputs, expected: Any) -> Graph:
    """A model's graph: of all of it, else with the parts that cannot be exported closed, else of a single node."""
    try:
        return _checked(_export(model, x), model, x, expected)
    except Exception as error:  # whatever export stumbles over, the module itself still runs
        failure = error
    fewer = take(x, 0, rows(x) - 1)
    parts = parts_of(model, [lambda: call(model, x), lambda: call(model, fewer)])
    if parts:
        with contextlib.suppress(Exception):
            with stubs(parts):
                graph = replace(_export(model, x), closed=tuple(map(str, parts)))
            return _checked(graph, model, x, expected)
    return _opaque(model, x, reason_of(failure))


def _checked(graph: Graph, model: nn.Module, x: Inputs, expected: Any) -> Graph:
    """The graph, if it gives the module's own outputs, with what it does to the rows of a batch."""
    whole, *parts = (
        run(graph, model.state_dict(), part) for part in (x, take(x, 0, 1), take(x, 1, rows(x)))
    )
    if not _same(whole, expected):
        raise ModeconnError("the exported graph does not give the module's own outputs")
    return replace(graph, mixes_rows=not _rows_apart(parts, expected, rows(x)))


def _holds(graph: Graph, model: nn.Module, x: Inputs, expected: Any) -> bool:
    """Whether a graph captured earlier is still the module's: it may have been changed since."""
    try:
        return _same(run(graph, model.state_dict(), x), expected)
    except Exception:  # entries that are gone, shapes that have changed
        return False


def _rows_apart(parts: list[Any], whole: Any, count: int) -> bool:
    """Whether the outputs of two parts of a batch, put together, are the outputs of the batch."""
    first, rest, both = (tensors_of(out) for out in (*parts, whole))
    return all(
        _alike(torch.cat([a, b]), c)
        for a, b, c in zip(first, rest, both)
        if c.dim() and len(c) == count
    )


def run(graph: Graph, entries: dict[str, Tensor], x: Inputs) -> Any:
    """The graph's output for one set of entries: a plain interpreter, used to check a capture."""
    values: dict[int, Any] = dict(enumerate(graph.given(x)))
    for node in graph.nodes[len(values) :]:
        tensors = [
            graph.constants[name] if name in graph.constants else entries[name]
            for name in node.entries
        ]
        values[node.id] = node.run([values[i] for i in node.inputs], tensors, rows(x))
    return graph.fill_output(values)


def _export(model: nn.Module, x: Inputs) -> Graph:
    from torch.export import Dim, export

    batch = {0: Dim("batch", min=1)}
    args, kwargs = arguments(x)
    shapes: Any = dict.fromkeys(kwargs, batch) or tuple(batch for _ in args)
    program = export(model, args, kwargs, dynamic_shapes=shapes, strict=False).run_decompositions(
        {}
    )
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    persistent = model.state_dict().keys()
    constants: dict[str, Tensor] = {}
    for placeholder, target in {**names, **lifted}.items():
        if placeholder in lifted or target not in persistent:
            names[placeholder] = target
            constants[target] = (
                program.constants[target]
                if target in program.constants
                else program.state_dict[target]
            )

    nodes: list[Node] = []
    ids: dict[str, int] = {}  # fx node name → node id
    for fx in program.graph.nodes:
        if fx.op == "placeholder" and fx.name not in names:
            ids[fx.name] = _add(
                nodes, "input", ops.identity, (), shape=_shape(fx.meta["val"]), source="input"
            )
        elif fx.op == "call_function" and isinstance(fx.meta.get("val"), Tensor | tuple | list):
            source = fx.args[0] if fx.target is operator.getitem else None
            if (
                source is not None
                and source.name in ids
                and nodes[ids[source.name]].op == "batch_norm"
            ):
                # eval-mode batch norm returns one tensor and two empty ones
                ids[fx.name] = ids[source.name]
            elif source is not None and (part := _part(source, fx.args[1])) is not None:
                ids[fx.name] = _add_call(nodes, fx, ids, names, *part)
            elif _part(fx, 0) is None:
                ids[fx.name] = _add_call(nodes, fx, ids, names)

    def leaf(item: Any) -> Any:
        return In(ids[item.name]) if isinstance(item, torch.fx.Node) else item

    users = set(signature.user_outputs)
    (returned,) = [fx.args[0] for fx in program.graph.nodes if fx.op == "output"]
    flat = [
        leaf(item) for item in returned if not isinstance(item, torch.fx.Node) or item.name in users
    ]
    output = pytree.tree_unflatten(flat, program.call_spec.out_spec)
    return Graph(tuple(nodes), output, constants, inputs=_order(program, x))


def _order(program: Any, x: Inputs) -> tuple[Any, ...]:
    """What the exported program's inputs are called, in its order: keywords may come in the order of the signature."""
    if not isinstance(x, Mapping):
        return tuple(keys(x))
    order = tuple(program.call_spec.in_spec.children()[1].context)
    return order if set(order) == set(x) else tuple(x)


def _add(
    nodes: list[Node], op: str, function: Callable[..., Any], args: tuple[Any, ...], **more: Any
) -> int:
    nodes.append(Node(len(nodes), op, function, args, **more))
    return len(nodes) - 1


def _part(fx: Any, number: int) -> tuple[Any, tuple[Any, ...]] | None:
    """A part of what splits a tensor along an axis, as an operation on that tensor and its arguments; None for the rest."""
    name = str(fx.target).removeprefix("aten.").split(".")[0]
    if name not in ("split", "split_with_sizes", "chunk", "unbind"):
        return None
    place = 1 if name == "unbind" else 2
    axis = fx.args[place] if len(fx.args) > place else fx.kwargs.get("dim", 0)
    if name == "unbind":
        return torch.ops.aten.select.int, (fx.args[0], axis, number)
    ends = list(itertools.accumulate(part.shape[axis] for part in fx.meta["val"]))
    if not all(isinstance(end, int) for end in ends):
        return None  # along the rows
    return torch.ops.aten.slice.Tensor, (fx.args[0], axis, ([0, *ends])[number], ends[number])


def _add_call(
    nodes: list[Node],
    fx: Any,
    ids: dict[str, int],
    names: dict[str, str],
    target: Any = None,
    given: tuple[Any, ...] = (),
) -> int:
    """Add a call as a node; `target` and `given`: of another operation in its place."""
    inputs: list[int] = []
    entries: list[str] = []

    def template(item: Any) -> Any:
        if isinstance(item, torch.fx.Node):
            value = item.meta.get("val")
            if item.name in names:
                entries.append(names[item.name])
                return Entry(len(entries) - 1)
            if item.name in ids:
                inputs.append(ids[item.name])
                return In(len(inputs) - 1)
            return _size(value)
        if isinstance(item, (list, tuple)):
            return [template(part) for part in item]
        return item

    args = tuple(template(item) for item in (given or fx.args))
    kwargs = {key: template(item) for key, item in fx.kwargs.items()}
    value = fx.meta["val"]
    shape = _shape(value[0] if isinstance(value, tuple | list) else value)
    op, function, args, kwargs = canonical(target or fx.target, args, kwargs, nodes, inputs, shape)
    return _add(
        nodes,
        op,
        function,
        args,
        kwargs=kwargs,
        inputs=tuple(inputs),
        entries=tuple(entries),
        shape=shape if op == "batch_norm" else _shape(value),
        source=_source(fx),
        batched=any(nodes[i].batched for i in inputs),
        random=_draws(fx, op),
    )


def _draws(fx: Any, op: str) -> bool:
    """Whether an operation draws random numbers, as it is called."""
    if op == "scaled_dot_product_attention":  # query, key, value, attn_mask, dropout_p
        return float(fx.args[4] if len(fx.args) > 4 else fx.kwargs.get("dropout_p", 0.0)) > 0
    # their last arguments are dropout, train, bidirectional, batch_first
    if op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return bool(fx.args[-3]) and float(fx.args[-4]) > 0
    return torch.Tag.nondeterministic_seeded in getattr(fx.target, "tags", ())


def _opaque(model: nn.Module, x: Inputs, reason: str) -> Graph:
    """One node that calls the module with the entries swapped in."""
    count = Size(lambda n: n, "N")
    output = call(model, x)
    shape = (count, *output.shape[1:]) if isinstance(output, Tensor) and output.dim() else (count,)
    nodes = [
        Node(i, "input", ops.identity, (), shape=(count, *v.shape[1:]), source="input")
        for i, v in enumerate(leaves(x))
    ]
    inputs = tuple(range(len(nodes)))
    module = whole(model, arguments(x), reason)
    leaf = (list(map(In, inputs)), list(map(Entry, range(len(module.names)))))
    nodes.append(
        Node(len(nodes), "module", module, leaf, inputs, module.names, shape, type(model).__name__)
    )
    try:
        flat = zip(
            *(tensors_of(call(model, part)) for part in (take(x, 0, 1), take(x, 1, rows(x)))),
            strict=True,
        )
        mixes = not all(map(_alike, [torch.cat(pair) for pair in flat], tensors_of(output)))
    except (RuntimeError, ValueError):  # it takes batches of one size only
        mixes = True
    return Graph(
        tuple(nodes), In(len(inputs)), {}, fallback=reason, mixes_rows=mixes, inputs=tuple(keys(x))
    )


def _shape(value: Any) -> tuple[int | Size, ...]:
    return tuple(_size(d) for d in value.shape) if isinstance(value, Tensor) else ()


def _size(value: Any) -> int | Size:
    """An int, or a function of the batch size for a symbolic one."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    expression = value.node.expr
    symbols = list(expression.free_symbols)
    if not symbols:
        return int(expression)
    if len(symbols) > 1:
        raise ModeconnError(f"a shape depends on more than the batch size: {expression}")
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


def _same(a: Any, b: Any) -> bool:
    flat_a, flat_b = tensors_of(a), tensors_of(b)
    return len(flat_a) == len(flat_b) and all(map(_alike, flat_a, flat_b))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to what the order of summation may change: these are runs of the same operations."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = b.abs().max().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
