"""Values that may be infinite, as masks are: sums of their multiples would be NaN.

A mask of -inf is added to scores before a softmax. Where the scores are a combination, each summand
would have the mask, and Σ_k c_k (-inf) is NaN as soon as a coefficient is zero or negative. So such
values are materialized before the mask is added.
"""

from __future__ import annotations

import math
from typing import Any

from modeconn.capture.graph import Entry, Graph, Node
from modeconn.plan.weights import Contents

# Their values are finite whatever they are given.
_FINITE = frozenset(
    "softmax scaled_dot_product_attention sigmoid tanh hardtanh relu6 hardsigmoid".split()
)


def infinite_nodes(graph: Graph, contents: Contents) -> frozenset[int]:
    """Return the nodes whose value an infinite number goes into, which is written down somewhere.

    Args:
        graph: of the network: infinities among the arguments count.
        contents: of the control points: those in masks and other constants count.
    """
    found: set[int] = set()
    for node in graph.nodes:
        reached = any(i in found for i in node.inputs) or _has_infinite(node, contents)
        if reached and node.op not in _FINITE:
            found.add(node.id)
    return frozenset(found)


def _has_infinite(node: Node, contents: Contents) -> bool:
    return any(_is_infinite(leaf, node, contents) for leaf in node.arguments.values())


def _is_infinite(leaf: Any, node: Node, contents: Contents) -> bool:
    if isinstance(leaf, (list, tuple)):
        return any(_is_infinite(item, node, contents) for item in leaf)
    if isinstance(leaf, Entry):
        name = node.entries[leaf.index]
        return contents.is_fixed(name) and contents.is_infinite(name)
    return isinstance(leaf, float) and math.isinf(leaf)
