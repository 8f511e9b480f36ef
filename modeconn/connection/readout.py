"""Fits linear readouts of fixed features: a convex problem, solved by L-BFGS.

A readout is the subnetwork S_{L-1} of the theory, or a shallow one below it. If the kept features
are linearly separable its loss goes to 0 as its weights grow (Nguyen et al. 2021, second corollary
of Theorem 4.1).
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import Subnetwork, restrict
from modeconn.connection.targets import Targets
from modeconn.connection.trained_subnetwork import TrainedSubnetwork
from modeconn.connection.training import measure
from modeconn.errors import ModeconnError

# Rows of a pass at a time: features may be a memory map.
_ROWS = 8192
# Pairs of steps and gradients that L-BFGS remembers: more cost memory and bring little.
_HISTORY = 20
# Of the weights on features scaled to mean square 1. Without it there is no minimum where the
# features can be separated; it is small enough to leave losses of 1e-6 within reach.
WEIGHT_DECAY = 1e-7


class _Reached(Exception):
    """Raised where the loss to stop at is met at a point of the line search."""


def fit_readout(
    chain: LayerChain,
    start: Subnetwork,
    h: Tensor,
    labels: Tensor | Targets,
    *,
    iterations: int = 300,
    stop_loss: float | None = None,
    weight_decay: float = WEIGHT_DECAY,
) -> TrainedSubnetwork:
    """Minimises the mean loss + weight_decay / 2 · ‖W · rms(h)‖² of a linear readout.

    The problem is convex: L-BFGS finds the same minimum from any start. Each feature is scaled to a
    root mean square of 1 first, since uneven scales slow L-BFGS down. The
    products are in the features' precision, the loss, the gradient's sums and the steps in float64.

    Args:
        start: a subnetwork of one layer; where the search begins.
        h: h_l [N, n_l, …], all units or the kept ones.
        labels: int64 [N], for cross-entropy; or targets with another convex loss.
        iterations: at most so many steps.
        stop_loss: finished once the mean loss is at most this.

    Raises:
        ModeconnError: a subnetwork of more than one layer, or a readout that is no linear layer.
    """
    if len(start.weights) != 1 or chain.layer(start.entry + 1).kind != "linear":
        raise ModeconnError(f"the subnetwork at entry layer {start.entry} is no linear readout")
    began = time.perf_counter()
    layer = chain.layer(start.entry + 1)
    whole = h.shape[1] == chain.widths[start.entry] * layer.block
    problem = _Problem(
        restrict(chain, start.entry, h, start.kept) if whole else h, labels, weight_decay, stop_loss
    )
    weight, bias = start.weights[0].double(), start.biases[0]
    problem.begin(weight, None if bias is None else bias.double())
    steps = _solve(problem, iterations)
    weight, bias = problem.readout()
    found = replace(start, weights=(weight.to(h),), biases=(None if bias is None else bias.to(h),))
    loss, error = measure(chain, found, h, labels)
    reached = stop_loss is not None and loss <= stop_loss
    return TrainedSubnetwork(found, loss, error, steps, time.perf_counter() - began, reached)


def fitted_weights(
    h: Tensor, labels: Tensor, classes: int, iterations: int, weight_decay: float
) -> Tensor:
    """Fits a readout of features alone and returns its weights, float64 [C, k].

    Args:
        h: [N, k]. labels: int64 [N]. classes: C.
        iterations: at most so many steps.
    """
    problem = _Problem(h, labels, weight_decay, None)
    zero = torch.zeros(classes, h.shape[1], dtype=torch.float64, device=h.device)
    problem.begin(zero, zero.new_zeros(classes))
    _solve(problem, iterations)
    return problem.readout()[0]


def _solve(problem: _Problem, iterations: int) -> int:
    """Runs L-BFGS on a problem that has begun, until it stops; returns the number of steps."""
    optimizer = torch.optim.LBFGS(
        problem.parameters,
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=_HISTORY,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    try:
        if iterations:
            optimizer.step(problem)
    except _Reached:
        pass
    return int(optimizer.state[problem.parameters[0]].get("n_iter", 0))


class _Problem:
    """The objective and its gradient, in the weights on scaled features and the bias."""

    def __init__(
        self, h: Tensor, labels: Tensor | Targets, weight_decay: float, stop_loss: float | None
    ) -> None:
        self.h, self.targets = h.flatten(1), Targets.of(labels)
        self.weight_decay, self.stop_loss = weight_decay, stop_loss
        squares = torch.zeros(self.h.shape[1], dtype=torch.float64, device=h.device)
        for rows in self.h.split(_ROWS):
            squares += rows.square().sum(0, dtype=torch.float64)
        rms = (squares / max(1, len(h))).sqrt()
        # A feature that is always 0 stays out of the readout.
        self.rms = torch.where(rms > 0, rms, torch.ones_like(rms))
        self.parameters: list[Tensor] = []

    def begin(self, weight: Tensor, bias: Tensor | None) -> None:
        """Sets the parameters to those of a readout of the features as they are."""
        self.parameters = [weight * self.rms, *([] if bias is None else [bias.clone()])]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def readout(self) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias for the features as they are."""
        bias = self.parameters[1] if len(self.parameters) > 1 else None
        return self.parameters[0] / self.rms, bias

    @torch.no_grad()
    def __call__(self) -> float:
        """Computes the objective, and puts its gradient into the parameters.

        Raises:
            _Reached: the mean loss is at most the loss to stop at.
        """
        loss, gradient, sums = self._sums()
        samples = len(self.targets)
        loss /= samples
        if self.stop_loss is not None and loss <= self.stop_loss:
            raise _Reached
        scaled = self.parameters[0]
        slopes = (gradient / self.rms / samples + self.weight_decay * scaled, sums / samples)
        for parameter, slope in zip(self.parameters, slopes):
            parameter.grad = slope
        objective = loss + 0.5 * self.weight_decay * float(scaled.square().sum())
        return objective if math.isfinite(objective) else math.inf

    def _sums(self) -> tuple[float, Tensor, Tensor]:
        """Sums the loss and its gradient in weight and bias over all samples."""
        weight, bias = self.readout()
        columns, shift = weight.t().to(self.h), None if bias is None else bias.to(self.h)
        gradient = torch.zeros_like(weight)
        sums = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        loss = 0.0
        for start in range(0, len(self.h), _ROWS):
            block = slice(start, start + _ROWS)
            rows = self.h[block]
            logits = rows @ columns if shift is None else torch.addmm(shift, rows, columns)
            own, slopes = _with_slopes(self.targets[block], logits.double())
            loss += own
            gradient += slopes.t().to(rows) @ rows
            sums += slopes.sum(0)
        return loss, gradient, sums


def _with_slopes(targets: Targets, logits: Tensor) -> tuple[float, Tensor]:
    """Sums the losses of some rows, and computes their slopes in the logits, [B, C]."""
    if targets.loss is None:
        labels = targets.values
        logarithms = F.log_softmax(logits, 1)
        loss = -float(logarithms.gather(1, labels[:, None]).sum())
        slopes = logarithms.exp()
        slopes[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        return loss, slopes
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        total = targets.losses(leaf[None]).sum()
        (slopes,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), slopes
