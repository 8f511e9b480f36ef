"""Stubs of closed parts, while the network around them is exported.

A closed part's `forward` is a custom operation then, of which the shapes alone are known.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.capture.opaque import Opaque, Structure, sizes

# The parts that the operation's number stands for, during an export.
_CLOSED: list[Opaque] = []


@functools.cache
def operation() -> Any:
    """The operation that stands for a closed part: (tensors, entries, number) → tensors."""

    def never(tensors: list[Tensor], entries: list[Tensor], number: int) -> list[Tensor]:
        raise NotImplementedError(
            "it stands for a module while a network is exported, and is not run"
        )

    op = torch.library.custom_op("modeconn::module", never, mutates_args=())

    @op.register_fake
    def _(tensors: list[Tensor], entries: list[Tensor], number: int) -> list[Tensor]:
        return [
            tensors[0].new_empty(sizes(shape, tensors), dtype=dtype)
            for dtype, shape in _CLOSED[number].shapes
        ]

    return torch.ops.modeconn.module.default


def is_stub(function: Any) -> bool:
    """Whether a function is that operation: outside of exports with closed parts there is none."""
    return bool(_CLOSED) and function is operation()


@contextlib.contextmanager
def stubs(closed: Sequence[Opaque]) -> Iterator[None]:
    """Replaces closed parts by the operation, their hooks included."""
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
    """The part that the operation's number stands for in the present export."""
    return _CLOSED[number]
