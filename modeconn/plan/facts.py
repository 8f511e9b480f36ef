"""Finds once what a plan knows of a graph's nodes whatever the segment: rules and shapes."""

from __future__ import annotations

from modeconn.capture.graph import Graph, Node
from modeconn.plan.infinite import infinite_nodes
from modeconn.plan.rules.base import Rule, Shapes
from modeconn.plan.rules.table import rule_for
from modeconn.plan.weights import Contents


class Facts:
    """The rules and shapes of a graph's nodes.

    Args:
        graph: the captured network.
        contents: of the control points.

    Attributes:
        graph: likewise.
        infinite: nodes whose values are no combinations, since they may be infinite.
    """

    def __init__(self, graph: Graph, contents: Contents) -> None:
        self.graph = graph
        self.infinite = infinite_nodes(graph, contents)
        self._contents = contents
        self._rules: dict[int, Rule] = {}
        self._shapes: dict[int, Shapes] = {}

    def rule(self, node: Node) -> Rule:
        """The rule of one of the graph's nodes."""
        found = self._rules.get(node.id)
        if found is None:
            found = self._rules[node.id] = rule_for(node)
        return found

    def shapes(self, node: Node) -> Shapes:
        """The shapes of a node's inputs and of its parameters and buffers, whole."""
        found = self._shapes.get(node.id)
        if found is None:
            inputs = [self.graph.nodes[i].shape for i in node.inputs]
            entries = [self._contents.shape(name) for name in node.entries]
            found = self._shapes[node.id] = Shapes(inputs, entries)
        return found
