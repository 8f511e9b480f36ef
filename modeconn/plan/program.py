"""Contents of a plan: shared steps, done once per row, and each segment's steps, done per point."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Graph, Node
from modeconn.capture.noise import Noise
from modeconn.parameters.blending import blend
from modeconn.plan.units import ALL, Units


@dataclass(frozen=True, eq=False)
class Term:
    """c(t) · shared value: one summand of a combination.

    Attributes:
        value: the shared value's number.
        coefficients: c at the segment's points, float64 [T].
    """

    value: int
    coefficients: np.ndarray


@dataclass(frozen=True, eq=False)
class Combination:
    """Σ_j c_j(t) · value_j, of shared values. A constant is one term whose coefficients are ones.

    Attributes:
        numel: size of the value, per row.
    """

    terms: tuple[Term, ...]
    units: Units = ALL
    numel: float = 0.0

    @functools.cached_property
    def constant(self) -> bool:
        return len(self.terms) == 1 and bool((self.terms[0].coefficients == 1.0).all())

    @property
    def flops(self) -> float:
        """Arithmetic of materializing it for one point, per row; none for a constant."""
        return 0.0 if self.constant else 2.0 * len(self.terms) * self.numel

    def uses(self, steps: set[int], values: set[int]) -> bool:
        """Whether it consists of nothing but some steps and shared values."""
        return all(term.value in values for term in self.terms)


@dataclass(frozen=True, eq=False)
class Varying:
    """The value of a step that is done for every point."""

    step: int
    units: Units = ALL

    def uses(self, steps: set[int], values: set[int]) -> bool:
        """Whether it consists of nothing but some steps and shared values."""
        return self.step in steps


Form = Combination | Varying


@dataclass(frozen=True, eq=False)
class Blend:
    """A weight that varies: Σ_j c_j(t) · tensor_j, materialized once per point."""

    tensors: tuple[Tensor, ...]
    coefficients: tuple[np.ndarray, ...]

    @property
    def like(self) -> Tensor:
        """A tensor of its shape."""
        return self.tensors[0]

    def at(self, point: int) -> Tensor:
        """The weight at one of the segment's points."""
        return blend(self.tensors, [each[point] for each in self.coefficients])

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The tensors as arrays, and their coefficients [points, tensors]."""
        tensors = [tensor.contiguous().numpy() for tensor in self.tensors]
        return tensors, np.stack(self.coefficients, axis=1)


@dataclass(frozen=True, eq=False)
class PerPoint:
    """A buffer with a tensor of its own at each of the segment's points, [T, …].

    Recomputed statistics are such buffers.
    """

    table: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor of its shape."""
        return self.table[0]

    def at(self, point: int) -> Tensor:
        """The buffer at one of the segment's points."""
        return self.table[point]

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The tensor of each point, with one-hot coefficients [points, points]."""
        return list(self.table.contiguous().numpy()), np.eye(len(self.table))


Moving = Blend | PerPoint


@dataclass(frozen=True, eq=False)
class SharedStep:
    """A node's value that does not depend on t, done once per row for all segments that need it.

    Attributes:
        inputs: shared values it takes.
        entries: its parameters and buffers, cut down to the requested units.
        flops, numel: arithmetic and size of the value, per row.
    """

    node: Node
    inputs: tuple[int, ...]
    entries: tuple[Tensor, ...]
    units: Units
    flops: float
    numel: float


@dataclass(frozen=True, eq=False)
class VaryingStep:
    """A node's value at each point; with `combine` set, that combination, materialized.

    Attributes:
        inputs: for each input of the node the earlier step, or the constant, that it is.
        entries: its parameters and buffers, fixed ones and such as move with t.
    """

    node: Node
    inputs: tuple[Combination | int, ...]
    entries: tuple[Tensor | Moving, ...]
    units: Units
    flops: float
    numel: float
    combine: Combination | None = None


@dataclass(eq=False)
class Segment:
    """The points that share their active control points.

    Attributes:
        point_indices: which of the plan's distinct points lie here, int [T].
        active: indices of the active control points, of the path or of differences of two of its.
        coefficients: float64 [T, K] over the active control points.
        far: whether the points lie so far out that values are not to be combined over networks.
        blocks: of entries that have coefficients of their own.
        steps: what is done for each point.
        outputs: the form of every node that the output is made of.
        forms: the forms of every node that the output takes, for `explain`.
        stale: norms whose running statistics move with t, or whose input does: their blend is not
            what the data give.
    """

    index: int
    point_indices: np.ndarray
    active: tuple[int, ...]
    coefficients: np.ndarray
    steps: list[VaryingStep] = field(default_factory=list)
    outputs: dict[int, Form] = field(default_factory=dict)
    forms: dict[int, list[Form]] = field(default_factory=dict)
    stale: set[int] = field(default_factory=set)
    far: bool = False
    blocks: int = 1

    @property
    def between(self) -> np.ndarray:
        """Whether each of the points is none of the control points, bool [T]."""
        ones, others = (self.coefficients == 1).sum(1), (self.coefficients != 0).sum(1)
        between: np.ndarray = (ones != self.blocks) | (others != self.blocks)
        return between

    @property
    def flops(self) -> float:
        """Arithmetic per row for one point, the combination of the output included."""
        combined = sum(
            form.flops for form in self.outputs.values() if isinstance(form, Combination)
        )
        return sum(step.flops for step in self.steps) + combined

    def used(self) -> set[int]:
        """The steps that the outputs take; planning tries others as well."""
        used = {form.step for form in self.outputs.values() if isinstance(form, Varying)}
        for index in reversed(range(len(self.steps))):
            if index in used:
                used |= {i for i in self.steps[index].inputs if isinstance(i, int)}
        return used

    def taken(self) -> set[int]:
        """The shared values that those steps and the outputs take up."""
        forms: list[Form | int | None] = list(self.outputs.values())
        for index in self.used():
            forms += [*self.steps[index].inputs, self.steps[index].combine]
        taken: set[int] = set()
        for form in forms:
            if isinstance(form, Combination):
                taken |= {term.value for term in form.terms}
        return taken


@dataclass(eq=False)
class Program:
    """A plan: evaluate `shared` once per row, then each segment's steps for each of its points.

    Attributes:
        points: the distinct points, in rising order, float64 [T] or [T, dim].
        inverse: for each point that was asked for its place among the distinct ones.
        shared: every shared step; the first are the inputs.
        naive_flops: arithmetic of one forward pass of one network, per row.
        dtype: of the computation; constants keep their own.
        order: the shared values that are needed, in execution order.
        noise: what the network draws at random.
        plain: plans the same without shortcuts: nothing is dead, constant, combined or shared.
        trees: where points part that have a prefix of the network in common.
    """

    graph: Graph
    points: np.ndarray
    inverse: np.ndarray
    shared: list[SharedStep]
    segments: list[Segment]
    naive_flops: float
    dtype: torch.dtype = torch.float32
    order: list[int] = field(default_factory=list)
    noise: Noise = field(default_factory=Noise)
    plain: Callable[[], Program] | None = None
    trees: Sequence[Any] = ()

    @property
    def shared_flops(self) -> float:
        """Arithmetic per row that is done once, whatever the number of points."""
        return sum(self.shared[value].flops for value in self.order)

    @property
    def varying_flops(self) -> float:
        """Arithmetic per row that is done for all points together."""
        return sum(segment.flops * len(segment.point_indices) for segment in self.segments)

    def kept(self) -> list[int]:
        """Shared values that segments take up: what must stay while the points are evaluated."""
        return sorted(set().union(*(segment.taken() for segment in self.segments)))

    def drawing(self, noise: Noise) -> Program:
        """The program whose network draws its random numbers so; by default anew at each point."""
        plan = self.plain
        return replace(self, noise=noise, plain=plan and (lambda: plan().drawing(noise)))

    def pruned(self) -> Program:
        """The program without the steps that planning tried and nobody uses."""
        segments = [_without_unused(segment) for segment in self.segments]
        program = replace(self, segments=segments)
        return replace(program, order=sorted(needed(self.shared, program.kept())))


def needed(shared: Sequence[SharedStep], values: Iterable[int]) -> set[int]:
    """Returns shared values with all those that they are made of."""
    used = set(values)
    for value in reversed(range(len(shared))):
        if value in used:
            used |= set(shared[value].inputs)
    return used


# The index of the shared steps as a segment.
SHARED = -1


def shared_steps(program: Program, kept: Iterable[int]) -> Segment:
    """Returns the shared steps as a segment of one point, which gives some of their values.

    Its outputs go by the values' numbers. Backends run it as any other segment.
    """
    one = np.ones(1)
    forms: dict[int, Combination | Varying] = {}
    steps: list[VaryingStep] = []
    order = sorted(needed(program.shared, kept))
    for number in order:
        step = program.shared[number]
        if step.node.op == "input":
            forms[number] = Combination((Term(number, one),), step.units, step.numel)
            continue
        inputs = tuple(operand_of(forms[i]) for i in step.inputs)
        forms[number] = Varying(len(steps), step.units)
        steps.append(
            VaryingStep(step.node, inputs, step.entries, step.units, step.flops, step.numel)
        )
    outputs: dict[int, Form] = {number: forms[number] for number in kept}
    return Segment(SHARED, np.zeros(1, np.int64), (0,), np.ones((1, 1)), steps, outputs)


def operand_of(form: Form) -> Combination | int:
    """Names what a varying step reads of a constant or an earlier step's value."""
    return form.step if isinstance(form, Varying) else form


def _without_unused(segment: Segment) -> Segment:
    used = segment.used()
    if len(used) == len(segment.steps):
        return segment
    place = {index: new for new, index in enumerate(sorted(used))}
    steps = []
    for index in sorted(used):
        step = segment.steps[index]
        inputs = tuple(place[i] if isinstance(i, int) else i for i in step.inputs)
        steps.append(replace(step, inputs=inputs))
    outputs: dict[int, Form] = {
        node: Varying(place[form.step], form.units) if isinstance(form, Varying) else form
        for node, form in segment.outputs.items()
    }
    return replace(segment, steps=steps, outputs=outputs)
