"""Merges overlapping requests for a node's value when one larger value costs no more.

Which values vary, and so which are worth merging, is known only once a plan is made. So a segment
is planned first with a value for each request, and again with the merged ones, until nothing is
left to merge.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from modeconn.capture.graph import Graph
from modeconn.plan.program import Combination, Form, Varying
from modeconn.plan.units import Shape, Units

# The requested units of a value, and the form that the value has.
Request = tuple[Units, Form]


class Merging:
    """The requests on one segment, each with the larger one that it was merged into."""

    def __init__(self) -> None:
        self._merged: dict[tuple[int, Units], Units] = {}

    def covering(self, node: int, requested: Units) -> Units:
        """Returns the units to plan for where some are requested."""
        while (node, requested) in self._merged:
            requested = self._merged[node, requested]
        return requested

    def merge(self, graph: Graph, forms: Mapping[tuple[int, Units], Form]) -> bool:
        """Merges the values of a plan where it pays; returns whether it did anywhere."""
        before = len(self._merged)
        requests: dict[int, list[Request]] = {}
        for (node, units), form in forms.items():
            requests.setdefault(node, []).append((units, form))
        for node, of_node in requests.items():
            self._merge_node(node, of_node, graph.nodes[node].shape)
        return len(self._merged) > before

    def _merge_node(self, node: int, requests: list[Request], shape: Shape) -> None:
        while pair := _pair(requests, shape):
            union, form = pair[0][0].union(pair[1][0]), pair[0][1]
            self._merged |= {(node, units): union for units, _ in pair if units != union}
            others = [each for each in requests if each not in pair and each[0] != union]
            requests = [(union, form), *others]


def _pair(requests: Sequence[Request], shape: Shape) -> tuple[Request, Request] | None:
    """Two requests that are better served by one value."""
    pairs = itertools.combinations(requests, 2)
    return next((pair for pair in pairs if _worth_merging(*pair, shape)), None)


def _worth_merging(one: Request, other: Request, shape: Shape) -> bool:
    """Whether one value for both costs no more.

    A varying value is computed for every point, on this segment alone. Shared values may be used by
    other segments as well, which might request only one of the two; but where one holds the other,
    that one is enough.
    """
    (units, form), (others, another) = one, other
    union = units.union(others)
    if isinstance(form, Varying) and isinstance(another, Varying):
        return union.share(shape) <= units.share(shape) + others.share(shape)
    return union in (units, others) and _same_coefficients(form, another)


def _same_coefficients(form: Form, another: Form) -> bool:
    if not isinstance(form, Combination) or not isinstance(another, Combination):
        return False
    pairs = zip(form.terms, another.terms)
    return len(form.terms) == len(another.terms) and all(
        np.array_equal(term.coefficients, other.coefficients) for term, other in pairs
    )
