"""Nodes as they are called for some units, and the shared steps that calls become."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from modeconn.capture.graph import Graph, Node
from modeconn.plan.program import Combination, Form, Moving, SharedStep
from modeconn.plan.rules.base import Fit, Rule
from modeconn.plan.units import ALL, Units


class SharedSteps:
    """The shared steps of all segments, numbered by what they compute."""

    def __init__(self, graph: Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "input"]
        self.steps = [SharedStep(node, (), (), ALL, 0.0, node.numel()) for node in inputs]
        self._known: dict[Hashable, int] = {}

    def add(self, key: Hashable, step: SharedStep) -> int:
        """Returns the number of the step that computes what the key says, adding it if need be."""
        if key not in self._known:
            self._known[key] = len(self.steps)
            self.steps.append(step)
        return self._known[key]


@dataclass(frozen=True)
class Call:
    """A node as it is called for some units, with what it is called on.

    Attributes:
        node: with the arguments and the shape that fit the units.
        rule: of the operation.
        requested: the units asked for; `fit.units` are those that it has.
    """

    node: Node
    rule: Rule
    requested: Units
    inputs: Sequence[Form]
    entries: Sequence[Tensor | Moving]
    fit: Fit


def called(node: Node, fit: Fit) -> Node:
    """The node as it is called on parts of its inputs."""
    if not fit.arguments and not fit.units:
        return node
    arguments = {**node.arguments, **fit.arguments}
    return replace(node, arguments=arguments, shape=fit.units.shape(node.shape))


def shared_values(forms: Sequence[Form]) -> list[int]:
    """The shared values of forms that are known to be constant."""
    return [form.terms[0].value for form in forms if isinstance(form, Combination)]


def has_coefficients(form: Combination, coefficients: Sequence[np.ndarray]) -> bool:
    """Whether a combination's terms have these coefficients, in this order."""
    pairs = zip(form.terms, coefficients)
    return len(form.terms) == len(coefficients) and all(
        term.coefficients is each or np.array_equal(term.coefficients, each) for term, each in pairs
    )
