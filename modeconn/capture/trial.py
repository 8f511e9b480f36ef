"""Runs a copy of a module, to learn what its forward does besides returning a value.

User code never runs on the user's own module, parameters or inputs. A module is *pure* if its
output is a function of its state dict and its inputs: most are. Some are not: `eval()` merges or
folds weights, `forward` clamps them or keeps what it computed. Where something was changed, a
second run with other weights decides whether a later output depends on it; if so, the module runs
as it is, from a fresh copy at each point that is loaded before `eval()` (capture/opaque.py).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.capture.fixed import in_batches
from modeconn.capture.guard import Guard
from modeconn.capture.noise import undrawn
from modeconn.capture.opaque import line_of, tensors_of
from modeconn.capture.quiet import quietly
from modeconn.capture.spectral import has_spectral_norm, renew
from modeconn.data.inputs import Inputs, apply, call, describe
from modeconn.errors import ModeconnError, out_of_memory
from modeconn.files.fingerprints import TRAINERS
from modeconn.parameters.wrappers import unwrapped

# The other weights of the second run. A power of two away from 1 in no direction that a module
# could compensate, and near enough that statistics stay possible.
_OTHER = 1.125


class Runner:
    """A module to compute with, in a dtype and on a device.

    Args:
        model: the user's; it is never called, changed or converted.
        dtype: of floating-point tensors; None for the module's own.
        device: of all tensors; None for the module's own.

    Attributes:
        takes: the only number of rows that the module runs on; 0 for any.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.dtype, self.device = unwrapped(model), dtype, device
        self.takes = 0
        self._names: tuple[str, ...] = ()
        self._how = "by name"

    def copy(self) -> nn.Module:
        """A copy in the user's own modes, converted.

        Raises:
            ModeconnError: the module cannot be copied.
        """
        made = duplicate(self.model)
        for parameter in made.parameters():
            parameter.requires_grad_(False)
        if self.takes:
            vars(made)["forward"] = in_batches(made, self.takes)
        if self._names:
            vars(made)["forward"] = _by_names(made.forward, self._names, self._how)
        return made.to(device=self.device, dtype=self.dtype)

    def expect(self, x: Inputs) -> None:
        """Learns from a batch of inputs how the module takes a dict: by its names, or whole.

        A dict of one tensor under a name that forward does not have is also tried as that tensor.
        """
        if not isinstance(x, Mapping):
            return
        signature = inspect.signature(self.model.forward)
        gathered = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        self._names, self._how = tuple(x) if gathered else (), "by name"
        if not _binds(signature, **x) and _binds(signature, x):
            alone = self.copy().eval() if len(x) == 1 else None
            self._names, self._how = tuple(x), "whole"
            if alone is not None and _runs(alone, next(iter(x.values()))):
                self._how = "by position"

    def state(self) -> dict[str, Tensor]:
        """The user's parameters and buffers, converted; those that fit are the user's own."""
        return {name: self._converted(value) for name, value in saved_tensors(self.model).items()}

    def _converted(self, value: Tensor) -> Tensor:
        dtype = self.dtype if value.is_floating_point() else None
        return value.detach().to(device=self.device, dtype=dtype)


def duplicate(model: nn.Module) -> nn.Module:
    """Copies a module.

    Raises:
        ModeconnError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model, _detached(model))
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModeconnError(
            f"the model {type(model).__name__} cannot be copied ({line_of(error)}): "
            "expected a module that copy.deepcopy takes, since user code runs on a copy"
        ) from error


def _by_names(forward: Callable[..., Any], names: Sequence[str], how: str) -> Callable[..., Any]:
    """A forward that takes its inputs by these names, and passes them on otherwise.

    Args:
        how: "by name" to one that gathers them, "whole" in one dict, or "by position".
    """

    def named(**inputs: Any) -> Any:
        if how == "by name":
            return forward(**inputs)
        return forward(inputs) if how == "whole" else forward(*inputs.values())

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    vars(named)["__signature__"] = inspect.Signature(parameters)
    return named


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    """Whether a function of this signature can be called so."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _runs(module: nn.Module, x: Tensor) -> bool:
    """Whether a module runs on a tensor; random states are as before."""
    with torch.no_grad(), quietly(), undrawn(x.device):
        try:
            module(x.clone())
        except Exception as error:
            if out_of_memory(error):
                raise
            return False
    return True


