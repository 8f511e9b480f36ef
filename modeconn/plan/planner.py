"""Graph × path → program: per segment, each value is dead, constant, a combination or varying.

Shared values are numbered by what they are made of (operation, inputs, contents of the weights), so
that equal ones are one value, within a segment and between segments (plan/segment.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Graph
from modeconn.capture.optimisations import current, without
from modeconn.parameters.blending import is_far
from modeconn.parameters.paths import Path
from modeconn.plan.calls import SharedSteps
from modeconn.plan.cost import flops
from modeconn.plan.facts import Facts
from modeconn.plan.merging import Merging
from modeconn.plan.program import Program, Segment
from modeconn.plan.segment import SegmentPlanner
from modeconn.plan.segment_weights import SegmentWeights
from modeconn.plan.weights import Contents


def make_program(
    graph: Graph,
    path: Path,
    points: np.ndarray,
    *,
    dtype: torch.dtype,
    device: torch.device,
    frozen: frozenset[str],
    tables: Mapping[str, Tensor] | None = None,
    by_content: bool = True,
) -> Program:
    """Plans the evaluation of a graph at some points of a path.

    Args:
        points: as `Path.points` returns them; repeated ones are evaluated once.
        dtype, device: of the computation.
        frozen: parameters and buffers that stay those of the first control point
            (`buffers="start"`).
        tables: parameters and buffers with a tensor of their own at each of the distinct points in
            rising order, [T, …], instead of the path's (`buffers="recompute"`).
        by_content: False for a plan that can be differentiated in the control points: see
            `Contents`.
    """
    points_of_path = path.control_points
    contents = Contents(points_of_path, graph.constants, dtype, device, frozen, by_content)
    shared = SharedSteps(graph)
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    coefficients = path.coefficients(distinct).numpy()
    facts = Facts(graph, contents)
    segments = []
    for empty in _empty_segments(path.segment_of(distinct), coefficients, contents):
        chosen = empty.point_indices
        here = {name: _rows_of(table, chosen) for name, table in (tables or {}).items()}
        segments.append(_planned(facts, empty, contents, here, shared))
    program = Program(
        graph,
        distinct,
        inverse.reshape(-1),
        shared.steps,
        segments,
        _naive_flops(graph, contents),
        dtype,
    ).pruned()
    if not by_content:
        return program
    given = {"dtype": dtype, "device": device, "frozen": frozen, "tables": tables}
    return replace(program, plain=partial(_without_shortcuts, graph, path, points, **given))


def _without_shortcuts(graph: Graph, path: Path, points: np.ndarray, **given: Any) -> Program:
    """The program in which every value is computed whole at every point."""
    with without("dead", "constant", "combination", "merging", "sharing"):
        return make_program(graph, path, points, **given)


def _rows_of(table: Tensor, chosen: np.ndarray) -> Tensor:
    return table[torch.from_numpy(chosen).to(table.device)]


def _empty_segments(
    segment_of: np.ndarray, coefficients: np.ndarray, contents: Contents
) -> Iterator[Segment]:
    """The path's segments, and for each one more if some of its points are far out."""
    far = is_far(coefficients)
    for index in np.unique(segment_of):
        near = np.flatnonzero((segment_of == index) & ~far)
        if len(near):
            yield _empty_segment(int(index), near, coefficients[near])
    beyond = int(segment_of.max()) + 1
    for index in np.unique(segment_of[far]):
        chosen = np.flatnonzero((segment_of == index) & far)
        empty = _empty_segment(beyond + int(index), chosen, coefficients[chosen])
        yield _from_first(empty, contents) if contents.by_content else replace(empty, far=True)


def _from_first(segment: Segment, contents: Contents) -> Segment:
    """A segment as its first control point and multiples of the others' differences from it.

    Σ c_k p_k cancels where coefficients are large and sum to 1: a weight at t = 1000 has lost three
    digits. p_0 + Σ c_k (p_k - p_0) is the same and has not.
    """
    base, *others = segment.active
    active = (base, *(contents.difference(k, base) for k in others))
    coefficients = segment.coefficients.copy()
    coefficients[:, 0] = 1.0
    return replace(segment, active=active, coefficients=coefficients, far=True)


def _empty_segment(index: int, point_indices: np.ndarray, coefficients: np.ndarray) -> Segment:
    active = np.flatnonzero((coefficients != 0).any(0))
    # All coefficients zero is a legal point of a mixture: the network with all weights zero.
    active = active if len(active) else np.zeros(1, np.int64)
    return Segment(index, point_indices, tuple(active.tolist()), coefficients[:, active])


def _planned(
    facts: Facts,
    empty: Segment,
    contents: Contents,
    tables: Mapping[str, Tensor],
    shared: SharedSteps,
) -> Segment:
    """Plans a segment, anew for as long as requests can be merged."""
    merging = Merging()
    while True:
        segment = replace(empty, steps=[], outputs={}, forms={}, stale=set())
        weights = SegmentWeights(contents, segment, tables)
        planner = SegmentPlanner(facts, weights, shared, segment, merging)
        planner.plan()
        if not current().merging or not merging.merge(facts.graph, planner.forms):
            return segment


def _naive_flops(graph: Graph, contents: Contents) -> float:
    """Counts the arithmetic of one forward pass of one network, per row."""
    total = 0.0
    for node in graph.nodes:
        if node.batched:
            weights = [contents.tensor(name, 0) for name in node.entries]
            total += flops(node, weights, node.numel())
    return total
