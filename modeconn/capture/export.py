"""nn.Module → graph, by torch.export and an empty decomposition table.

The exported form is functional, still high level (linear, conv2d, layer_norm, …) and free of the
module's Python, so one table of rules covers every way of writing a network. What cannot be
exported (control flow that depends on the data, shapes fixed to one batch) runs as it is: the
submodule that holds it where the rest can be exported around it, else the whole module, as a node
that calls it (capture/opaque.py): slower, never wrong.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.capture import ops
from modeconn.capture.cache import graph_for, is_known
from modeconn.capture.closing import parts_of
from modeconn.capture.decompose import decomposed
from modeconn.capture.direct import direct_graph
from modeconn.capture.graph import Entry, Graph, In, Node, Size
from modeconn.capture.mixing import mixes, run, same
from modeconn.capture.noise import seeded, undrawn
from modeconn.capture.opaque import reason_of, tensors_of, whole
from modeconn.capture.optimisations import current
from modeconn.capture.quiet import quietly, silence_export
from modeconn.capture.stubs import stubs
from modeconn.capture.translate import graph_of
from modeconn.capture.trial import Runner, Trial, on_trial, output_of, saved_tensors
from modeconn.data.inputs import Inputs, arguments, join, keys, leaves, rows, take
from modeconn.errors import ModeconnError, Unsupported, out_of_memory

# Rows of the sample that the network is traced and checked with: enough to tell rows apart, and few
# enough to cost nothing.
_SAMPLE_ROWS = 4


def prepare(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Runner:
    """Prepares to compute with a module in a dtype and on a device; it stays as it is."""
    return Runner(model, dtype, device)


def capture(model: Runner | nn.Module, sample: Inputs) -> Graph:
    """Captures a model, in eval mode, as a graph that takes any number of rows.

    Args:
        model: any module that takes tensors, as `prepare` returns it, or as it is; it is left as it
            was, and so are the inputs.
        sample: rows of input, of the dtype and on the device to compute with: a tensor, or a tuple
            or dict of them. A few suffice, but whether rows depend on each other is looked for with
            all of them, where it is not proved.

    Raises:
        ModeconnError: the model does not run on the sample.
    """
    runner = model if isinstance(model, Runner) else Runner(model)
    runner.expect(sample)
    with torch.no_grad():
        return graph_for(runner, sample, lambda: _tried(runner, sample), mixes)


def is_at_hand(model: Runner, sample: Inputs) -> bool:
    """Whether a model was captured before, or is now: without torch.export, in milliseconds.

    Args:
        model, sample: as for `capture`.
    """
    model.expect(sample)
    if is_known(model, sample):
        return True
    if not current().direct:
        return False
    with contextlib.suppress(ModeconnError, Unsupported), torch.no_grad():
        graph_for(model, sample, lambda: _directly(model, sample), mixes)
        return True
    return False


def _directly(runner: Runner, sample: Inputs) -> Graph:
    """Captures a module without torch.export; raises Unsupported where that cannot be."""
    x = _few(sample)
    with quietly(), undrawn(leaves(x)[0].device):
        trial = on_trial(runner, x)
        made = None if trial.impure else direct_graph(trial.module, x)
        if made is None:
            raise Unsupported("the model calls what is not known without torch.export")
        return _described(_checked(made, trial.module, x, trial.expected), trial)


def _few(sample: Inputs) -> Inputs:
    """Rows to trace and check a network with."""
    x = take(sample, 0, _SAMPLE_ROWS)
    return x if rows(x) > 1 else join([x, x])  # export takes a batch of one for a constant


def _described(graph: Graph, trial: Trial) -> Graph:
    example = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), trial.expected)
    return replace(graph, example=example, random=trial.random)


def _tried(runner: Runner, sample: Inputs) -> Graph:
    """Captures a module that no graph is known of."""
    x = _few(sample)
    with quietly(), undrawn(leaves(x)[0].device):
        try:
            return _graph(runner, x)
        except ModeconnError as error:
            failure = error
        # Some networks take batches of one size alone: perhaps that of the data.
        runner.takes = rows(sample)
        try:
            return _graph(runner, sample)
        except ModeconnError:
            runner.takes = 0
    hint = _hint_of_names(runner.model, sample) or _hint_of_kind(sample)
    hint = hint or _hint(str(failure), rows(x), rows(sample))
    raise ModeconnError(f"{failure}{hint}") from failure


def _hint_of_names(model: nn.Module, sample: Inputs) -> str:
    """Say which inputs of a dict `forward` has no argument for, where a model does not run."""
    if not isinstance(sample, dict):
        return ""
    taken = inspect.signature(model.forward).parameters
    more = [repr(name) for name in sample if name not in taken]
    if not more or any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        return ""
    return (
        f" (forward takes {', '.join(taken)}, and the batches have {', '.join(more)}, too: leave "
        "out what it does not take)"
    )


def _hint_of_kind(sample: Inputs) -> str:
    """Say what whole numbers may have been meant as, where a model does not run on them."""
    first = leaves(sample)[0]
    if first.is_floating_point() or first.is_complex():
        return ""
    if first.dim() == 1:
        return " (are inputs and targets swapped? expected (inputs, targets))"
    return " (where it expects numbers and no tokens, give inputs as floating point: x.float())"


def _hint(text: str, few: int, whole: int) -> str:
    """Say how to give batches of one size, where a message has the number of rows in it."""
    if not re.search(rf"\b{few}\b", text.partition("dtype")[2]):
        return ""
    return (
        f" (on {few} rows; on {whole} it fails, too: where it is written for batches of one size, "
        "pass that as batch_size, or as many rows)"
    )


def _graph(runner: Runner, x: Inputs) -> Graph:
    """Captures a module on these rows."""
    trial = on_trial(runner, x)
    if trial.impure:
        graph = _opaque(trial.module, x, trial.expected, f"its {trial.impure}", runner.copy)
    elif runner.takes:
        reason = f"it runs on batches of {runner.takes} rows alone"
        graph = replace(_opaque(trial.module, x, trial.expected, reason), takes=runner.takes)
    else:
        graph = _captured(trial.module, x, trial.expected)
    return _described(graph, trial)


def _captured(model: nn.Module, x: Inputs, expected: Any) -> Graph:
    """Captures all of a model, else closes the parts that cannot be exported, else the model.

    Args:
        model: a copy in eval mode.
    """
    made = direct_graph(model, x) if current().direct else None
    if made is not None:
        with _stumbling():
            return _checked(made, model, x, expected)
    try:
        return _checked(_export(model, x), model, x, expected)
    except Exception as error:  # whatever export stumbles over, the module itself still runs
        if out_of_memory(error):
            raise
        failure = error
    if "Constraints violated" in str(failure):
        # A `len(x)` is one number for a function that runs, and of any batch for its bytecode.
        with _stumbling():
            return _checked(_export(model, x, strict=True), model, x, expected)
    if tensors_of(expected) and any(map(_is_unknown, pytree.tree_leaves(expected))):
        with _stumbling():
            return _known_outputs(model, x, expected)
    fewer = take(x, 0, rows(x) - 1)
    output_of(model, fewer)  # raises where it runs on batches of this size alone
    parts = parts_of(model, [lambda: output_of(model, x), lambda: output_of(model, fewer)])
    if parts:
        with _stumbling():
            with stubs(parts):
                graph = replace(_export(model, x), closed=tuple(map(str, parts)))
            return _checked(graph, model, x, expected)
    return _opaque(model, x, expected, reason_of(failure))


@contextlib.contextmanager
def _stumbling() -> Iterator[None]:
    """Within, whatever export stumbles over is left to another way; memory is not."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise


