"""Closed parts: modules that a graph calls as they are, where torch.export cannot look inside.

Such are branches that depend on the data, or custom functions that do not trace. Only the submodule
that holds one is kept closed (capture/closing.py finds it); the rest is exported around it
(capture/stubs.py). In the graph, a node calls the module with the parameters and buffers of the
point swapped in.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from modeconn.capture.fixed import joined
from modeconn.capture.spectral import renew
from modeconn.errors import ModeconnError
from modeconn.parameters.forking import Lock

# The names of a batch norm's running mean and variance.
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


# Part of the path of every file of PyTorch.
_TORCH = f"{os.sep}torch{os.sep}"
# Stands in a structure for a tensor.
_TENSOR = "a tensor goes here"


@dataclass(frozen=True)
class Structure:
    """A module's arguments or output, a nest of tensors and other things, without the tensors."""

    others: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, value: Any) -> tuple[Structure, list[Tensor]]:
        """The structure of a value, and its tensors in order."""
        flat, spec = pytree.tree_flatten(value)
        others = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in flat)
        return cls(others, spec), tensors_of(flat)

    def filled(self, tensors: Sequence[Any]) -> Any:
        """The value with these tensors."""
        given = iter(tensors)
        flat = [next(given) if leaf is _TENSOR else leaf for leaf in self.others]
        return pytree.tree_unflatten(flat, self.spec)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass
class Call:
    """A call of a module: arguments and output."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any


@dataclass(eq=False)
class Opaque:
    """A module as a function of its tensors and entries, which returns its output's tensors.

    Attributes:
        module: in the dtype and on the device to compute with; it is left as it was.
        path: its name in the network, "" for the network itself.
        reason: why it is kept closed, with the line where the export stopped.
        arguments: the structure of its arguments.
        output: the structure of its output; None for the network itself, whose output is handed
            on as it is.
        shapes: per tensor of the output its dtype and sizes; those that follow from the rows as
            (tensor, axis, factor).
        rows: per tensor of the arguments the axis whose size follows from the rows, if there is
            one; empty for the network itself.
        names: of its parameters and buffers: its entries.
        fresh: makes a copy for each call, which is loaded before `eval()`: for a module whose
            `eval()` or forward changes more than it returns.
    """

    module: nn.Module
    path: str
    reason: str
    arguments: Structure
    output: Structure | None = None
    shapes: list[tuple[torch.dtype, list[Any]]] = field(default_factory=list)
    rows: list[int | None] = field(default_factory=list)
    fresh: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        names = _slots(self.module) if self.fresh is None else self.fresh().state_dict()
        self.names = tuple(names)
        self._lock = Lock()

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__}): {self.reason}"

    def __call__(self, tensors: Sequence[Tensor], entries: Sequence[Tensor]) -> Any:
        state = dict(zip(self.names, entries))
        out = self._run(tensors, state)
        return out if self.output is None else self._shaped(tensors_of(out), tensors, state)

    def _shaped(
        self, found: list[Tensor], tensors: Sequence[Tensor], state: dict[str, Tensor]
    ) -> list[Tensor]:
        """The outputs of a part, where a lone row that it squeezed has its axis again."""
        if self._fit(found, tensors) or not any(axis is not None for axis in self.rows):
            return found
        pairs = zip(tensors, self.rows)
        twice = [x if axis is None else torch.cat([x] * 2, axis) for x, axis in pairs]
        doubled = tensors_of(self._run(twice, state))
        if not self._fit(doubled, twice):
            return found
        for number, (_, shape) in enumerate(self.shapes):
            for axis, size in enumerate(sizes(shape, tensors)):
                doubled[number] = doubled[number].narrow(axis, 0, size)
        return doubled

    def _fit(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
        """Whether outputs have the shapes that follow from those of the arguments."""
        wanted = [sizes(shape, tensors) for _, shape in self.shapes]
        return [list(output.shape) for output in outputs] == wanted

    def _run(self, tensors: Sequence[Tensor], state: dict[str, Tensor]) -> Any:
        # The module may change what it is given, and parameters that are swapped in as well.
        args, kwargs = self.arguments.filled([tensor.clone() for tensor in tensors])
        state = {name: value.clone() for name, value in state.items()}
        out = self._called(state, args, kwargs)
        if self.path or not tensors or len(tensors[0]) != 1 or _has_row(out):
            return out
        # A network that squeezes its values loses the axis of a lone row: it gets the row twice.
        args, kwargs = self.arguments.filled([torch.cat([tensor] * 2) for tensor in tensors])
        return joined([self._called(state, args, kwargs)], 1, 2)

    def _called(
        self, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.fresh is not None:
            module = self.fresh()
            module.load_state_dict(state, strict=False)
            renew(module)
            return module.eval()(*args, **kwargs)
        with self._lock, eval_mode(self.module):  # one thread at a time swaps its parameters
            return functional_call(self.module, state, args, kwargs, tie_weights=False)

    def norms(self) -> list[tuple[str, _BatchNorm]]:
        """The batch norms in it that keep statistics, by name."""
        norms = [(k, m) for k, m in self.module.named_modules() if isinstance(m, _BatchNorm)]
        return [(name, norm) for name, norm in norms if norm.running_mean is not None]

    def statistics(self) -> list[Names]:
        """The names of its batch norms' statistics, among its entries."""
        prefixes = [f"{name}." if name else "" for name, _ in self.norms()]
        return [(f"{prefix}running_mean", f"{prefix}running_var") for prefix in prefixes]

    def training(self, tensors: Sequence[Tensor], entries: Sequence[Tensor]) -> list[Tensor]:
        """Runs the module with its batch norms in training mode.

        Returns:
            the output's tensors, then each norm's mean and variance over the batch.
        """
        norms = self.norms()
        state = dict(zip(self.names, entries))
        for name, norm in norms:
            prefix = f"{name}." if name else ""
            for key, buffer in norm.named_buffers(recurse=False):
                state[f"{prefix}{key}"] = torch.zeros_like(buffer)
        momenta = [norm.momentum for _, norm in norms]
        args, kwargs = self.arguments.filled(tensors)
        with self._lock, eval_mode(self.module):
            try:
                for _, norm in norms:
                    norm.training, norm.momentum = True, None
                out = functional_call(self.module, state, args, kwargs, tie_weights=False)
            finally:
                for (_, norm), momentum in zip(norms, momenta):
                    norm.momentum = momentum
        names = itertools.chain.from_iterable(self.statistics())
        return [*tensors_of(out), *(state[name] for name in names)]


