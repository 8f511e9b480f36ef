"""Search for the parts of a network to keep closed, so that the rest can be exported."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from modeconn.capture.opaque import Call, Opaque, Structure, reason_of, tensors_of
from modeconn.capture.quiet import silence_export
from modeconn.capture.stubs import stubs
from modeconn.errors import out_of_memory


def parts_of(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> list[Opaque]:
    """Finds the smallest submodules to close so that each module around them can be exported.

    Args:
        model: in eval mode; exporting it as it is has failed.
        runs: call the model with two different numbers of rows.

    Returns:
        parts in the order of the network; none if what cannot be exported is the network's own
            forward.
    """
    search = _Search(model, _recorded(model, runs))
    search.below(model, "")
    return search.found


class _Search:
    """The parts found so far.

    Args:
        calls: per submodule, by its id, how it was called in each run.
    """

    def __init__(self, model: nn.Module, calls: dict[int, list[Call]]) -> None:
        self.found: list[Opaque] = []
        self._model, self._calls = model, calls

    def below(self, module: nn.Module, path: str) -> bool:
        """Closes parts below a module; returns whether the module itself can be exported then."""
        before = len(self.found)
        closed = all(self._close(child, inner) for inner, child in self._called(module, path))
        if closed and len(self.found) > before and self._fits(module):
            return True
        del self.found[before:]
        return False

    def _close(self, module: nn.Module, path: str) -> bool:
        """Closes a module or parts below it if it cannot be exported; whether that helps."""
        calls = self._calls[id(module)]
        failure = _failure(module, calls, self.found)
        if failure is None or self.below(module, path):
            return True
        part = _closed(module, path, calls, failure)
        if part is None:
            return False
        self.found.append(part)
        return True

    def _fits(self, module: nn.Module) -> bool:
        if module is self._model:  # it is exported next
            return True
        return _failure(module, self._calls[id(module)], self.found) is None

    def _called(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The nearest submodules that were called, by name; looks into lists of modules."""
        for name, child in module.named_children():
            inner = f"{path}.{name}".lstrip(".")
            if id(child) in self._calls:
                yield inner, child
            else:
                yield from self._called(child, inner)


def _recorded(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> dict[int, list[Call]]:
    """Records the calls of every submodule, by its id.

    Returns:
        the first call of each run, then the second of each, and so on; without submodules that were
            not called equally often in each run.
    """
    recorded = [_calls_in(model, run) for run in runs]
    calls: dict[int, list[Call]] = {}
    for key in recorded[0]:
        each = [of_run.get(key, []) for of_run in recorded]
        if len({len(of_run) for of_run in each}) == 1:
            calls[key] = list(itertools.chain.from_iterable(zip(*each)))
    return calls


def _calls_in(model: nn.Module, run: Callable[[], Any]) -> dict[int, list[Call]]:
    """Records the calls of every submodule in a run; none if it fails."""
    calls: dict[int, list[Call]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(id(module), []).append(Call((args, kwargs), output))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        run()
    except Exception as error:  # it takes batches of one size only, and so does some part of it
        if out_of_memory(error):
            raise
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return calls


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
    """Exports a submodule on its own, for any number of rows; returns the error if it fails."""
    silence_export()
    from torch.export import Dim, export

    (arguments, tensors), (_, others) = (Structure.of(call.arguments) for call in calls[:2])
    if not tensors:  # it depends on no input, and cannot be why the network's export fails
        return None
    if len(tensors) != len(others):
        return ValueError("its arguments differ from call to call")
    shapes = []
    for x, y in zip(tensors, others):
        sizes = enumerate(zip(x.shape, y.shape))
        shapes.append({axis: Dim.DYNAMIC for axis, (a, b) in sizes if a != b})
    alone = _Alone(module, arguments).eval()
    try:
        with stubs(closed):
            export(alone, (tensors,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        if out_of_memory(error):
            raise
        return error
    return None


def _closed(
    module: nn.Module, path: str, calls: Sequence[Call], failure: Exception
) -> Opaque | None:
    """The module as a closed part.

    None where its arguments or outputs do not follow from the number of rows.
    """
    given = [Structure.of(call.arguments) for call in calls]
    returned = [Structure.of(call.output) for call in calls]
    if not _alike(given) or not _alike(returned) or not returned[0][1]:
        return None
    shapes = []
    for a, b in zip(returned[0][1], returned[1][1]):
        sizes = [_size(m, n, given[0][1], given[1][1]) for m, n in zip(a.shape, b.shape)]
        if None in sizes:
            return None
        shapes.append((a.dtype, sizes))
    rows = [_varying_axis(x, y) for x, y in zip(given[0][1], given[1][1])]
    arguments, output = given[0][0], returned[0][0]
    return Opaque(module, path, reason_of(failure), arguments, output, shapes, rows)


def _varying_axis(one: Tensor, other: Tensor) -> int | None:
    """The only axis on which two tensors differ in size; None where there is none, or another."""
    axes = [i for i, (m, n) in enumerate(zip(one.shape, other.shape)) if m != n]
    return axes[0] if len(axes) == 1 else None


def _alike(values: Sequence[tuple[Structure, list[Tensor]]]) -> bool:
    """Whether values, of two runs by turns, have one structure, and equal shapes in each run."""
    kinds = [list(map(_kind, tensors)) for _, tensors in values]
    structures = [structure == values[0][0] for structure, _ in values]
    return all(structures) and all(kind == kinds[i % 2] for i, kind in enumerate(kinds))


def _kind(tensor: Tensor) -> tuple[object, object]:
    return tensor.shape, tensor.dtype


def _size(
    a: int, b: int, first: Sequence[Tensor], second: Sequence[Tensor]
) -> int | tuple[int, int, int] | None:
    """A size of an output that is `a` in one run and `b` in another.

    Returns:
        the size where it is constant, else (tensor, axis, factor) for a multiple of a size of the
            inputs, None where it is neither.
    """
    if a == b:
        return a
    for index, (x, y) in enumerate(zip(first, second)):
        for axis, (m, n) in enumerate(zip(x.shape, y.shape)):
            if m != n and a * n == b * m and a % m == 0:
                return index, axis, a // m
    return None