def _checked(graph: Graph, model: nn.Module, x: Inputs, expected: Any) -> Graph:
    """Checks that a graph gives the module's own outputs, with its weights and with others.

    The other weights are half of its own, which is exact and undone afterwards. They show what was
    computed from weights while the module was exported.
    """
    if not _agrees(graph, model, x, expected):
        raise ModeconnError("the exported graph does not give the module's own outputs")
    with _halved(model):
        agrees = _agrees(graph, model, x, output_of(model, x))
    if not agrees:
        raise ModeconnError("the exported graph holds what was computed from the weights")
    return graph


def _agrees(graph: Graph, model: nn.Module, x: Inputs, expected: Any) -> bool:
    state = saved_tensors(model)
    if same(run(graph, state, x), expected):
        return True
    if not any(node.random for node in graph.nodes):
        return False
    device = leaves(x)[0].device
    with seeded(0, device):  # a network that draws numbers is to draw the same ones
        expected = output_of(model, x)
    with seeded(0, device):
        return same(run(graph, state, x), expected)


@contextlib.contextmanager
def _halved(model: nn.Module) -> Iterator[None]:
    """Within, all that a state dict holds of a module is half of what it is."""
    saved = set(saved_tensors(model))
    tensors = [*model.parameters(), *(v for name, v in model.named_buffers() if name in saved)]
    weights = [v for v in tensors if v.is_floating_point()]
    for weight in weights:
        weight.mul_(0.5)
    try:
        yield
    finally:
        for weight in weights:
            weight.mul_(2.0)


