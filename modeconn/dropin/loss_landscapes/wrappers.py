"""Gives metrics a model, or parts of one, behind one interface."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.dropin.loss_landscapes.contract import model_norm
from modeconn.errors import ModeconnError

# The attribute of a wrapper that keeps its `Held`.
_HELD = "_modeconn_held"


class ModelParameters:
    """A model's parameters as one vector, in place: what is added to it moves the model.

    Attributes:
        parameters: the tensors, in the order of the wrapper's modules.
    """

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters = parameters

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, index: int) -> Tensor:
        tensor: Tensor = self.parameters[index]
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parameters)

    def __add__(self, other: ModelParameters) -> ModelParameters:
        return self._made(other, torch.add)

    def __sub__(self, other: ModelParameters) -> ModelParameters:
        return self._made(other, torch.sub)

    def __mul__(self, factor: float) -> ModelParameters:
        return ModelParameters([p * factor for p in self.parameters])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ModelParameters:
        return ModelParameters([p / divisor for p in self.parameters])

    def _made(self, other: ModelParameters, how: Callable[..., Tensor]) -> ModelParameters:
        return ModelParameters([how(a, b) for a, b in zip(self, other)])

    @torch.no_grad()
    def add_(self, other: ModelParameters) -> None:
        """Add another vector, in place."""
        for mine, its in zip(self.parameters, other):
            mine.add_(its)

    @torch.no_grad()
    def sub_(self, other: ModelParameters) -> None:
        """Subtract another vector, in place."""
        for mine, its in zip(self.parameters, other):
            mine.sub_(its)

    @torch.no_grad()
    def mul_(self, factor: float) -> None:
        """Multiply by a number, in place."""
        for mine in self.parameters:
            mine.mul_(factor)

    @torch.no_grad()
    def truediv_(self, divisor: float) -> None:
        """Divide by a number, in place."""
        for mine in self.parameters:
            mine.div_(divisor)

    def dot(self, other: ModelParameters) -> float:
        """Return the inner product with another vector."""
        return sum(float((a * b).sum()) for a, b in zip(self, other))

    def numel(self) -> int:
        """Return how many numbers there are."""
        return sum(p.numel() for p in self.parameters)

    def model_norm(self, order: float = 2) -> float:
        """Return the norm of the whole vector."""
        if order == 2:
            return model_norm(self.parameters)
        return _root(sum(float(p.pow(order).sum()) for p in self.parameters), order)

    def layer_norm(self, index: int, order: float = 2) -> float:
        """Return the norm of one tensor."""
        return _root(float(self[index].pow(order).sum()), order)

    def filter_norm(self, index: tuple[int, int], order: float = 2) -> float:
        """Return the norm of one row of a tensor."""
        return _root(float(self[index[0]][index[1]].pow(order).sum()), order)

    def as_numpy(self) -> np.ndarray:
        """Return all numbers, flat."""
        return np.concatenate([p.detach().cpu().numpy().ravel() for p in self.parameters])


def _root(total: float, order: float) -> float:
    return float(total ** (1.0 / order))


class ModelWrapper(ABC):
    """A model as metrics see it; a class of one's own defines `forward`.

    Args:
        modules: those whose parameters move.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    @abstractmethod
    def forward(self, x: Any) -> Any:
        """Return the model's outputs."""

    def get_modules(self) -> list[nn.Module]:
        """Return the modules whose parameters move."""
        return self.modules

    def get_module_parameters(self) -> ModelParameters:
        """Return the parameters as a vector, in place."""
        return ModelParameters(parameters_of(self.modules))

    def train(self, mode: bool = True) -> ModelWrapper:
        """Set the modules' training mode."""
        for module in self.modules:
            module.train(mode)
        return self

    def eval(self) -> ModelWrapper:
        """Set evaluation mode."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> ModelWrapper:
        """Set whether the parameters require gradients."""
        for module in self.modules:
            module.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> ModelWrapper:
        """Forget the parameters' gradients."""
        for module in self.modules:
            module.zero_grad()
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters."""
        return itertools.chain.from_iterable(module.parameters() for module in self.modules)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the parameters and their names."""
        return itertools.chain.from_iterable(m.named_parameters() for m in self.modules)


class SimpleModelWrapper(ModelWrapper):
    """A module, all of whose parameters move."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([model])

    def forward(self, x: Any) -> Any:
        """Return the module's outputs."""
        return self.modules[0](x)


class GeneralModelWrapper(ModelWrapper):
    """Any object with modules in it.

    Args:
        model: the object.
        modules: those of its modules whose parameters move.
        forward_fn: (model, x) → outputs.
    """

    def __init__(
        self, model: Any, modules: list[nn.Module], forward_fn: Callable[[Any, Any], Any]
    ) -> None:
        super().__init__(modules)
        self.model, self.forward_fn = model, forward_fn

    def forward(self, x: Any) -> Any:
        """Return what `forward_fn` returns for the object."""
        return self.forward_fn(self.model, x)


def wrapped(model: Any) -> Any:
    """Return a model behind the interface; wrappers, of the package too, are returned as they are.

    Raises:
        ModeconnError: it is neither a module nor a wrapper.
    """
    if isinstance(model, nn.Module):
        return SimpleModelWrapper(model)
    if isinstance(getattr(model, "modules", None), list) and callable(
        getattr(model, "forward", None)
    ):
        return model
    raise ModeconnError(
        f"the model is of type {type(model).__name__}: expected a torch.nn.Module, or a "
        "GeneralModelWrapper around anything else"
    )


class Held(nn.Module):
    """A wrapper as a module: all that it wraps can be copied, loaded and captured together.

    Args:
        wrapper: with its own forward.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(wrapper.modules)
        whole = getattr(wrapper, "model", None)
        if isinstance(whole, nn.Module):
            self.whole = whole
        self.wrapper = wrapper

    def forward(self, x: Any) -> Any:
        """Return the wrapper's outputs, by its class."""
        return type(self.wrapper).forward(self.wrapper, x)


def module_of(wrapper: Any) -> nn.Module:
    """Return the module that scans copy, load and capture."""
    modules = wrapper.modules
    if isinstance(wrapper, SimpleModelWrapper) or type(wrapper).__name__ == "SimpleModelWrapper":
        module: nn.Module = modules[0]
        return module
    held = vars(wrapper).get(_HELD)
    if held is None or len(held.parts) != len(modules) or not all(map(is_, held.parts, modules)):
        # kept with the wrapper: another scan of it finds the captured graph
        held = vars(wrapper)[_HELD] = Held(wrapper)
    made: nn.Module = held
    return made


def view_of(module: nn.Module) -> Any:
    """Return the wrapper around a copy of what `module_of` returned, whose forward is the copy's.

    Parameters require no gradients, as the package has it, so that what metrics return holds none.
    """
    if not isinstance(module, Held):
        return SimpleModelWrapper(module).requires_grad_(False)
    view = module.wrapper
    vars(view)["forward"] = module
    view.requires_grad_(False)
    return view


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of some modules, one module after the other."""
    return list(itertools.chain.from_iterable(module.parameters() for module in modules))
