"""Planned passes: a network's outputs at many points of a path, for inputs that it will see."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.backends import make_backend
from modeconn.backends.base import Backend
from modeconn.backends.precision import products, without_autocast
from modeconn.capture.export import is_at_hand, prepare
from modeconn.capture.graph import Graph
from modeconn.data.inputs import Inputs, describe, leaves, moved, rows
from modeconn.errors import Unsupported
from modeconn.evaluation.collecting import outputs_at_points
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.replay.stand_in import wait_for
from modeconn.parameters.paths import Path
from modeconn.plan.planner import make_program
from modeconn.plan.program import Program


@dataclass(frozen=True)
class Setting:
    """Holds what planned passes compute with.

    Attributes:
        dtype, device: of the model's own weights.
        frozen: names of tensors that do not move along the path.
        backend: as for `evaluate`.
        budget: bytes for what is shared between points.
    """

    dtype: torch.dtype
    device: torch.device
    frozen: frozenset[str]
    backend: str
    budget: int

    @property
    def precision(self) -> str:
        """The precision's name."""
        return "float64" if self.dtype == torch.float64 else "float32"


class Passes:
    """Runs a network at points of a path for inputs, all points of a batch in one pass.

    Args:
        model: the user's; it is never called or changed.
        path: of checkpoints that fit it.
        setting: what to compute with.

    Attributes:
        seconds: that plans and passes have taken, captures apart.
    """

    def __init__(self, model: nn.Module, path: Path, setting: Setting) -> None:
        self._path, self._setting = path, setting
        self._runner = prepare(model, setting.dtype, setting.device)
        self._graphs: dict[str, Graph] = {}
        self.seconds = 0.0

    def _check_inputs(self, inputs: Inputs) -> None:
        """Raise Unsupported for inputs of another dtype or device than the weights."""
        setting = self._setting
        for leaf in leaves(inputs):
            if leaf.is_floating_point() and leaf.dtype != setting.dtype:
                raise Unsupported(f"the model is given {leaf.dtype}, and has {setting.dtype}")
            if leaf.device != setting.device:
                raise Unsupported(f"inputs are on {leaf.device}, and weights on {setting.device}")
        if setting.dtype not in (torch.float32, torch.float64):
            raise Unsupported(f"weights are {setting.dtype}, and planned passes float32 or float64")

    def is_at_hand(self, inputs: Inputs) -> bool:
        """Whether the network is captured for inputs of this kind, or was in milliseconds."""
        self._check_inputs(inputs)
        return is_at_hand(self._runner, moved(inputs, self._setting.dtype, self._setting.device))

    @without_autocast
    def outputs(self, t: np.ndarray, batches: Sequence[Inputs]) -> list[Any]:
        """Return the outputs for each batch: their structure, with tensors [T, B, …] in it.

        Raises:
            Unsupported: the network runs as it is, or mixes or lacks rows.
        """
        engines: dict[str, tuple[Program, Backend]] = {}
        results = []
        graphs = [self._graph(inputs) for inputs in batches]
        started = time.perf_counter()
        with torch.no_grad(), products(self._setting.precision, self._setting.device):
            for inputs, graph in zip(batches, graphs):
                kind = _kind(inputs)
                if kind not in engines:
                    engines[kind] = self._engine(t, graph)
                program, engine = engines[kind]
                result = outputs_at_points(program, engine, inputs, self._setting.budget)
                results.append(_ordered(result, program.inverse))
        wait_for(self._setting.device)
        self.seconds += time.perf_counter() - started
        return results

    def _graph(self, inputs: Inputs) -> Graph:
        self._check_inputs(inputs)
        kind = _kind(inputs)
        if kind not in self._graphs:
            graph = capture_for(self._path, self._runner, inputs)
            _check(graph, rows(inputs))
            self._graphs[kind] = graph
        return self._graphs[kind]

    def _engine(self, t: np.ndarray, graph: Graph) -> tuple[Program, Backend]:
        setting = self._setting
        program = make_program(
            graph,
            self._path,
            t,
            dtype=setting.dtype,
            device=setting.device,
            frozen=setting.frozen,
        )
        engine = make_backend(
            setting.backend,
            program,
            setting.dtype,
            setting.device,
            setting.precision,
            needs="outputs",
        )
        return program, engine


def _kind(inputs: Inputs) -> str:
    return f"{type(inputs).__name__} {describe(inputs)}"


def _check(graph: Graph, count: int) -> None:
    """Raise Unsupported for a network that planned passes gain nothing for, or would change."""
    if graph.fallback:
        raise Unsupported(f"the model could not be captured: {graph.fallback}")
    if graph.random or any(node.random for node in graph.nodes):
        raise Unsupported("the model draws random numbers")
    if graph.mixes_rows:
        raise Unsupported("an output depends on the other rows of its batch")
    for leaf in pytree.tree_leaves(graph.example):
        if not isinstance(leaf, Tensor) or not leaf.dim():
            raise Unsupported("the model returns other things than tensors with a row per input")
    for node in graph.outputs():
        if str(next(iter(graph.nodes[node].shape), "")) != "N":
            raise Unsupported("the model returns tensors without a row per input")


def _ordered(result: Any, inverse: np.ndarray) -> Any:
    """The points in the order in which they were asked for."""
    if np.array_equal(inverse, np.arange(len(inverse))):
        return result
    order = torch.from_numpy(inverse)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[order.to(tensor.device)], result)
