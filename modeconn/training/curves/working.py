"""A copy of a network whose parameters are one vector, for a step at any point of a path.

Garipov's step builds the network at t by `functional_call` from parameters that autograd has made
out of the control points. The gradient by control point k is c_k(t) times that by the network's
parameters, so none of this needs autograd: one product makes the vector, one backward its gradient,
and one outer product that of all control points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.trial import duplicate
from modeconn.data.inputs import Inputs, call
from modeconn.errors import ModeconnError
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import unwrapped


class Working:
    """A copy of a model with its parameters, and their gradients, in one vector of P numbers each.

    Args:
        model: the architecture, which is left as it was; the copy is in training mode.
        start: parameters and buffers; the copy has its buffers.

    Attributes:
        vector: the parameters, [P].
        gradient: theirs, [P].

    Raises:
        ModeconnError: the model has no parameters, or those of several dtypes.
    """

    def __init__(self, model: nn.Module, start: State) -> None:
        first = next(model.parameters(), None)
        if first is None:
            raise ModeconnError(f"{type(model).__name__} has no parameters to train")
        self.model = duplicate(unwrapped(model)).to(first.device)
        dtypes = {start[name].dtype for name, _ in self._named()}
        if len(dtypes) > 1:
            raise ModeconnError(
                f"parameters have the dtypes {', '.join(sorted(map(str, dtypes)))}: expected one"
            )
        self.model.to(dtypes.pop())
        self.model.load_state_dict(start, strict=False)
        self.model.train()
        parameters = list(self.model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        self.vector = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=first.device)
        self.gradient = torch.zeros_like(self.vector)
        begin = 0
        for parameter, size in zip(parameters, sizes):
            parameter.requires_grad_(True)
            part = slice(begin, begin + size)
            like = parameter.detach()
            parameter.data = _like(self.vector[part], like).copy_(like)
            parameter.grad = _like(self.gradient[part], like)
            begin += size

    def rows(self, states: Sequence[State]) -> Tensor:
        """Return the parameters of several states, [K, P]; the copy has those of the last."""
        rows = torch.empty(len(states), len(self.vector), dtype=self.vector.dtype)
        rows = rows.to(self.vector.device)
        for row, state in zip(rows, states):
            with torch.no_grad():
                for name, parameter in self._named():
                    parameter.copy_(state[name])
            row.copy_(self.vector)
        return rows

    def states(self, rows: Tensor, like: Sequence[Mapping[str, Tensor]]) -> list[State]:
        """Return the states that have these parameters, [K, P], and else what others have."""
        states = []
        for row, state in zip(rows, like):
            self.vector.copy_(row)
            own = {name: parameter.detach().clone() for name, parameter in self._named()}
            states.append(
                {
                    name: own[name].to(value.device) if name in own else value.clone()
                    for name, value in state.items()
                }
            )
        return states

    def loss(self, inputs: Inputs, targets: Tensor, loss: Any) -> Tensor:
        """Return the mean loss of a batch, with its gradient in `gradient`."""
        self.gradient.zero_()
        value: Tensor = loss(call(self.model, inputs), targets)
        value.backward()
        return value.detach()

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters by all of their names: tied ones have several."""
        return list(self.model.named_parameters(remove_duplicate=False))


def _like(part: Tensor, like: Tensor) -> Tensor:
    """View a part of a vector as a tensor of some shape, and of its order in memory if dense."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda axis: (-strides[axis], axis))
    dense = part.view([like.shape[axis] for axis in order])
    return dense.permute([order.index(axis) for axis in range(like.dim())])
