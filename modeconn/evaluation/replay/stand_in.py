"""A copy of a model that a user's function is given, and whose forward may be answered.

A call is answered only where everything shows that the model itself would give the same: the
weights and buffers are those of the point, number by number, in the slots where they were; no
attribute, submodule or hook has changed; the modes and the inputs are those of the recorded call.
Otherwise the forward runs as it is.
"""

from __future__ import annotations

import functools
import operator
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_modules
from torch.utils import _pytree as pytree

from modeconn.capture.spectral import has_spectral_norm, renew
from modeconn.capture.trial import duplicate
from modeconn.data.inputs import Inputs, apply, leaves
from modeconn.data.randomness import has_drawn, torch_states
from modeconn.evaluation.replay.answers import lazily
from modeconn.evaluation.replay.calls import Call, detached, inputs_of, same_inputs, same_tensor

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")

# A parameter or buffer: the dict that holds it, its name there, itself, its name in the state.
Slot = tuple[dict[str, "Tensor | None"], str, Tensor, str]
# The answer to a call at the present point, by its number; None where there is none.
Answers = Callable[[int], "tuple[Call, Any] | None"]


class StandIn:
    """A copy of a model, loaded with the weights of one point after another.

    Args:
        model: the user's; it is never called or changed.
        budget: bytes of inputs and outputs that are recorded at a point.

    Attributes:
        module: the copy, for the user's function.
        calls: what was recorded at the present point: None for a call that cannot be answered.
        answered, run: how many forwards were answered, and how many ran, so far.
    """

    def __init__(self, model: nn.Module, budget: int) -> None:
        self._model, self._budget = model, budget
        self._spectral = has_spectral_norm(model)
        self.answered = self.run = 0
        self._renew()
        self.begin({})

    def _renew(self) -> None:
        """Make the copy anew, as the user's model is."""
        self.module = duplicate(self._model)
        self._own = self.module.forward
        self._stub = _Forward(self, self.module, self._own)
        if not isinstance(self.module, torch.jit.ScriptModule):
            vars(self.module)["forward"] = self._stub
        self._modules = [*self.module.modules()]
        self._modes = self._modes_now()
        self._gradients = [(p, p.requires_grad) for p in self.module.parameters()]
        self._slots = list(_slots(self.module))
        self._buffers = [(v, v.detach().clone()) for v in self.module.buffers()]
        self._named = self.module.state_dict()
        self._hooked = _has_hooks(self.module)
        self._hooks = [*_hook_dicts(self.module)]
        self._whole, self._around = self._parts(), self._own_hooks()
        self._places = [_place(tensor) for _, _, tensor, _ in self._slots]

    # -- points --------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(
        self, state: Mapping[str, Tensor], answers: Answers | None = None, record: bool = False
    ) -> None:
        """Load the weights of a point.

        Args:
            state: parameters and buffers.
            answers: to the point's calls.
            record: whether calls that run are recorded.
        """
        if not self._is_intact():
            self._renew()
        for buffer, value in self._buffers:
            buffer.copy_(value)
        # what is as it was is not set again: many scans are over in milliseconds
        for module, training in zip(self._modules, self._modes):
            if module.training is not training:
                module.training = training
        for parameter, needs in self._gradients:
            if parameter.requires_grad is not needs:
                parameter.requires_grad_(needs)
            if parameter.grad is not None:
                parameter.grad = None
        for name, value in state.items():
            self._named[name].copy_(value)
        if self._spectral:
            renew(self.module)
        self._set = [self._loaded(tensor, state.get(name)) for *_, tensor, name in self._slots]
        self._answers, self._record = answers, record
        self.calls: list[Call | None] = []
        self._number = self._depth = self._bytes = 0

    def _loaded(self, tensor: Tensor, value: Tensor | None) -> Tensor:
        """Return what a parameter or buffer was set to, without a second copy."""
        kept = value is not None and value.dtype == tensor.dtype and value.device == tensor.device
        return tensor.detach().clone() if value is None or self._spectral or not kept else value

    def changed(self) -> bool:
        """Whether the parameters are no longer those of the point."""
        return not self._has_weights(parameters=True)

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the copy's memory, which the next point is loaded into."""
        place = tensor.untyped_storage().data_ptr()
        return any(slot[2].untyped_storage().data_ptr() == place for slot in self._slots)

    # -- calls ---------------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the model, or run it."""
        if self._depth:  # of a forward that calls its own module
            return self._own(*args, **kwargs)
        number, self._number = self._number, self._number + 1
        found = None if self._answers is None else self._answers(number)
        if found is not None:
            call, value = found
            inputs = inputs_of(self.module, args, kwargs)
            if inputs is not None and self._fits(call, inputs):
                self.answered += 1
                return self._answered(call, value, args, kwargs, inputs)
        self.run += 1
        if self._record:
            return self._recorded(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        try:
            return self._own(*args, **kwargs)
        finally:
            self._depth -= 1

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = inputs_of(self.module, args, kwargs)
        self._bytes += sum(leaf.nbytes for leaf in leaves(inputs)) if inputs is not None else 0
        if inputs is None or self._bytes > self._budget or not self._undisturbed():
            self.calls.append(None)
            return self._run(args, kwargs)
        kept = apply(lambda tensor: tensor.detach().clone(), inputs)
        modes, states = self._modes_now(), torch_states()
        wait_for(leaves(kept)[0].device)
        started = time.perf_counter()
        output = self._run(args, kwargs)
        wait_for(leaves(kept)[0].device)
        seconds = time.perf_counter() - started
        steady = not has_drawn(states) and self._has_weights() and self._is_whole()
        call = Call(kept, detached(output), modes, seconds, steady)
        self._bytes += call.bytes_of_output
        self.calls.append(call)
        _watch(output, call)
        return output

    def _answered(
        self, call: Call, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Inputs
    ) -> Any:
        """Return the answer, with a way to gradients where the model's output would have one."""
        given = [*leaves(inputs), *self.module.parameters()]
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
            return value

        def again() -> Any:
            call.differentiated = True
            return self._run(args, kwargs)

        return lazily(again, value, [tensor for tensor in given if tensor.requires_grad])

    # -- guards --------------------------------------------------------------------------------

    def _fits(self, call: Call, inputs: Inputs) -> bool:
        return (
            not call.differentiated
            and call.modes == self._modes_now()
            and self._undisturbed()
            and same_inputs(call.inputs, inputs)
            and self._has_weights()
        )

    def _undisturbed(self) -> bool:
        """Whether the forward would run as it was captured."""
        return not self._hooked and not is_unusual() and self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the copy is made of what it was made of, its weights and buffers apart."""
        now = self._parts()
        return len(now) == len(self._whole) and all(map(operator.is_, now, self._whole))

    def _is_intact(self) -> bool:
        """Whether the copy can be loaded with another point, and is a copy of the model again."""
        scripted = isinstance(self.module, torch.jit.ScriptModule)
        around = self._own_hooks()
        return (
            self._is_whole()
            and (scripted or vars(self.module).get("forward") is self._stub)
            and len(around) == len(self._around)
            and all(map(operator.is_, around, self._around))
            and all(
                slots.get(name) is tensor and _place(tensor) == place
                for (slots, name, tensor, _), place in zip(self._slots, self._places)
            )
        )

    def _has_weights(self, parameters: bool = False) -> bool:
        """Whether all weights and buffers (or parameters alone) are those of the point."""
        return all(
            slots.get(name) is tensor and same_tensor(tensor, value)
            for (slots, name, tensor, _), value in zip(self._slots, self._set)
            if not parameters or isinstance(tensor, nn.Parameter)
        )

    def _modes_now(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._modules)

    def _parts(self) -> list[Any]:
        """All that the copy is made of besides numbers: submodules, attributes, their hooks.

        They are compared by identity. The list keeps them alive, so no other gets their place.
        """
        parts: list[Any] = []
        for module in self._modules:
            held = vars(module)
            apart = ("training", "forward") if module is self.module else ("training",)
            parts += held
            parts += [value for name, value in held.items() if name not in apart]
            parts += module._modules.values()
        for hooks in self._hooks:
            parts += hooks.values()
        return parts


    def _own_hooks(self) -> list[Any]:
        """The copy's own hooks, which run around an answer, too."""
        hooks: list[Any] = []
        for name, held in vars(self.module).items():
            if name.endswith("_hooks"):
                hooks += held.values()
        return hooks


class _Forward:
    """Stands in for the forward of a copy; copies of the copy have their own again."""

    def __init__(self, owner: StandIn, module: nn.Module, own: Callable[..., Any]) -> None:
        self._owner, self._module, self._own = owner, module, own
        functools.update_wrapper(self, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner.forward(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # bound to the module that is being made, as the class has it
        made = memo.get(id(self._module), self._module)
        return types.MethodType(type(made).forward, made)

    def __reduce__(self) -> Any:
        return _plain_forward, (self._module,)


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    return types.MethodType(type(module).forward, module)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_unusual() -> bool:
    """Whether autocast, a transform, a mode or a hook changes what a forward does."""
    c = torch._C
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
        or c._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS)
    )


def _slots(module: nn.Module) -> Iterator[Slot]:
    """Every parameter and buffer once: where it stands, and its name in the state dict."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield held, name, tensor, f"{prefix}.{name}" if prefix else name


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    """Return where a tensor's numbers are, and of what kind: `tensor.data = …` changes that."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def _has_hooks(module: nn.Module) -> bool:
    """Whether a part of a module has hooks that are not PyTorch's own (weight norm's, say)."""
    hooks: list[Any] = []
    for part in module.modules():
        if part is not module:
            hooks += [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return not all(str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def _hook_dicts(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """The hooks of a module's parts: its own run around an answer, too."""
    for part in module.modules():
        if part is not module:
            yield from (held for name, held in vars(part).items() if name.endswith("_hooks"))


def _watch(output: Any, call: Call) -> None:
    """Note whether a gradient is taken through an output."""

    def note(gradient: Tensor) -> None:
        call.differentiated = True

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(note)
