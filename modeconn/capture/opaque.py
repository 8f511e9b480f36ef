"""Modules that run as they are: what a graph calls where torch.export cannot look inside.

A branch that depends on the data, a custom function that does not trace: only the submodule that
holds it is kept closed. While the rest of the network is exported, the closed part's `forward` is a
custom operation of which the shapes alone are known; in the graph, that operation becomes a node
that calls the module, with the entries of the point swapped in.
"""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from modeconn.errors import ModeconnError

# Per batch norm the names of its running mean and variance.
Names = tuple[str, str]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, with every submodule's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


_TENSOR = "a tensor goes here"


@dataclass(frozen=True)
class Structure:
    """A nest of tensors and other things: what a module was called with, or returned, without the tensors."""

    others: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, value: Any) -> tuple[Structure, list[Tensor]]:
        """The structure of a value, and its tensors in order."""
        flat, spec = pytree.tree_flatten(value)
        return cls(tuple(_TENSOR if isinstance(v, Tensor) else v for v in flat), spec), tensors_of(
            flat
        )

    def filled(self, tensors: Sequence[Any]) -> Any:
        """The value with these tensors."""
        given = iter(tensors)
        return pytree.tree_unflatten(
            [next(given) if v is _TENSOR else v for v in self.others], self.spec
        )


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass
class Call:
    """What a module was called with and what it returned."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any


@dataclass(eq=False)
class Opaque:
    """A module as a function (its tensors, its entries) → the tensors of its output.

    Attributes:
        module: it, in the dtype and on the device to compute with; it is left as it was.
        path: its name in the network, "" for the network itself.
        reason: why it is kept closed, with the line where the export stopped.
        arguments: the structure of what it is called with.
        output: the structure of what it returns; None for the network itself, whose output is
            handed on as it is.
        shapes: per tensor of the output its dtype and sizes; those that follow from the rows as
            (tensor, axis, factor).
    """

    module: nn.Module
    path: str
    reason: str
    arguments: Structure
    output: Structure | None = None
    shapes: list[tuple[torch.dtype, list[Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = tuple(self.module.state_dict())

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__}): {self.reason}"

    def __call__(self, tensors: Sequence[Tensor], entries: Sequence[Tensor]) -> Any:
        out = self._run(tensors, dict(zip(self.names, entries)))
        return out if self.output is None else tensors_of(out)

    def _run(self, tensors: Sequence[Tensor], state: dict[str, Tensor]) -> Any:
        args, kwargs = self.arguments.filled(tensors)
        with eval_mode(self.module):
            return functional_call(self.module, state, args, kwargs, tie_weights=False)

    def norms(self) -> list[tuple[str, _BatchNorm]]:
        """Its batch norms that keep statistics, by name."""
        return [
            (k, m)
            for k, m in self.module.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None
        ]

    def statistics(self) -> list[Names]:
        """The names of their statistics, among the module's entries."""
        return [
            (f"{name}.running_mean".lstrip("."), f"{name}.running_var".lstrip("."))
            for name, _ in self.norms()
        ]

    def training(self, tensors: Sequence[Tensor], entries: Sequence[Tensor]) -> list[Tensor]:
        """The same with its batch norms in training mode: the output's tensors, then each norm's mean and variance."""
        norms = self.norms()
        state = dict(zip(self.names, entries))
        for name, norm in norms:
            prefix = f"{name}." if name else ""
            state |= {
                f"{prefix}{key}": torch.zeros_like(buffer)
                for key, buffer in norm.named_buffers(recurse=False)
            }
        momenta = [norm.momentum for _, norm in norms]
        args, kwargs = self.arguments.filled(tensors)
        with eval_mode(self.module):
            try:
                for _, norm in norms:
                    norm.training, norm.momentum = True, None
                out = functional_call(self.module, state, args, kwargs, tie_weights=False)
            finally:
                for (_, norm), momentum in zip(norms, momenta):
                    norm.momentum = momentum
        return [*tensors_of(out), *(state[name] for pair in self.statistics() for name in pair)]