def sizes(shape: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The sizes of a part's output; those that follow from the rows may be symbolic."""
    return [s if isinstance(s, int) else tensors[s[0]].shape[s[1]] * s[2] for s in shape]


def _has_row(output: Any) -> bool:
    """Whether every tensor of the output for one row has an axis for it."""
    return all(1 in tensor.shape[:2] for tensor in tensors_of(output))


def _slots(model: nn.Module) -> Iterator[str]:
    """The names in a module's state dict, one for each parameter or buffer of a submodule.

    A submodule that is used in two places has each of its parameters under two names, and
    `functional_call` would swap it twice. Parameters that are tied are two, of two submodules.
    """
    saved = set(model.state_dict())
    seen: set[tuple[int, str]] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in [*module._parameters, *module._buffers]:
            full = f"{prefix}.{name}" if prefix else name
            if full in saved and (id(module), name) not in seen:
                seen.add((id(module), name))
                yield full


def whole(
    model: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    reason: str,
    fresh: Callable[[], nn.Module] | None = None,
) -> Opaque:
    """The network itself as one closed part; `fresh` as for `Opaque`."""
    return Opaque(model, "", reason, Structure.of(arguments)[0], fresh=fresh)


def line_of(error: BaseException) -> str:
    """The first telling line of an exception's message, so that one line stays one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def reason_of(error: BaseException) -> str:
    """One line on why torch.export stopped, with the line of the network's code where it did."""
    if isinstance(error, ModeconnError):
        return str(error)
    ours = str(Path(__file__).parents[1])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _TORCH not in f.filename]
    frames = [frame for frame in frames if not frame.filename.startswith((ours, "<"))]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    return f"{where}torch.export: {line_of(error)}"
