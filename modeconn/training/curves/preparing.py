"""Prepares a fit: networks that fit, data in memory, and the loop over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.data.batches import as_batches
from modeconn.data.inputs import Inputs, apply, join, leaves, moved
from modeconn.data.tensors import as_inputs, as_tensor
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import check_fit
from modeconn.files.fingerprints import digest_of, digest_of_tensors
from modeconn.metrics import PerSample
from modeconn.parameters.path_files import digest_of_architecture
from modeconn.parameters.paths import Path
from modeconn.parameters.state import State
from modeconn.training.curves.loop import Optimizers, Samples
from modeconn.training.curves.objective import Objective, objective_of
from modeconn.training.curves.settings import FitSettings
from modeconn.training.curves.working import Working
from modeconn.training.labelled import mode

# Rows that are read at a time from data that are not in memory.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Start:
    """Networks, data and loss of a fit, checked against each other.

    Attributes:
        states: control points to begin with.
        working: the network.
        points: their parameters, [K, P].
        samples: the data.
        objective: mean loss of outputs and labels.
        digests: of all that a record of the fit has to tell apart.
        norms: whether norms have running statistics.
    """

    states: list[State]
    working: Working
    points: Tensor
    samples: Samples
    objective: Objective
    digests: dict[str, str]
    norms: bool


def steps_of(steps: int | None, epochs: int | None, samples: int, batch_size: int) -> int:
    """Return the number of steps; an epoch has those that have a whole batch.

    Raises:
        ModeconnError: both are given, or neither, or none is a whole number of at least 1.
    """
    if (steps is None) == (epochs is None):
        both = "both are" if steps is not None else "neither is"
        raise ModeconnError(f"steps and epochs: {both} given: expected one of them")
    name, value = ("steps", steps) if epochs is None else ("epochs", epochs)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModeconnError(f"{name} is {value!r}: expected a whole number, at least 1")
    return value if epochs is None else value * (samples // min(batch_size, samples))


def in_memory(data: Any) -> tuple[Inputs, Tensor]:
    """Return all inputs and targets of data that `evaluate` takes."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        as_batches(data, _ROWS)  # checks them
        return as_inputs(data[0], "data: inputs"), as_tensor(data[1], "data: targets")
    batches = as_batches(data, _ROWS)
    copies = [(apply(torch.clone, inputs), targets.clone()) for inputs, targets in batches]
    return join([inputs for inputs, _ in copies]), torch.cat([targets for _, targets in copies])


def start_of(
    model: nn.Module,
    path: Path,
    data: tuple[Inputs, Tensor],
    loss: str | PerSample,
    settings: FitSettings,
    callables: Sequence[Any],
    kept: bool,
) -> Start:
    """Check a fit's network, starting path, data and loss, and bring them together.

    Args:
        model: the architecture.
        path: through the control points to begin with.
        data: all inputs and targets.
        loss: as for `evaluate`.
        settings: of the fit.
        callables: what else decides its outcome, for the digest.
        kept: whether an unfinished fit is kept, so that digests are needed.
    """
    check_fit(model, path)
    states = path.control_points
    working = Working(model, states[0])
    where, dtype = working.vector.device, working.vector.dtype
    inputs, targets = moved(data[0], dtype, where), data[1].to(where)
    size = min(settings.batch_size, len(targets))
    norms = _check_norms(working.model, size)
    with mode(working.model, training=False), torch.no_grad():
        objective, labels = objective_of(loss, working.model, inputs, targets)
    digests = {}
    if kept:
        tensors = {str(k): leaf for k, leaf in enumerate(leaves(inputs))}
        digests = {
            "data": digest_of_tensors({**tensors, "targets": labels}),
            "network": digest_of_architecture(model),
            "networks": ", ".join(map(digest_of_tensors, states)),
            "loss, augment or optimizer": digest_of([loss, *callables]),
        }
    samples = Samples(inputs, labels, size, settings.seed)
    return Start(states, working, working.rows(states), samples, objective, digests, norms)


def _check_norms(model: nn.Module, size: int) -> bool:
    """Return whether norms have running statistics.

    Raises:
        ModeconnError: a batch norm, and batches of one sample.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    batch = [m for m in norms if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if batch and size == 1:
        raise ModeconnError(
            f"batch_size is 1, and the network has {len(batch)} batch norms, which estimate a "
            "variance from each batch: expected at least 2 samples"
        )
    return any(isinstance(norm.running_mean, Tensor) for norm in norms)


def optimizers_of(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None, lr: float
) -> Optimizers:
    """Return what makes the optimizer: the user's callable, or Adam.

    Raises:
        ModeconnError: it is no callable.
    """
    if optimizer is None:
        return lambda parameters: torch.optim.Adam(parameters, lr)
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise ModeconnError(
            f"optimizer is a {type(optimizer).__name__}: expected a callable of a list of tensors, "
            "such as lambda points: torch.optim.SGD(points, lr=0.05, momentum=0.9)"
        )
    return optimizer