def _export(model: nn.Module, x: Inputs, strict: bool = False) -> Graph:
    silence_export()
    from torch.export import Dim, export

    batch = {0: Dim("batch", min=1)}
    args, kwargs = arguments(x)
    # By the names of the signature: arguments may be gathered in *args.
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(lambda _: batch, dict(given))
    program = export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    return graph_of(decomposed(program), set(model.state_dict()), x)


def _known_outputs(model: nn.Module, x: Inputs, output: Any) -> Graph:
    """Captures a module whose output holds objects that torch.export does not know, without them.

    Caches of transformers are such: losses read the logits, and the objects are None.
    """
    forward, own = model.forward, dict(vars(model))

    def without(*args: Any, **kwargs: Any) -> Any:
        return _tensors_in(forward(*args, **kwargs))

    vars(model)["forward"] = functools.wraps(forward)(without)
    try:
        return _checked(_export(model, x), model, x, _tensors_in(output))
    finally:
        vars(model).pop("forward")
        vars(model).update(own)


def _is_unknown(leaf: Any) -> bool:
    return leaf is not None and not isinstance(leaf, (Tensor, int, float, str, bool))


def _tensors_in(output: Any) -> Any:
    """An output with None for whatever is neither a tensor nor a plain value."""
    return pytree.tree_map(lambda leaf: None if _is_unknown(leaf) else leaf, output)


def _opaque(
    model: nn.Module,
    x: Inputs,
    output: Any,
    reason: str,
    fresh: Callable[[], nn.Module] | None = None,
) -> Graph:
    """A graph of one node that calls the module with parameters and buffers swapped in.

    Args:
        fresh: makes copies of the module, one for each call, to be loaded before `eval()`.
    """
    count = Size(lambda n: n, "N")
    shape = (count, *output.shape[1:]) if isinstance(output, Tensor) and output.dim() else (count,)
    nodes = [
        Node(i, "input", ops.placeholder, {}, shape=(count, *v.shape[1:]), source="input")
        for i, v in enumerate(leaves(x))
    ]
    inputs = tuple(range(len(nodes)))
    module = whole(model, arguments(x), reason, fresh)
    given = {
        "tensors": [In(i) for i in inputs],
        "entries": [Entry(i) for i in range(len(module.names))],
    }
    source = type(model).__name__
    nodes.append(Node(len(nodes), "module", module, given, inputs, module.names, shape, source))
    return Graph(tuple(nodes), In(len(inputs)), {}, fallback=reason, inputs=tuple(keys(x)))
