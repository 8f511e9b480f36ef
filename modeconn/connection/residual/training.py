"""Trains one subnetwork of a residual network on the halves of values that it reads.

Its norms are in training mode; their statistics are then computed once from the data, with the
weights as they came out, so that the subnetwork is the same function in eval mode as in the path.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.connection.recipe import Recipe
from modeconn.connection.residual.subnetwork import ResidualSubnetwork

# Rows that the norms' statistics are taken of: enough for a mean over all their pixels.
_ROWS_OF_STATISTICS = 5000
# Rows of a pass without gradients.
_ROWS = 500
_BETAS = (0.9, 0.99)  # short trainings want a short memory
# Steps between two calls of `check`.
_STEPS_BETWEEN_CHECKS = 10


@dataclass(frozen=True)
class FoundSubnetwork:
    """A subnetwork in eval mode, with its loss and error over all training data."""

    subnetwork: ResidualSubnetwork
    loss: float
    error: float
    epochs: int
    seconds: float


def train_subnetwork(
    start: ResidualSubnetwork,
    values: Sequence[Tensor],
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    check: Callable[[], None],
) -> FoundSubnetwork:
    """Trains a copy of a subnetwork.

    Args:
        start: what to begin with.
        values: the half values that it reads, [N, channels, …] each.
        labels: int64 [N].
        recipe: AdamW's settings, and the number of epochs.
        seed: of the order of the samples.
        check: called now and then: it may raise, to end the training.
    """
    began = time.perf_counter()
    subnetwork = copy.deepcopy(start)
    subnetwork.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _renew_statistics(subnetwork, values)
    batches = math.ceil(len(labels) / recipe.batch_size)
    steps, step = batches * recipe.epochs, 0
    optimizer = torch.optim.AdamW(
        subnetwork.parameters(), recipe.lr, _BETAS, weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    subnetwork.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in order.split(recipe.batch_size):
            if step % _STEPS_BETWEEN_CHECKS == 0:
                check()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, steps)
            # A norm in training mode has no statistics of one row.
            if len(rows) > 1:
                loss = F.cross_entropy(subnetwork(*_batch(values, rows)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            step += 1
    if recipe.epochs:
        _renew_statistics(subnetwork, values)
    loss_of_all, error = measured(subnetwork, values, labels)
    seconds = time.perf_counter() - began
    return FoundSubnetwork(subnetwork.eval(), loss_of_all, error, recipe.epochs, seconds)


def _batch(values: Sequence[Tensor], rows: Tensor | slice) -> list[Tensor]:
    return [value[rows].to(torch.float32, memory_format=torch.channels_last) for value in values]


@torch.no_grad()
def _renew_statistics(subnetwork: ResidualSubnetwork, values: Sequence[Tensor]) -> None:
    """Computes the norms' running statistics anew, as cumulative means over batches."""
    norms = [module for module in subnetwork.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    subnetwork.train()
    count = min(len(values[0]), _ROWS_OF_STATISTICS)
    for start in range(0, count - 1, _ROWS):
        subnetwork(*_batch(values, slice(start, min(start + _ROWS, count))))
    for norm in norms:
        norm.momentum = 0.1
    subnetwork.eval()


@torch.no_grad()
def measured(
    subnetwork: ResidualSubnetwork, values: Sequence[Tensor], labels: Tensor
) -> tuple[float, float]:
    """Measures mean cross-entropy and error over all samples, summed in float64."""
    subnetwork.eval()
    loss, wrong = 0.0, 0
    for start in range(0, len(labels), _ROWS):
        block = slice(start, start + _ROWS)
        logits, own = subnetwork(*_batch(values, block)), labels[block]
        loss += float(F.cross_entropy(logits, own, reduction="none").double().sum())
        wrong += int((logits.argmax(1) != own).sum())
    return loss / len(labels), wrong / len(labels)