def _detached(model: nn.Module) -> dict[int, Any]:
    """By id, copies of what deepcopy refuses or is not to copy.

    Those are tensors that were computed and kept, and the trainers of LightningModules.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        trainers = [vars(module)[name] for name in TRAINERS if vars(module).get(name) is not None]
        memo.update(dict.fromkeys(map(id, trainers)))
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return memo


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state dict, by name."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


@dataclass
class Trial:
    """Keeps what was learnt of a module.

    Attributes:
        module: a copy in eval mode with the user's weights, to be captured.
        expected: its output for the sample.
        impure: why its output is no function of state dict and inputs; "" if it is.
        random: whether two runs with the same weights give different outputs.
    """

    module: nn.Module
    expected: Any
    impure: str = ""
    random: bool = False


def on_trial(runner: Runner, x: Inputs) -> Trial:
    """Runs a copy of a module twice with the user's weights, and again with others if need be.

    Args:
        x: a few rows of input.

    Raises:
        ModeconnError: the module does not run on the sample.
    """
    module, weights = runner.copy(), runner.state()
    if isinstance(module, torch.jit.ScriptModule) or has_spectral_norm(module):
        return _always_fresh(runner, x, weights)
    guard, generator = Guard(module), torch.get_rng_state()
    module.eval()
    cause = _prefixed("eval()", _changes(module, weights, guard))
    expected = output_of(module, x)
    cause = cause or _prefixed("forward", _changes(module, weights, guard))
    if not cause:
        random = not _equal(expected, output_of(module, x))
        torch.set_rng_state(generator)
        return Trial(module, expected, random=random)
    pure = _forgets(module, runner, x, weights)
    _load(module, weights)
    if not pure:
        expected = output_of(loaded(runner.copy(), weights), x)
    torch.set_rng_state(generator)
    return Trial(module, expected, "" if pure else cause)


def _always_fresh(runner: Runner, x: Inputs, weights: Mapping[str, Tensor]) -> Trial:
    """A module whose parameters cannot be swapped, or whose buffers follow from its weights."""
    module = loaded(runner.copy(), weights)
    if isinstance(module, torch.jit.ScriptModule):
        cause = "parameters cannot be swapped while it runs, as TorchScript has it"
    else:
        cause = "spectral norms' u and v are computed anew at each point"
    return Trial(module, output_of(module, x), cause)


def _prefixed(who: str, changes: str) -> str:
    return f"{who} {changes}" if changes else ""


def loaded(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A module with a state dict loaded before `eval()`, as every user loads a checkpoint."""
    _load(module, state)
    renew(module)
    module.eval()
    return module


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    module.load_state_dict(dict(state), strict=False)


def _forgets(module: nn.Module, runner: Runner, x: Inputs, weights: Mapping[str, Tensor]) -> bool:
    """Whether a module that ran before gives what a fresh one gives, with other weights."""
    other = {
        name: value * _OTHER if value.is_floating_point() else value.clone()
        for name, value in weights.items()
    }
    try:
        _load(module, other)
        used = output_of(module, x)
        fresh = output_of(loaded(runner.copy(), other), x)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    return _equal(used, fresh)


def _changes(module: nn.Module, weights: Mapping[str, Tensor], guard: Guard) -> str:
    """Return what has changed of a module besides its modes, in words; "" for nothing."""
    state = saved_tensors(module)
    for name in [*weights, *state]:
        if name not in state:
            return f"removes {name!r} from the state dict"
        if name not in weights:
            return f"adds {name!r} to the state dict"
        if not _same_bits(state[name], weights[name]):
            return f"changes {name!r} of the state dict"
    return "" if guard.holds(module) else "changes attributes of the module"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if torch.equal(one, other):
        return True
    numbers = torch.equal(one.nan_to_num(), other.nan_to_num())
    return numbers and torch.equal(one.isnan(), other.isnan())


def output_of(module: nn.Module, x: Inputs) -> Any:
    """A module's output for a copy of the inputs, without what another run could change.

    Raises:
        ModeconnError: the module does not run on them.
    """
    own = apply(lambda tensor: tensor.clone(), x)
    try:
        output = call(module, own)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModeconnError(
            f"the model does not run on inputs of shape {describe(x)}: {line_of(error)}"
        ) from error
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


def _equal(one: Any, other: Any) -> bool:
    pairs = tensors_of(one), tensors_of(other)
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=0.0, equal_nan=True)
        for a, b in zip(*pairs)
    )
