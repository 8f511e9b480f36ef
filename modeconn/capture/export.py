"""nn.Module → graph, by torch.export and an empty decomposition table.

The exported form is functional, still high level (linear, conv2d, layer_norm, …) and free of the
module's Python, so one table of rules covers every way of writing a network. What cannot be
exported (control flow that depends on the data, shapes fixed to one batch) runs as it is: the
submodule that holds it where the rest can be exported around it, else the whole module, as a node
that calls it (capture/opaque.py): slower, never wrong.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture import ops
from modeconn.capture.cache import graph_for, remember_copy
from modeconn.capture.closing import parts_of
from modeconn.capture.graph import Entry, Graph, In, Node, Size
from modeconn.capture.opaque import eval_mode, line_of, reason_of, tensors_of, whole
from modeconn.capture.stubs import stubs
from modeconn.capture.translate import graph_of
from modeconn.data.inputs import Inputs, arguments, call, describe, join, keys, leaves, rows, take
from modeconn.errors import ModeconnError

# Rows of the sample that the network is traced and checked with: enough to tell rows apart, and few
# enough to cost nothing.
_SAMPLE_ROWS = 4


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch.export: what stops it is reported in one line instead."""
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
    """Returns a model in a dtype and on a device: itself where it fits, else a converted copy."""
    tensors = [*model.parameters(), *model.buffers()]
    converted = [v for v in tensors if v.is_floating_point() and v.dtype != dtype]
    moved = [v for v in tensors if v.device != device]
    if not converted and not moved:
        return model
    made = copy.deepcopy(model).to(device=device, dtype=dtype)
    remember_copy(made, model)
    return made


def capture(model: nn.Module, sample: Inputs) -> Graph:
    """Captures a model, in eval mode, as a graph that takes any number of rows.

    Args:
        model: any module that takes tensors, as `prepare` returns it; it is left as it was.
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

        def holds(graph: Graph) -> bool:
            try:
                return _same(run(graph, model.state_dict(), x), expected)
            except Exception:  # parameters that are gone, shapes that have changed
                return False

        return graph_for(model, x, holds, lambda: _captured(model, x, expected))


def _captured(model: nn.Module, x: Inputs, expected: Any) -> Graph:
    """Captures all of a model, else closes the parts that cannot be exported, else the model."""
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
    """Checks that a graph gives the module's own outputs, and notes whether it mixes rows."""
    batches = (x, take(x, 0, 1), take(x, 1, rows(x)))
    whole, *parts = (run(graph, model.state_dict(), batch) for batch in batches)
    if not _same(whole, expected):
        raise ModeconnError("the exported graph does not give the module's own outputs")
    return replace(graph, mixes_rows=not _rows_apart(parts, expected, rows(x)))


def _rows_apart(parts: list[Any], whole: Any, count: int) -> bool:
    """Whether the outputs of two parts of a batch, joined, are the outputs of the batch."""
    first, rest, both = (tensors_of(out) for out in (*parts, whole))
    batched = [(a, b, c) for a, b, c in zip(first, rest, both) if c.dim() and len(c) == count]
    return all(_alike(torch.cat([a, b]), c) for a, b, c in batched)


def run(graph: Graph, entries: dict[str, Tensor], x: Inputs) -> Any:
    """Interprets a graph for one set of parameters and buffers, to check a capture."""
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
    program = export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return graph_of(program.run_decompositions({}), set(model.state_dict()), x)


def _opaque(model: nn.Module, x: Inputs, reason: str) -> Graph:
    """A graph of one node that calls the module with parameters and buffers swapped in."""
    count = Size(lambda n: n, "N")
    output = call(model, x)
    shape = (count, *output.shape[1:]) if isinstance(output, Tensor) and output.dim() else (count,)
    nodes = [
        Node(i, "input", ops.placeholder, {}, shape=(count, *v.shape[1:]), source="input")
        for i, v in enumerate(leaves(x))
    ]
    inputs = tuple(range(len(nodes)))
    module = whole(model, arguments(x), reason)
    given = {
        "tensors": [In(i) for i in inputs],
        "entries": [Entry(i) for i in range(len(module.names))],
    }
    source = type(model).__name__
    nodes.append(Node(len(nodes), "module", module, given, inputs, module.names, shape, source))
    return Graph(
        tuple(nodes),
        In(len(inputs)),
        {},
        fallback=reason,
        mixes_rows=_mixes_rows(model, x, output),
        inputs=tuple(keys(x)),
    )


def _mixes_rows(model: nn.Module, x: Inputs, output: Any) -> bool:
    """Whether a module's output for a batch is other than that for two parts of it, joined."""
    try:
        parts = [tensors_of(call(model, part)) for part in (take(x, 0, 1), take(x, 1, rows(x)))]
        joined = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        return not all(map(_alike, joined, tensors_of(output)))
    except (RuntimeError, ValueError):  # the module takes batches of one size only
        return True


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
