"""Trains subnetworks on fixed features, many at once: each comes out as if it were alone."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.recipe import Recipe
from modeconn.connection.stack import KeptFeatures, Stack
from modeconn.connection.subnetworks import Subnetwork
from modeconn.connection.targets import Targets
from modeconn.connection.trained_subnetwork import TrainedSubnetwork, pack, unpack
from modeconn.errors import ModeconnError
from modeconn.resuming import Record

Progress = Callable[[int, int], None]

# The exact loss needs a pass of its own: it is measured where the loss seen while training is
# within this factor of the stop.
_NEAR = 3.0
# The exact error, likewise: where the error seen while training is at most this much above the
# stop.
_NEAR_ERROR = 0.005
# Without a stop in reach the exact loss is measured in the last epochs, this part of them: there
# the learning rate is small, and the loss changes little.
_LAST_EPOCHS = 10
# Rows of a pass that measures.
_ROWS = 1000
# A shorter memory of squared gradients than the usual 0.999: these trainings are short.
_BETAS = (0.9, 0.99)


def measure(
    chain: LayerChain, sub: Subnetwork, h: Tensor, labels: Tensor | Targets
) -> tuple[float, float]:
    """Measures mean loss and error of a subnetwork, summed in float64.

    Args:
        h: h_l [N, …] of all units, or of the kept ones.
        labels: int64 [N], for cross-entropy; or targets with another loss.

    Returns:
        the loss, and the fraction of wrong samples, NaN where targets are no class labels.
    """
    rows = KeptFeatures(chain, [sub], [h], budget=0)
    ((loss, error),) = _measured(Stack(chain, [sub]), rows, Targets.of(labels))
    return loss, error


def train_subnetworks(
    chain: LayerChain,
    starts: Sequence[Subnetwork],
    features: Sequence[Tensor],
    labels: Tensor | Targets,
    recipe: Recipe,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[TrainedSubnetwork]:
    """Trains subnetworks of equal shape together, each as if it were alone.

    Args:
        starts: the weights to begin with.
        features: h_l [N, n_l, …] for each of them, all units or the kept ones; the same tensor
            where several read one network.
        labels: int64 [N], for cross-entropy; or targets with another loss.
        recipe: the same for all; a subnetwork that is finished leaves the others, or ends the
            training of all (`stop_together`).
        seed: of the order of the samples, which is the same for all of them.
        progress: called with (epochs done, epochs).
        checkpoint: a file that keeps an unfinished training; if it is there, the training goes on
            from it and gives bitwise what one without interruption gives. It is removed at the end.

    Returns:
        for each start its best weights among the epochs whose exact loss was measured: those near
            the stop, and the last ones. A subnetwork whose loss is no longer finite leaves with
            loss inf and the weights that it began with.

    Raises:
        ModeconnError: no subnetworks, shapes that do not stack, labels or settings out of range, a
            checkpoint of another training.
    """
    recipe.check()
    targets = Targets.of(labels)
    _check_data(chain, starts, features, targets)
    run = _Training(chain, starts, features, targets, recipe, seed)
    record = run.record(checkpoint)
    if record.exists:
        run.load(record)
    while run.active and run.epoch < recipe.epochs:
        run.run_epoch()
        if record.due:
            run.save(record)
        if progress is not None:
            progress(run.epoch, recipe.epochs)
    run.finish()
    record.remove()
    return [result for result in run.results if result is not None]


def _check_data(
    chain: LayerChain, starts: Sequence[Subnetwork], features: Sequence[Tensor], labels: Targets
) -> None:
    if not starts:
        raise ModeconnError("starts is empty: there are no subnetworks to train")
    samples = len(labels)
    if len(features) != len(starts) or any(len(h) != samples for h in features):
        raise ModeconnError(
            f"{len(starts)} subnetworks, features of {[len(h) for h in features]} rows and "
            f"{samples} labels: expected as many features as subnetworks and as many rows as labels"
        )
    if not samples:
        raise ModeconnError("labels is empty: there are no samples to train on")
    labels.check(chain.classes, chain.name)


class _Training:
    """The state of a training after some epoch.

    Attributes:
        stack, rows: the subnetworks still in training, and their features.
        active: the number of the start that each place of the stack has.
        best: by start the best weights whose exact loss was measured.
        results: by start the result, once it is finished.
    """

    def __init__(
        self,
        chain: LayerChain,
        starts: Sequence[Subnetwork],
        features: Sequence[Tensor],
        targets: Targets,
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.chain, self.starts, self.targets = chain, list(starts), targets
        self.recipe, self.seed = recipe, seed
        like = features[0]
        self.stack = Stack(chain, [sub.to(like) for sub in starts])
        self.rows = KeptFeatures(chain, starts, features)
        self.optimizer = self._optimizer()
        self.epoch = 0
        self.active = list(range(len(starts)))
        self.best: list[TrainedSubnetwork | None] = [None] * len(starts)
        self.results: list[TrainedSubnetwork | None] = [None] * len(starts)
        self.seconds = [0.0] * len(starts)

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe, parameters = self.recipe, self.stack.parameters
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=recipe.lr,
                momentum=recipe.momentum,
                nesterov=recipe.momentum > 0,
                weight_decay=recipe.weight_decay,
                fused=True,
            )
        return torch.optim.AdamW(
            parameters, lr=recipe.lr, betas=_BETAS, weight_decay=recipe.weight_decay, fused=True
        )

    def run_epoch(self) -> None:
        """Trains for an epoch and reviews the subnetworks after it."""
        began = time.perf_counter()
        batches = self._order().split(self.recipe.batch_size)
        steps = self.recipe.epochs * len(batches)
        device = self.targets.values.device
        seen = torch.zeros(2, len(self.stack), dtype=torch.float64, device=device)
        for number, rows in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate(self.epoch * len(batches) + number, steps)
            logits, targets = self.stack.logits(self.rows.batch(rows)), self.targets[rows]
            losses = targets.losses(logits)
            self.optimizer.zero_grad()
            losses.mean(1).sum().backward()
            self.optimizer.step()
            seen[0] += losses.detach().sum(1)
            if self.recipe.stop_error is not None:
                seen[1] += targets.wrong(logits.detach())
        self.epoch += 1
        spent = time.perf_counter() - began
        for start in self.active:
            self.seconds[start] += spent / len(self.active)
        losses_seen, errors_seen = (seen / len(self.targets)).tolist()
        self._review(losses_seen, errors_seen)

    def _order(self) -> Tensor:
        """Draws the order of the samples, from seed and epoch alone: resuming finds the same."""
        words = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]) >> 1)
        return torch.randperm(len(self.targets), generator=generator).to(self.targets.values.device)

    def _near(self, loss: float, error: float) -> bool:
        """Whether the exact numbers can matter, given those seen while training."""
        recipe = self.recipe
        return (
            self.epoch > recipe.epochs - max(1, recipe.epochs // _LAST_EPOCHS)
            or (self._may_stop and self._near_stop(loss, error))
        )

    def _near_stop(self, loss: float, error: float) -> bool:
        stop_loss, stop_error = self.recipe.stop_loss, self.recipe.stop_error
        return (stop_loss is not None and loss <= _NEAR * stop_loss) or (
            stop_error is not None and error <= stop_error + _NEAR_ERROR
        )

    @property
    def _may_stop(self) -> bool:
        return self.epoch > self.recipe.min_epochs

    def _review(self, seen: Sequence[float], errors: Sequence[float]) -> None:
        """Measures what may be finished, keeps the best weights, drops what is finished."""
        finished = []
        near = [self._near(*pair) for pair in zip(seen, errors)]
        if any(near):
            measured = _measured(self.stack, self.rows, self.targets)
            together = self.recipe.stop_together and any(self._reached(*pair) for pair in measured)
            if together:  # all are finished, near or not
                near = [True] * len(near)
            for d, (loss, error) in enumerate(measured):
                start, before = self.active[d], self.best[self.active[d]]
                # Whether another one is near must not matter to this one's result.
                if not (near[d] and math.isfinite(loss)):
                    continue
                reached = self._reached(loss, error)
                if reached or before is None or loss < before.loss:
                    sub = self.stack.subnetwork(d, self.starts[start])
                    self.best[start] = TrainedSubnetwork(
                        sub, loss, error, self.epoch, self.seconds[start], reached
                    )
                    if reached:
                        finished.append(d)
            if together:
                finished = list(range(len(seen)))
        finished += [
            d for d, loss in enumerate(seen) if not math.isfinite(loss) and d not in finished
        ]
        if finished and self.epoch < self.recipe.epochs:
            self._leave(finished)

    def _reached(self, loss: float, error: float) -> bool:
        recipe = self.recipe
        if not self._may_stop and self.epoch < recipe.epochs:
            return False
        return (recipe.stop_loss is not None and loss <= recipe.stop_loss) or (
            recipe.stop_error is not None and error <= recipe.stop_error
        )

    def _leave(self, finished: Sequence[int]) -> None:
        """Takes finished subnetworks out of the stack; the others keep the optimizer's state."""
        stay = [d for d in range(len(self.active)) if d not in finished]
        for d in finished:
            self._conclude(self.active[d])
        self.active = [self.active[d] for d in stay]
        if stay:
            which = torch.tensor(stay, device=self.targets.values.device)
            before = [self.optimizer.state.get(p, {}) for p in self.stack.parameters]
            self.stack.keep(which)
            self.rows.keep(stay)
            self.optimizer = self._optimizer()
            for p, values in zip(self.stack.parameters, before):
                self.optimizer.state[p] = _selected(values, which)

    def _conclude(self, start: int) -> None:
        """Makes the result of a start from its best weights."""
        best = self.best[start]
        if best is None:
            best = TrainedSubnetwork(self.starts[start], math.inf, 1.0, self.epoch, 0.0, False)
        self.results[start] = replace(best, epochs=self.epoch, seconds=self.seconds[start])

    def finish(self) -> None:
        """Makes the results of all that are still in training."""
        if self.epoch == 0 and self.active:
            measured = _measured(self.stack, self.rows, self.targets)
            for start, (loss, error) in zip(self.active, measured):
                reached = self._reached(loss, error)
                self.best[start] = TrainedSubnetwork(
                    self.starts[start], loss, error, 0, 0.0, reached
                )
        for start in self.active:
            self._conclude(start)

    # -- interruption ------------------------------------------------------------------------------

    def record(self, file: str | os.PathLike[str] | None) -> Record:
        """Returns the record that keeps the training; one without a file keeps nothing."""
        starts = hashlib.sha256()
        for sub in self.starts:
            for weight in sub.weights:
                starts.update(weight.detach().cpu().contiguous().numpy().tobytes())
        settings = {
            **asdict(self.recipe),
            "seed": self.seed,
            "rows": len(self.targets),
            "starts": starts.hexdigest(),
        }
        return Record(file, "unfinished training", settings)

    def save(self, record: Record) -> None:
        """Writes the state after the last finished epoch."""
        tensors: dict[str, Tensor] = {}
        for i, p in enumerate(self.stack.parameters):
            tensors[f"stack.{i}"] = p.detach().contiguous()
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{key}"] = value.contiguous()
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "active": self.active,
            "seconds": self.seconds,
        }
        for name, found in (("best", self.best), ("results", self.results)):
            packed, state[name] = pack(name, found)
            tensors |= packed
        record.write(tensors, state)

    def load(self, record: Record) -> None:
        """Goes on from a saved state."""
        tensors, state = record.read()
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.best = unpack("best", tensors, state["best"], self.starts)
        self.results = unpack("results", tensors, state["results"], self.starts)
        self.active = state["active"]
        which = torch.tensor(self.active, dtype=torch.int64, device=self.targets.values.device)
        self.stack.keep(which)
        self.rows.keep(self.active)
        self.optimizer = self._optimizer()
        for i, p in enumerate(self.stack.parameters):
            self._restore(i, p, tensors)

    @torch.no_grad()
    def _restore(self, i: int, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Sets a parameter of the stack and the optimizer's state of it."""
        parameter.copy_(tensors[f"stack.{i}"])
        prefix = f"optimizer.{i}."
        kept: dict[str, Tensor] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                # In the parameter's own layout, or sums would run in another order.
                own = torch.empty_like(parameter).copy_(value) if value.dim() else value
                kept[key.removeprefix(prefix)] = own
        self.optimizer.state[parameter] = kept


def _selected(values: Mapping[str, Any], which: Tensor) -> dict[str, Any]:
    """Selects some subnetworks' part of a parameter's optimizer state; scalars belong to all."""
    found = {}
    for key, value in values.items():
        stacked = isinstance(value, Tensor) and value.dim() > 0
        found[key] = value[which].clone() if stacked else value
    return found


def _measured(stack: Stack, rows: KeptFeatures, targets: Targets) -> list[tuple[float, float]]:
    """Measures mean loss and error of each subnetwork over all samples, summed in float64."""
    loss = torch.zeros(len(stack), dtype=torch.float64, device=targets.values.device)
    wrong = torch.zeros_like(loss)
    with torch.no_grad():
        for start in range(0, len(targets), _ROWS):
            block = slice(start, start + _ROWS)
            logits, own = stack.logits(rows.batch(block)), targets[block]
            loss += own.losses(logits).sum(1, dtype=torch.float64)
            wrong += own.wrong(logits)
    return list(zip((loss / len(targets)).tolist(), (wrong / len(targets)).tolist()))
