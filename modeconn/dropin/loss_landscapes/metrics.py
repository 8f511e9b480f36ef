"""Metrics: what is computed at every point, of a wrapped model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.dropin.loss_landscapes.wrappers import ModelParameters, parameters_of


class Metric(ABC):
    """A quantity of a model; a class of one's own defines the call."""

    @abstractmethod
    def __call__(self, model_wrapper: Any) -> Any:
        """Return the quantity at the model's present weights."""


class MetricPipeline(Metric):
    """Several metrics at once.

    Args:
        metrics: called one after the other.
    """

    def __init__(self, metrics: Sequence[Callable[[Any], Any]]) -> None:
        self.metrics = metrics

    def __call__(self, model_wrapper: Any) -> tuple[Any, ...]:
        """Return what each metric returns."""
        return tuple(metric(model_wrapper) for metric in self.metrics)


class _OfALoss(Metric):
    def __init__(
        self, loss_fn: Callable[[Any, Tensor], Tensor], inputs: Tensor, target: Tensor
    ) -> None:
        self.loss_fn, self.inputs, self.target = loss_fn, inputs, target

    def _loss(self, model_wrapper: Any) -> Tensor:
        return self.loss_fn(model_wrapper.forward(self.inputs), self.target)


class Loss(_OfALoss):
    """The loss on fixed inputs.

    Args:
        loss_fn: (outputs, target) → a number.
        inputs: of the model.
        target: of the loss.
    """

    def __call__(self, model_wrapper: Any) -> float:
        """Return the loss as a number."""
        return self._loss(model_wrapper).item()


class LossGradient(_OfALoss):
    """The gradient of the loss on fixed inputs, by the parameters of the wrapper's modules.

    In loss_landscapes 3.0.6 this metric raises whenever it is called.
    """

    def __call__(self, model_wrapper: Any) -> np.ndarray:
        """Return the gradient, flat, [parameters]."""
        model_wrapper.requires_grad_(True)
        try:
            parameters = parameters_of(model_wrapper.modules)
            with torch.enable_grad():
                found = torch.autograd.grad(
                    self._loss(model_wrapper), parameters, allow_unused=True, materialize_grads=True
                )
        finally:
            model_wrapper.requires_grad_(False)
        return ModelParameters(list(found)).as_numpy()


class LossPerturbations(_OfALoss):
    """Changes of the loss along uniformly drawn directions (Ahmed et al. 2019).

    Args:
        loss_fn, inputs, target: as for `Loss`.
        n_directions: how many are drawn at each point.
        alpha: kept for the signature; loss_landscapes 3.0.6 does not use it.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Tensor], Tensor],
        inputs: Tensor,
        target: Tensor,
        n_directions: int,
        alpha: float,
    ) -> None:
        super().__init__(loss_fn, inputs, target)
        self.n_directions, self.alpha = n_directions, alpha

    def __call__(self, model_wrapper: Any) -> np.ndarray:
        """Return the changes, [n_directions]."""
        weights = model_wrapper.get_module_parameters()
        own = [p.detach().clone() for p in weights]
        start, changes = self._loss(model_wrapper).item(), []
        for _ in range(self.n_directions):
            drawn = [torch.rand(p.shape, dtype=own[0].dtype).to(p.device) for p in own]
            weights.add_(ModelParameters(drawn))
            changes.append(self._loss(model_wrapper).item() - start)
            with torch.no_grad():
                for parameter, value in zip(weights, own):
                    parameter.copy_(value)
        return np.array(changes)


class ExpectedReturnMetric(Metric):
    """The mean return of an agent over episodes.

    Args:
        gym_environment: with `reset()` and `step(action)` as gym had them before version 0.26.
        n_episodes: how many.
    """

    def __init__(self, gym_environment: Any, n_episodes: int) -> None:
        self.gym_environment, self.n_episodes = gym_environment, n_episodes

    def __call__(self, agent: Any) -> float:
        """Return the mean of the episodes' sums of rewards."""
        return sum(self._episode(agent) for _ in range(self.n_episodes)) / self.n_episodes

    def _episode(self, agent: Any) -> float:
        act = agent if callable(agent) else agent.forward
        total, done, seen = 0.0, False, self.gym_environment.reset()
        while not done:
            seen, reward, done, _ = self.gym_environment.step(act(torch.from_numpy(seen).float()))
            total += reward
        return total
