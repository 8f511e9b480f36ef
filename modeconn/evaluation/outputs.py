"""Outputs of a network at many points of a path, for a batch of inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends import check_name, make_backend
from modeconn.backends.base import Backend
from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.backends.precision import products, without_autocast
from modeconn.capture.export import prepare
from modeconn.capture.graph import Graph, Size
from modeconn.data.inputs import Inputs, describe, leaves, moved, rows
from modeconn.errors import ModeconnError, naming_memory
from modeconn.evaluation.arguments import (
    device_of,
    dtype_of,
    fitted,
    frozen_entries,
    positive,
)
from modeconn.evaluation.collecting import outputs_at_points
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.notices import warn_of_capture
from modeconn.parameters.gradients import with_gradients
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points
from modeconn.plan.planner import make_program
from modeconn.plan.report import Plan

# Sets of points whose plans a `Forward` keeps: those of a training's evaluation, and to spare.
_PLANS = 8


class PlannedForward:
    """A network, captured and planned for some points of a path: call it with batches of inputs.

    Values that do not depend on t are computed once per call, dead units are left out, and values
    that are linear in the coefficients are combined, as `explain` shows.

    Outputs can be differentiated with respect to x, and to the control points where their tensors
    require gradients when this is made (given in state dicts). Zero weights then count as any
    others, and weights of the requested precision may change between calls, by an optimizer's step.

    Args:
        model: the architecture; its own weights do not matter, and it is left as it was, training
            mode included.
        path: of checkpoints that fit the model. Its weights are looked at here: after they have
            changed, make another one, unless they require gradients.
        t: a count of points, or the t values, in any order, repeated or not.
        sample: a few rows of input [N, …], or a tuple or dict of such tensors where the model takes
            several; only their shape and dtype count.
        buffers: "interpolate" the norms' running statistics with the weights, or keep those of the
            path's "start".
        backend: "auto", or a backend by name, which then runs or raises; "auto" leaves gradients to
            PyTorch's operations.
        precision: "float32" or "float64"; on a CUDA device also "tf32" or "bf16".
        device: of the computation; by default where the path's control points are.
        memory_budget: bytes for what is shared between points, 128 MiB by default; the outputs come
            on top of that.

    Attributes:
        t: float64 [T] for a curve, [T, dim] otherwise.
        plan: the `Plan` that `explain` would return.

    Raises:
        ModeconnError: bad input, or a network whose output is not one tensor with a row per sample.
    """

    @without_autocast
    def __init__(
        self,
        model: nn.Module,
        path: Path,
        t: Points,
        sample: Any,
        *,
        buffers: str = "interpolate",
        backend: str = "auto",
        precision: str = "float32",
        device: str | torch.device | None = None,
        memory_budget: int | None = None,
    ) -> None:
        path = with_gradients(path)
        self.t: np.ndarray = path.points(t)
        self._precision = precision
        self._dtype, self._device = dtype_of(precision), device_of(device, path)
        check_name(backend, precision, self._device)
        self._backend = backend
        self._budget = positive("memory_budget", memory_budget) or MEMORY_BUDGET
        model = fitted(model, path)
        frozen = frozen_entries(buffers, path, data=False)
        x = self._input(sample)
        self._row = describe(x)
        runner = prepare(model, self._dtype, self._device)
        graph = capture_for(path, runner, x)
        _check_output(graph)
        warn_of_capture(graph, "the rows that are given together")
        tensors = itertools.chain.from_iterable(point.values() for point in path.control_points)
        self._weights_move = any(tensor.requires_grad for tensor in tensors)
        program = make_program(
            graph,
            path,
            self.t,
            dtype=self._dtype,
            device=self._device,
            frozen=frozen,
            by_content=not self._weights_move,
        )
        self.plan = Plan(program)
        self._engines: dict[bool, Backend] = {}
        self._engine(self._weights_move)  # raises here, not at the first call

    @without_autocast
    def __call__(self, x: Any) -> Tensor:
        """Return the outputs [T, B, …] for inputs [B, …], in the order of `t`.

        Raises:
            ModeconnError: rows of another shape than the sample's, or none.
        """
        inputs = self._input(x)
        if describe(inputs) != self._row:
            raise ModeconnError(
                f"inputs have shape {describe(inputs)}: expected {self._row}, as in the sample"
            )
        differentiable = torch.is_grad_enabled() and (
            self._weights_move or any(leaf.requires_grad for leaf in leaves(inputs))
        )
        engine = self._engine(differentiable or self._weights_move)
        with (
            torch.set_grad_enabled(differentiable),
            products(self._precision, self._device),
            naming_memory(
                f"outputs of {len(self.t):,} points for {rows(inputs):,} rows were computed",
                "expected fewer rows or points at a time, or a larger machine",
            ),
        ):
            distinct: Tensor = outputs_at_points(self.plan.program, engine, inputs, self._budget)
        inverse = self.plan.program.inverse
        if np.array_equal(inverse, np.arange(len(distinct))):
            return distinct
        return distinct[torch.from_numpy(inverse).to(distinct.device)]

    def _input(self, x: Any) -> Inputs:
        if isinstance(x, Mapping):
            inputs: Inputs = {key: torch.as_tensor(value) for key, value in x.items()}
        elif isinstance(x, tuple):
            inputs = tuple(map(torch.as_tensor, x))
        else:
            inputs = torch.as_tensor(x)
        shapes = [list(tensor.shape) for tensor in leaves(inputs)]
        if not shapes or not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
            text = shapes[0] if isinstance(inputs, Tensor) else shapes
            raise ModeconnError(
                f"inputs have shape {text}: expected at least one row, [N, …], "
                "and as many of each input"
            )
        return moved(inputs, self._dtype, self._device)

    def _engine(self, differentiable: bool) -> Backend:
        if differentiable not in self._engines:
            self._engines[differentiable] = make_backend(
                self._backend,
                self.plan.program,
                self._dtype,
                self._device,
                self._precision,
                needs="gradients" if differentiable else "outputs",
            )
        return self._engines[differentiable]


class Forward:
    """A network and a path, captured once: call it with points and batches of inputs.

    The outputs can be differentiated with respect to x, and to control points whose tensors
    require gradients: give the path state dicts of such tensors
    (`module.state_dict(keep_vars=True)` has a module's own parameters). They may then change
    between calls, by an optimizer's step. Weights that do not require gradients are looked at when
    a set of points is first asked for: after they have changed, make another `Forward`.

    Args:
        model: the architecture; its own weights do not matter, and it is left as it was.
        path: of checkpoints that fit the model.
        sample: a few rows of input [N, …], or a tuple or dict of such tensors where the model takes
            several; only their shape and dtype count.
        buffers: "interpolate" the norms' running statistics with the weights, or keep those of the
            path's "start".
        backend: "auto", or a backend by name, which then runs or raises.
        precision: "float32" or "float64"; on a CUDA device also "tf32" or "bf16".
        device: of the computation; by default where the path's control points are.
        memory_budget: bytes for what is shared between points, 128 MiB by default.

    Raises:
        ModeconnError: bad input, or a network whose output is not one tensor with a row per sample.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        sample: Any,
        *,
        buffers: str = "interpolate",
        backend: str = "auto",
        precision: str = "float32",
        device: str | torch.device | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self._path = path
        self._make = functools.partial(
            PlannedForward,
            model,
            path,
            sample=sample,
            buffers=buffers,
            backend=backend,
            precision=precision,
            device=device,
            memory_budget=memory_budget,
        )
        self._planned: dict[bytes, PlannedForward] = {}
        # what is wrong is found here, not at the first call
        self._at(np.eye(path.dim)[:1] if path.dim > 1 else [0.0])

    def __call__(self, t: Points, x: Any) -> Tensor:
        """Return the outputs [T, B, …] at points, for inputs [B, …]; T points are planned once.

        Args:
            t: a count of points, or the t values, in any order, repeated or not.
            x: inputs, shaped as the sample's rows.

        Raises:
            ModeconnError: points or inputs that do not fit.
        """
        return self._at(t)(x)

    def plan(self, t: Points) -> Plan:
        """Return the plan of these points, as `explain` would."""
        return self._at(t).plan

    def _at(self, t: Points) -> PlannedForward:
        values = self._path.points(t)
        key = values.tobytes()
        found = self._planned.pop(key, None) or self._make(values)
        self._planned[key] = found  # the last is the latest
        while len(self._planned) > _PLANS:
            self._planned.pop(next(iter(self._planned)))
        return found


def forward(
    model: nn.Module,
    path: Path,
    t: Points,
    x: Any,
    *,
    buffers: str = "interpolate",
    backend: str = "auto",
    precision: str = "float32",
    device: str | torch.device | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Return the outputs of a network at each t, for the rows of x.

    For many batches with one model and path, make a `Forward` once and call that.

    Args:
        model: the architecture; its own weights do not matter, and it is left as it was.
        path: of checkpoints that fit the model.
        t: a count of points, or the t values, in any order, repeated or not.
        x: inputs [B, …], or a tuple or dict of them where the model takes several.
        buffers: "interpolate" the norms' running statistics with the weights, or keep those of the
            path's "start".
        backend: "auto", or a backend by name, which then runs or raises.
        precision: "float32" or "float64"; on a CUDA device also "tf32" or "bf16".
        device: of the computation; by default where the path's control points are.
        memory_budget: bytes for what is shared between points, 128 MiB by default.

    Returns:
        The outputs [T, B, …], in the order of t, as `vmap` of `functional_call` over the stacked
        weights computes them.

    Raises:
        ModeconnError: bad input, or a network whose output is not one tensor with a row per sample.
    """
    made = PlannedForward(
        model,
        path,
        t,
        x,
        buffers=buffers,
        backend=backend,
        precision=precision,
        device=device,
        memory_budget=memory_budget,
    )
    return made(x)


def _check_output(graph: Graph) -> None:
    example = graph.example
    if not isinstance(example, Tensor) or graph.tensor_output is None:
        raise ModeconnError(
            f"the model returns {type(example).__name__}, and forward needs one tensor [N, …]: "
            "wrap the model in a module that returns the tensor you want"
        )
    if example.dim() == 0 or not _has_row_per_input(graph):
        raise ModeconnError(
            f"the model's output has shape {list(example.shape)} for a few inputs: expected a row "
            "per input, [N, …]"
        )


def _has_row_per_input(graph: Graph) -> bool:
    assert graph.tensor_output is not None
    first = graph.nodes[graph.tensor_output].shape[:1]
    return bool(first) and isinstance(first[0], Size) and str(first[0]) == "N"
