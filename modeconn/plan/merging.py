"""Values that several ask for, each some units of it: where one value for all of them costs no more.

What varies, and so what is worth joining, is known only once a plan is made. So a segment is
planned first with a value for each wish, and again with the joint ones, until nothing is left to
join.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from modeconn.capture.graph import Graph
from modeconn.plan.program import Combination, Form, Varying
from modeconn.plan.units import Shape, Units

# A wish for some units of a value, and the form of what it got.
Wish = tuple[Units, Form]


class Joint:
    """For wishes on one segment the larger ones that serve them."""

    def __init__(self) -> None:
        self._served: dict[tuple[int, Units], Units] = {}

    def serving(self, node: int, wanted: Units) -> Units:
        """The units to derive where some are wanted."""
        while (node, wanted) in self._served:
            wanted = self._served[node, wanted]
        return wanted

    def add(self, graph: Graph, forms: Mapping[tuple[int, Units], Form]) -> bool:
        """Join what can be joined of a plan's values; whether there was any."""
        before = len(self._served)
        wishes: dict[int, list[Wish]] = {}
        for (node, units), form in forms.items():
            wishes.setdefault(node, []).append((units, form))
        for node, several in wishes.items():
            shape = graph.nodes[node].shape
            while pair := _pair(several, shape):
                joint = pair[0][0].union(pair[1][0])
                self._served |= {(node, units): joint for units, _ in pair if units != joint}
                several = [
                    (joint, pair[0][1]),
                    *(wish for wish in several if wish not in pair and wish[0] != joint),
                ]
        return len(self._served) > before


def _pair(wishes: Sequence[Wish], shape: Shape) -> tuple[Wish, Wish] | None:
    """Two wishes that are better served by one value."""
    return next((pair for pair in itertools.combinations(wishes, 2) if _worth(*pair, shape)), None)


def _worth(one: Wish, other: Wish, shape: Shape) -> bool:
    """Whether one value for both costs no more.

    What varies is done for every point, on this segment alone. Shared values may be taken up by
    other segments as well, which might want only one of the two; but where one holds the other,
    that one is enough.
    """
    (units, form), (others, another) = one, other
    joint = units.union(others)
    if isinstance(form, Varying) and isinstance(another, Varying):
        return joint.share(shape) <= units.share(shape) + others.share(shape)
    return joint in (units, others) and _alike(form, another)


def _alike(form: Form, another: Form) -> bool:
    """Whether both are combinations with the same coefficients."""
    if not isinstance(form, Combination) or not isinstance(another, Combination):
        return False
    columns, others = ([term.coefficients for term in each.terms] for each in (form, another))
    return len(columns) == len(others) and all(map(np.array_equal, columns, others))
