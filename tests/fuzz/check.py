"""What an evaluation must give, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import hashlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from fuzz.grammar import Case
from modeconn.capture.optimisations import without

# How far float64 results may be apart: orders of summation differ, and networks amplify rounding.
# What a wrong rule gives is off by far more.
EXACT = 1e-9
# The same for float32, as a multiple of what plain PyTorch is off at the same precision, and of its
# epsilon.
FACTOR, FLOOR = 8.0, 256.0


class Finding(AssertionError):
    """Something that must not be: a wrong number, a changed state, or a raw exception."""


def check(case: Case, backend: str, precision: str) -> str:
    """Evaluate a case and compare; returns "ran", or the first words of a refusal.

    Raises:
        Finding: a wrong number, something of the user's changed, or an exception that is no
            ModeconnError.
    """
    exact = plain(case, torch.float64)
    before = fingerprint(case)
    try:
        with warnings.catch_warnings(), without(*case.without):
            warnings.simplefilter("ignore")
            result = mc.evaluate(
                case.network,
                case.path,
                (case.inputs, case.targets),
                case.points,
                loss=case.loss,
                metrics=("loss",),
                backend=backend,
                precision=precision,
                progress=False,
                **case.options,
            )
    except mc.ModeconnError as error:
        refusal = str(error)
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    else:
        refusal = ""
    changed = [what for what, value in fingerprint(case).items() if before[what] != value]
    if changed:
        raise Finding(f"changed: {', '.join(changed)}")
    if refusal:
        return refusal.split(":")[0]
    _compare(case, result.loss, exact, precision)
    return "ran"


def _compare(case: Case, got: np.ndarray, exact: np.ndarray, precision: str) -> None:
    if not np.array_equal(np.isnan(got), np.isnan(exact)):
        raise Finding(f"NaN where float64 has none, or none where it has: {got}, float64 {exact}")
    known = np.isfinite(exact)
    if not np.array_equal(got[~known & ~np.isnan(exact)], exact[~known & ~np.isnan(exact)]):
        raise Finding(f"infinite otherwise: {got}, float64 {exact}")
    if not known.any():
        return
    scale = np.maximum(np.abs(exact[known]), 1e-3)
    error = np.abs(got[known] - exact[known])
    allowed = EXACT * scale
    if precision == "float32":
        single = np.abs(plain(case, torch.float32)[known] - exact[known])
        allowed = (
            FACTOR * np.where(np.isfinite(single), single, np.inf)
            + FLOOR * np.finfo(np.float32).eps * scale
        )
    if (error > allowed).any():
        raise Finding(f"loss {got}, by plain float64 {exact}; off by {error}, allowed {allowed}")


def plain(case: Case, dtype: torch.dtype) -> np.ndarray:
    """The mean loss at each point, by a network of its own for each."""
    return np.array(
        [
            _at(case, dtype, row)
            for row in case.path.coefficients(case.path.points(case.points)).tolist()
        ]
    )


def _at(case: Case, dtype: torch.dtype, row: list[float]) -> float:
    network = copy.deepcopy(case.network).to(dtype).eval()
    start = case.path.control_points[0]
    state = {}
    for name, value in start.items():
        frozen = case.options.get("buffers") == "start" and name.endswith(
            ("running_mean", "running_var")
        )
        if frozen or not value.is_floating_point():
            state[name] = value
            continue
        parts = [c * point[name].double() for c, point in zip(row, case.path.control_points) if c]
        state[name] = sum(parts, torch.zeros_like(value.double())).to(dtype)
    network.load_state_dict(state)
    x = case.inputs.clone()
    x = x.to(dtype) if x.is_floating_point() else x
    targets = case.targets.to(dtype) if case.targets.is_floating_point() else case.targets
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = network(x)
    return float(losses(case.loss, outputs, targets).double().mean())


def losses(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row, by PyTorch's own functions."""
    if callable(loss):
        return loss(outputs, targets)
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction="none")
    if loss == "mse":
        return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)


def fingerprint(case: Case) -> dict[str, Any]:
    """All that an evaluation must leave alone."""
    return {
        "the model's tensors": digest(case.network.state_dict(keep_vars=True).values()),
        "the model's modules": [described(module) for module in case.network.modules()],
        "the path": digest(value for point in case.path.control_points for value in point.values()),
        "the data": digest([case.inputs, case.targets]),
        "the random state": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "streams": (id(sys.stdout), id(sys.stderr)),
    }


def described(module: nn.Module) -> tuple[Any, ...]:
    """A module's mode, hooks and attributes that are no tensors."""
    plain_values = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }
    hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
    return (
        type(module).__name__,
        module.training,
        hooks,
        tuple(sorted(vars(module))),
        tuple(plain_values.items()),
    )


def digest(tensors: Iterator[Tensor] | Any) -> str:
    """Contents, shapes, dtypes and gradients' flags."""
    total = hashlib.sha256()
    for tensor in tensors:
        flags = tensor.requires_grad, tensor.grad is None
        total.update(f"{tuple(tensor.shape)} {tensor.dtype} {flags}".encode())
        total.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()
