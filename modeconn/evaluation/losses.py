"""The loss of a data set as a function of the parameters, for curvature packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modeconn.capture.trial import duplicate
from modeconn.data.batches import Batch, Batches, as_batches
from modeconn.data.inputs import apply, arguments, moved
from modeconn.data.prefetch import resident
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.metrics import Head, PerSample
from modeconn.parameters import state as states
from modeconn.parameters.fitting import load_for
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import unwrapped

# Rows of a batch by default: a curvature package keeps a graph of the forward of each.
_ROWS = 512
# Modules of PyTorch's for the losses that have a name.
_MODULES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
}


class LossFunction:
    """params → the mean loss over the data, differentiable as often as the network is.

    `torch.func` transforms it: `torch.func.grad(f)(params)`, products with the Hessian by `jvp` of
    that. Networks are in evaluation mode.

    Attributes:
        model: a copy of the module in evaluation mode, whose own parameters do not matter.
        params: the parameters of that copy by name; a state of the module can be passed as well.
    """

    def __init__(
        self, model: nn.Module, data: Any, loss: str | PerSample, batch_size: int | None
    ) -> None:
        self.model = duplicate(unwrapped(model)).eval()
        self.params: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        if not self.params:
            raise ModeconnError("the model has no parameters: expected some to differentiate by")
        like = next(iter(self.params.values()))
        self._dtype, self._device = like.dtype, like.device
        self._given, self._head = loss, Head(loss, ("loss",))
        rows = positive("batch_size", batch_size) or _ROWS
        self._batches: Batches = as_batches(resident(data, like.device), rows)

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss, a float64 number.

        Args:
            params: parameters by name, and buffers; the copy's own stand for those left out.
        """
        total, count = None, 0.0
        for inputs, targets in self:
            # Copies: a forward may count calls in a buffer, or change its input.
            args, kwargs = arguments(apply(Tensor.clone, inputs))
            given = {name: value.clone() for name, value in params.items()}
            outputs = functional_call(self.model, given, args, kwargs, tie_weights=False)
            labels = self._head.fit(outputs, self._head.counted(inputs, targets))
            sums = self._head.sums(outputs, labels)[0]
            total = sums if total is None else total + sums
            count += float(self._head.counts(labels)[0])
        if total is None or not count:
            raise ModeconnError("no sample has a label that counts: expected some")
        return total / count

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches, (inputs, targets), where the model is."""
        for inputs, targets in self._batches:
            yield moved(inputs, self._dtype, self._device), targets.to(self._device)

    def arguments(
        self, params: Mapping[str, Tensor] | None = None
    ) -> tuple[nn.Module, nn.Module, list[nn.Parameter], list[Batch]]:
        """Return what curvlinops' operators take: model, loss, parameters and batches.

            HessianLinearOperator(*f.arguments())

        Args:
            params: a state to load into the copy first: a point of a path, say.

        Raises:
            ModeconnError: the loss is none of PyTorch's.
        """
        if params is not None:
            self._load(load_for(self.model, params))
        if isinstance(self._given, str) and self._given in _MODULES:
            module = _MODULES[self._given]()
        elif isinstance(self._given, nn.Module):
            module = self._given
        else:
            raise ModeconnError(
                f"loss is {self._given!r}: expected one of {', '.join(_MODULES)}, or a module of "
                "PyTorch's"
            )
        return self.model, module, list(self.params.values()), list(self)

    @torch.no_grad()
    def _load(self, state: State) -> None:
        own = self.model.state_dict()
        states.match([own, {**own, **state}], ["the model", "params"], devices=False, dtypes=False)
        for name, value in state.items():
            own[name].copy_(value)


def loss_function(
    model: nn.Module,
    data: Any,
    *,
    loss: str | PerSample = "cross_entropy",
    batch_size: int | None = None,
) -> LossFunction:
    """Return the mean loss over data as a function of the parameters.

    Args:
        model: the architecture, in whose dtype and on whose device it is computed; it is left as it
            was.
        data: as for `evaluate`; it must be possible to read it again and again.
        loss: as for `evaluate`.
        batch_size: rows of a batch, 512 by default.

    Returns:
        A callable of a dict of parameters, `path.at(t)` for instance. For curvature packages such
        as curvlinops it also has the model, the loss, the parameters and the batches.

    Raises:
        ModeconnError: bad input, named in one line.
    """
    return LossFunction(model, data, loss, batch_size)