def whole(
    model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], reason: str
) -> Opaque:
    """The network itself as one closed part."""
    return Opaque(model, "", reason, Structure.of(arguments)[0])


def parts_of(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> list[Opaque]:
    """The smallest submodules to keep closed so that each module around them can be exported on its own.

    Args:
        model: in eval mode; exporting it as it is has failed.
        runs: call the model with two different numbers of rows.

    Returns:
        parts in the order of the network; none if what cannot be exported is the network's own
            forward.
    """
    calls = _recorded(model, runs)
    found: list[Opaque] = []

    def search(module: nn.Module, path: str) -> bool:
        """Close what has to be closed below a module; whether the module itself can be exported then."""
        before = len(found)
        for inner, child in _called(module, path, calls):
            failure = _failure(child, calls[id(child)], found)
            if failure is None or search(child, inner):
                continue
            part = _closed(child, inner, calls[id(child)], failure)
            if part is None:
                del found[before:]
                return False
            found.append(part)
        fits = len(found) > before and (
            module is model or _failure(module, calls[id(module)], found) is None
        )
        if not fits:
            del found[before:]
        return fits

    search(model, "")
    return found


def _recorded(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> dict[int, list[Call]]:
    """What every submodule was called with, by its id: in each run the same number of times, else it is left out."""
    calls: dict[int, list[list[Call]]] = {}
    hooks = []
    for number, run in enumerate(runs):
        for module in model.modules():

            def note(
                module: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number
            ) -> None:
                calls.setdefault(id(module), [[] for _ in runs])[number].append(
                    Call((args, kwargs), output)
                )

            hooks.append(module.register_forward_hook(note, with_kwargs=True))
        try:
            run()
        except Exception:  # it takes batches of one size only, and so does some part of it
            return {}
        finally:
            for hook in hooks:
                hook.remove()
    return {
        key: [call for pair in zip(*each) for call in pair]
        for key, each in calls.items()
        if len(set(map(len, each))) == 1
    }


def _called(
    module: nn.Module, path: str, calls: dict[int, list[Call]]
) -> Iterator[tuple[str, nn.Module]]:
    """The nearest submodules that were called, by name; lists and dicts of modules are looked into."""
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if id(child) in calls:
            yield inner, child
        else:
            yield from _called(child, inner, calls)


class _Alone(nn.Module):
    """A submodule as a network of its own, from a list of tensors to a list of tensors."""

    def __init__(self, inner: nn.Module, arguments: Structure) -> None:
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs = self.arguments.filled(tensors)
        return tensors_of(self.inner(*args, **kwargs))


def _failure(
    module: nn.Module, calls: Sequence[Call], closed: Sequence[Opaque]
) -> Exception | None:
    """Why a submodule cannot be exported on its own, for any number of rows; None if it can."""
    from torch.export import Dim, export

    (arguments, tensors), (_, others) = (Structure.of(call.arguments) for call in calls[:2])
    if not tensors or len(tensors) != len(others):
        return ValueError("its arguments differ from call to call") if tensors else None
    shapes = [
        {axis: Dim.DYNAMIC for axis, (a, b) in enumerate(zip(x.shape, y.shape)) if a != b}
        for x, y in zip(tensors, others)
    ]
    alone = _Alone(module, arguments).eval()
    try:
        with stubs(closed):
            export(alone, (tensors,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        return error
    return None


def _closed(
    module: nn.Module, path: str, calls: Sequence[Call], failure: Exception
) -> Opaque | None:
    """The module as a closed part; None where what it takes or returns does not follow from the number of rows."""
    given = [Structure.of(call.arguments) for call in calls]
    returned = [Structure.of(call.output) for call in calls]
    alike = all(g[0] == given[0][0] and r[0] == returned[0][0] for g, r in zip(given, returned))
    kinds = [[(tuple(t.shape), t.dtype) for t in (*g[1], *r[1])] for g, r in zip(given, returned)]
    if not alike or any(kinds[i] != kinds[i % 2] for i in range(len(kinds))) or not returned[0][1]:
        return None
    shapes = []
    for a, b in zip(returned[0][1], returned[1][1]):
        sizes = [_size(m, n, given[0][1], given[1][1]) for m, n in zip(a.shape, b.shape)]
        if None in sizes:
            return None
        shapes.append((a.dtype, sizes))
    return Opaque(module, path, reason_of(failure), given[0][0], returned[0][0], shapes)


def _size(
    a: int, b: int, first: Sequence[Tensor], second: Sequence[Tensor]
) -> int | tuple[int, int, int] | None:
    """A size that is a in one run and b in another: itself, or a multiple of some size of the inputs."""
    if a == b:
        return a
    for index, (x, y) in enumerate(zip(first, second)):
        for axis, (m, n) in enumerate(zip(x.shape, y.shape)):
            if m != n and a * n == b * m and a % m == 0:
                return index, axis, a // m
    return None


# -- while the network is exported -----------------------------------------------------------------

# The parts that the operation's number stands for, during an export.
_CLOSED: list[Opaque] = []


@functools.cache
def operation() -> Any:
    """The custom operation that stands for a closed part: (its tensors, its entries, its number) → tensors."""

    def never(tensors: list[Tensor], entries: list[Tensor], number: int) -> list[Tensor]:
        raise NotImplementedError(
            "it stands for a module while a network is exported, and is not run"
        )

    op = torch.library.custom_op("modeconn::module", never, mutates_args=())

    @op.register_fake
    def _(tensors: list[Tensor], entries: list[Tensor], number: int) -> list[Tensor]:
        def sizes(shape: list[Any]) -> list[Any]:
            return [s if isinstance(s, int) else tensors[s[0]].shape[s[1]] * s[2] for s in shape]

        return [
            tensors[0].new_empty(sizes(shape), dtype=dtype)
            for dtype, shape in _CLOSED[number].shapes
        ]

    return torch.ops.modeconn.module.default


@contextlib.contextmanager
def stubs(closed: Sequence[Opaque]) -> Iterator[None]:
    """Within, the closed parts' modules call the operation; their hooks are part of what is closed."""
    before = _CLOSED[:]
    _CLOSED[:] = closed
    with contextlib.ExitStack() as stack:
        for number, part in enumerate(closed):
            stack.enter_context(_stub(part, number))
        stack.callback(lambda: _CLOSED.__setitem__(slice(None), before))
        yield


@contextlib.contextmanager
def _stub(part: Opaque, number: int) -> Iterator[None]:
    module, call = part.module, operation()

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments, tensors = Structure.of((args, kwargs))
        if arguments != part.arguments or part.output is None:
            raise ValueError(f"{part.path} is called in more than one way")
        state = module.state_dict(keep_vars=True)
        return part.output.filled(call(tensors, [state[name] for name in part.names], number))

    hooks = ("_forward_hooks", "_forward_pre_hooks")
    saved = {name: module.__dict__[name] for name in (*hooks, "forward") if name in module.__dict__}
    module.__dict__.update({key: OrderedDict() for key in hooks}, forward=forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        module.__dict__.update(saved)


def closed_part(number: int) -> Opaque:
    """The part that the operation's number stands for in the export that is going on."""
    return _CLOSED[number]


# -- reasons ---------------------------------------------------------------------------------------


def line_of(error: BaseException) -> str:
    """The first telling line of an exception's message, so that one line stays one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def reason_of(error: BaseException) -> str:
    """The same, with the line of the network's code where the export stopped."""
    if isinstance(error, ModeconnError):
        return str(error)
    ours = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}torch{os.sep}" not in frame.filename
        and not frame.filename.startswith((ours, "<"))
    ]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    return f"{where}torch.export: {line_of(error)}"
