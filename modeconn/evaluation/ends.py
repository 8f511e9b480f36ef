"""Control points that are modules, compared with the model that the whole path is evaluated with.

A path takes parameters and buffers of a module, and the model has the rest: attributes, hooks, the
code of the forward, buffers that are not saved. Where a module's rest is another one, the path does
not lead to that network.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.cache import guard_of
from modeconn.capture.export import capture
from modeconn.capture.graph import Graph
from modeconn.capture.guard import Guard, alike
from modeconn.capture.noise import seeded
from modeconn.capture.opaque import tensors_of
from modeconn.capture.trial import Runner, loaded, output_of
from modeconn.data.inputs import Inputs, leaves, rows, take
from modeconn.errors import ModeconnError, listed, warn
from modeconn.files.fingerprints import attributes_of, is_known_by_name
from modeconn.parameters.paths import Path
from modeconn.parameters.state import State

# Rows that both modules are run on where what they read differs, and the levels of objects within
# attributes that messages go into.
_ROWS, _LEVELS = 64, 3


def capture_for(path: Path, runner: Runner, x: Inputs) -> Graph:
    """Capture a model on a batch, and compare the modules that a path was made of with it.

    Args:
        path: whose control points may be modules.
        runner: of the model.
        x: a batch of inputs.
    """
    graph = capture(runner, x)
    check_ends(path, runner, x, guard_of(runner, x))
    return graph


def check_ends(path: Path, runner: Runner, x: Inputs, guard: Guard | None = None) -> None:
    """Compare the modules that a path was made of with the model, and warn of those that differ.

    What their forwards read is compared, and nothing runs where it is the same. Otherwise both run
    on rows of a batch with the weights of the control point. Differences that make none there are
    told if a forward of the user's classes reads them.

    Args:
        path: whose control points may be modules.
        runner: of the model.
        x: a batch of inputs.
        guard: of the model as it is, where there is one.
    """
    for end, state, name in zip(path.modules, path.control_points, path.names):
        if end is None or end is runner.model:
            continue
        guard = guard or Guard(runner.model)
        if not guard.holds(end):
            _compare(runner, end, state, name, take(x, 0, min(_ROWS, rows(x))))


def _compare(runner: Runner, end: nn.Module, state: State, name: str, x: Inputs) -> None:
    found = list(_differences(runner.model, end))
    texts = [text for text, _ in found] or _modes(runner.model, end)
    try:
        same = _same_outputs(runner, end, state, x)
        verb = "computes something else than the model with the same weights"
    except ModeconnError as error:
        same, verb = False, f"is another module than the model ({error})"
    if same:
        read = _names_read(runner.model) | _names_read(end)
        texts = [text for text, key in found if key in read]
        verb = "is another module than the model, though their outputs agree on some rows"
    if texts:
        warn(
            f"{name} {verb}: {listed(texts)}; the whole path has the model's, so that it does not "
            "lead to that network: give both the same, or pass its state_dict() to mean its "
            "weights alone"
        )


def _same_outputs(runner: Runner, end: nn.Module, state: State, x: Inputs) -> bool:
    """Whether both modules give the same outputs, bit for bit: it would be the same arithmetic."""
    its = Runner(end, runner.dtype, runner.device)
    its.expect(x)
    weights = {
        key: value.to(runner.device, runner.dtype if value.is_floating_point() else None)
        for key, value in state.items()
    }
    mine = runner.copy()
    for dtype in {p.dtype for p in end.parameters() if p.dtype in (torch.float16, torch.bfloat16)}:
        mine.to(dtype).to(runner.dtype)  # tensors beside the state dict are as rounded as its own
    outputs = []
    for module in (mine, its.copy()):
        with seeded(0, leaves(x)[0].device):
            outputs.append(tensors_of(output_of(loaded(module, weights), x)))
    return len(outputs[0]) == len(outputs[1]) and all(map(_equal, *outputs))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


# -- differences, in words -------------------------------------------------------------------------


def _differences(model: nn.Module, end: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what two modules do not have in common: a text, and the name of the attribute."""
    mine, its = dict(model.named_modules()), dict(end.named_modules())
    for name in {**mine, **its}:
        if name not in mine or name not in its:
            where = "the model" if name in mine else "it"
            yield f"only {where} has a submodule {name!r}", "forward"
            continue
        one, other = mine[name], its[name]
        kinds = type(one), type(other)
        if kinds[0] is not kinds[1] and not alike(*kinds):
            of = f"{name!r} of it" if name else "it"
            yield (
                f"{of} is a {kinds[1].__name__}, and a {kinds[0].__name__} in the model",
                "forward",
            )
        yield from _between(name, _parts(one), _parts(other), _LEVELS)


def _modes(model: nn.Module, end: nn.Module) -> list[str]:
    """Name the modules whose modes differ, which `eval()` sets in most."""
    pairs = zip(model.named_modules(), end.modules())
    found = [
        f"'{name}.training'" if name else "'training'"
        for (name, one), other in pairs
        if one.training != other.training
    ]
    return [f"{name} differs" for name in found] or ["what its forward reads differs"]


def _parts(module: nn.Module) -> dict[str, Any]:
    """Return what a module has besides parameters, saved buffers and children, by name."""
    buffers = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
    return {**attributes_of(module), **buffers}


def _between(
    name: str, one: Mapping[Any, Any], other: Mapping[Any, Any], levels: int
) -> Iterator[tuple[str, str]]:
    """Yield the differences between two tables of attributes."""
    for key in {**one, **other}:
        label, pair = f"{name}.{key}" if name else f"{key}", (one.get(key), other.get(key))
        if key not in one or key not in other:
            yield f"only {'the model' if key in one else 'it'} has {label!r}", str(key)
        elif not alike(*_of_one_dtype(*pair)):
            inner = _table(pair[0]), _table(pair[1])
            if levels and type(pair[0]) is type(pair[1]) and all(inner):
                yield from _between(label, *inner, levels - 1)
            elif all(isinstance(value, (bool, int, float, str, type(None))) for value in pair):
                yield f"{label!r} is {pair[1]!r}, and {pair[0]!r} in the model", str(key)
            else:
                yield f"{label!r} differs", str(key)


def _of_one_dtype(one: Any, other: Any) -> tuple[Any, Any]:
    """Two values, the model's rounded to the precision of the other's: weights are as well."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    if both and one.is_floating_point() and other.is_floating_point():
        one = one.to(other.dtype)
    return one, other


def _table(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    plain = isinstance(value, (Tensor, nn.Module, type, types.ModuleType)) or callable(value)
    return {} if plain else getattr(value, "__dict__", {})


def _names_read(module: nn.Module) -> set[str]:
    """The names in the code that forwards of the user's classes may reach."""
    names = {"forward"}
    for kind in {type(each) for each in module.modules()}:
        own = [base for base in kind.__mro__ if not is_known_by_name(base)]
        members: dict[str, Any] = {}
        for base in reversed(own):
            members |= vars(base)
        pending, seen = ["forward"], set()
        while pending:
            name = pending.pop()
            member = members.get(name)
            code = getattr(getattr(member, "fget", member), "__code__", None)
            if name not in seen and code is not None:
                pending += _names_in(code)
            seen.add(name)
        names |= seen
    return names


def _names_in(code: types.CodeType) -> list[str]:
    """Names and words in a function's code and in those within: attributes may be named by text."""
    names = [*code.co_names]
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.append(constant)
        elif isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names
