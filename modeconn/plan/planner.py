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
from modeconn.plan.parting import Branch, Parting
from modeconn.plan.program import Program, Segment
from modeconn.plan.segment import SegmentPlanner
from modeconn.plan.segment_weights import SegmentWeights, sum_to_one
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
    contents = Contents(
        points_of_path, graph.constants, dtype, device, frozen, by_content, path.blocks
    )
    shared = SharedSteps(graph)
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    coefficients = path.coefficients(distinct).numpy()
    facts = Facts(graph, contents)
    pieces = _empty_segments(path.segments_at(distinct), coefficients, contents)
    empty, trees = _parted(Parting(graph, contents), [*pieces], tables or {})
    segments = []
    for segment in empty:
        here = _rows_of(tables or {}, segment.point_indices)
        segments.append(_planned(facts, segment, contents, here, shared))
    program = Program(
        graph,
        distinct,
        inverse.reshape(-1),
        shared.steps,
        segments,
        _naive_flops(graph, contents),
        dtype,
        trees=trees,
    ).pruned()
    if not by_content:
        return program
    given = {"dtype": dtype, "device": device, "frozen": frozen, "tables": tables}
    return replace(program, plain=partial(_without_shortcuts, graph, path, points, **given))


def _without_shortcuts(graph: Graph, path: Path, points: np.ndarray, **given: Any) -> Program:
    """The program in which every value is computed whole at every point."""
    with without("dead", "constant", "combination", "merging", "sharing", "parting"):
        return make_program(graph, path, points, **given)


def _rows_of(tables: Mapping[str, Tensor], chosen: np.ndarray) -> dict[str, Tensor]:
    rows = torch.from_numpy(chosen)
    return {name: table[rows.to(table.device)] for name, table in tables.items()}


def _parted(
    parting: Parting, pieces: list[Segment], tables: Mapping[str, Tensor]
) -> tuple[list[Segment], list[Branch]]:
    """The segments that each piece of the path is divided into, numbered, and their trees."""
    segments: list[Segment] = []
    trees: list[Branch] = []
    number = 1 + max(piece.index for piece in pieces)
    for piece in pieces:
        parts, tree = parting.parted(piece, _rows_of(tables, piece.point_indices))
        for place, part in enumerate(parts):
            segments.append(replace(part, index=number) if place else part)
            number += place > 0
        if tree is not None:
            trees.append(tree)
            own = [branch for branch in tree.all() if len(branch.own)]
            for branch, segment in zip(own, segments[-len(parts) :]):
                branch.segment = segment.index
    return segments, trees


def _empty_segments(
    segment_of: np.ndarray, coefficients: np.ndarray, contents: Contents
) -> Iterator[Segment]:
    """The path's segments, and for each one more if some of its points are far out."""
    far = _is_far(coefficients, contents)
    for index in np.unique(segment_of):
        near = np.flatnonzero((segment_of == index) & ~far)
        if len(near):
            yield _empty_segment(int(index), near, coefficients[near], contents.blocks)
    beyond = int(segment_of.max()) + 1
    for index in np.unique(segment_of[far]):
        chosen = np.flatnonzero((segment_of == index) & far)
        number = beyond + int(index)
        empty = _empty_segment(number, chosen, coefficients[chosen], contents.blocks)
        yield _from_first(empty, contents) if contents.by_content else replace(empty, far=True)


def _from_first(segment: Segment, contents: Contents) -> Segment:
    """A segment as its first control point and multiples of the others' differences from it.

    Σ c_k p_k cancels where coefficients are large and sum to 1: a weight at t = 1000 has lost three
    digits. p_0 + Σ c_k (p_k - p_0) is the same and has not.
    """
    active, coefficients = list(segment.active), segment.coefficients.copy()
    blocks: dict[int, list[int]] = {}
    for place, k in enumerate(segment.active):
        blocks.setdefault(contents.block_of(k), []).append(place)
    for places in blocks.values():
        if not sum_to_one(list(coefficients[:, places].T)):
            continue
        base, *others = places
        coefficients[:, base] = 1.0
        for place in others:
            active[place] = contents.difference(active[place], active[base])
    return replace(segment, active=tuple(active), coefficients=coefficients, far=True)


def _is_far(coefficients: np.ndarray, contents: Contents) -> np.ndarray:
    """Whether each point is far out, in some block of entries that share their coefficients."""
    of_blocks = np.split(coefficients, contents.blocks, axis=1)
    far: np.ndarray = np.any([is_far(each) for each in of_blocks], axis=0)
    return far


def _empty_segment(
    index: int, point_indices: np.ndarray, coefficients: np.ndarray, blocks: int
) -> Segment:
    active = np.flatnonzero((coefficients != 0).any(0))
    # All coefficients zero is a legal point of a mixture: the network with all weights zero.
    active = active if len(active) else np.zeros(1, np.int64)
    return Segment(
        index, point_indices, tuple(active.tolist()), coefficients[:, active], blocks=blocks
    )


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
