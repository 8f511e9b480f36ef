"""Finds, by a path's plan, metrics whose largest value is at one of its break points.

On a segment where the outputs are constant every metric is; where they are affine in t, a loss
that is convex in the outputs is convex in t, and lies below its values at the segment's ends.
"""

from __future__ import annotations

import numpy as np

from modeconn.capture.graph import Graph
from modeconn.errors import ModeconnError
from modeconn.evaluation.passes import ending_at
from modeconn.evaluation.request import Request
from modeconn.metrics.convexity import check_convex
from modeconn.plan.planner import make_program
from modeconn.plan.program import Combination, Form, Segment

# Within a segment: three points show whether a coefficient is affine there.
_PLACES = (0.0, 0.25, 0.5)
_ROUNDING = 1e-9
# Metrics that rise with the mean loss.
_OF_LOSS = ("loss", "perplexity")


def break_points(segments: int) -> np.ndarray:
    """Return the t between which the control points of a chain lie on one line, [segments + 1]."""
    return np.arange(segments + 1) / segments


def metrics_at_breaks(request: Request, graph: Graph, segments: int) -> set[str]:
    """Return the metrics whose largest value is at one of the break points.

    Args:
        request: the arguments of the evaluation.
        graph: the captured network.
        segments: of the path.
    """
    if request.recomputes or graph.fallback:
        return set()
    starts = break_points(segments)[:-1]
    points = np.append((starts[:, None] + np.array(_PLACES) / segments).ravel(), 1.0)
    program = make_program(
        ending_at(graph, request),
        request.path,
        points,
        dtype=request.dtype,
        device=request.where,
        frozen=request.frozen,
    )
    kinds = [_kind(segment) for segment in program.segments]
    if all(kind == "constant" for kind in kinds):
        return set(request.head.names)
    if "other" in kinds:
        return set()
    try:
        check_convex(request.loss)
    except ModeconnError:
        return set()
    return {name for name in _OF_LOSS if request.head.is_own(name)}


def _kind(segment: Segment) -> str:
    forms = segment.outputs.values()
    combinations = [form for form in forms if isinstance(form, Combination)]
    if len(combinations) < len(forms) or not combinations:
        return "other"
    if all(form.constant for form in combinations):
        return "constant"
    return "affine" if all(_is_affine(form, segment) for form in combinations) else "other"


def _is_affine(form: Form, segment: Segment) -> bool:
    """Whether the coefficients are affine at a segment's first three points."""
    assert isinstance(form, Combination)
    for term in form.terms:
        first, middle, last = term.coefficients[:3]
        if abs(first - 2 * middle + last) > _ROUNDING:
            return False
    return len(segment.point_indices) >= len(_PLACES)
