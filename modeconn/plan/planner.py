"""Graph × path → program: what is dead, constant, a combination or varying, segment by segment.

The planner walks the graph from its output backwards, asking for each node's value *of certain
units only*. Per segment a value comes out as a combination of shared values, Σ_j c_j(t) v_j,
or as varying. A constant is the combination with one term. Shared values are numbered by what they
are made of (operation, inputs, contents of the weights), so that equal ones are one value, within a
segment and between segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Entry, Graph, In, Node
from modeconn.capture.ops import Take
from modeconn.parameters.paths import Path, blend
from modeconn.plan.merging import Joint
from modeconn.plan.program import (
    Blend,
    Combination,
    Form,
    Moving,
    PerPoint,
    Program,
    Segment,
    SharedStep,
    Term,
    Varying,
    VaryingStep,
    needed,
)
from modeconn.plan.rules.base import Fit, Mismatch, Rule, Shapes, Support
from modeconn.plan.rules.table import rule_for
from modeconn.plan.units import ALL, Units
from modeconn.plan.weights import Contents, Cut

# Columns that differ by no more than this are rounding of one number: (1 - t) + t is not exactly 1
# for every t.
_ROUNDING = 8 * float(np.finfo(np.float64).eps)
# Taking a part out of a value reads and writes that part once more: it pays where so much less is
# left to work on.
_WORTH_TAKING = 0.5


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
    """Plan the evaluation of a graph at some points of a path.

    Args:
        points: as `Path.points` returns them; repeated ones are evaluated once.
        dtype, device: what will be computed with.
        frozen: entries that stay those of the first control point (`buffers="start"`).
        tables: entries with a tensor of their own at each of the distinct points in rising order,
            [T, …], instead of the path's (`buffers="recompute"`).
        by_content: False for a plan that can be differentiated in the control points: see
            `Contents`.
    """
    start = {name: path.control_points[0][name] for name in frozen}
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    coefficients = path.coefficients(distinct).numpy()
    contents = Contents(
        path.control_points, {**graph.constants, **start}, dtype, device, by_content
    )
    shared = _Shared(graph)
    segments = []
    segment_of = path.segment_of(distinct)
    for index in np.unique(segment_of):
        rows = np.flatnonzero(segment_of == index)
        active = np.flatnonzero((coefficients[rows] != 0).any(0))
        # All coefficients zero is a legal point of a mixture: the network with all weights zero.
        active = active if len(active) else np.zeros(1, np.int64)
        here = {
            name: table[torch.from_numpy(rows).to(table.device)]
            for name, table in (tables or {}).items()
        }
        joint = Joint()
        while True:
            segment = Segment(
                int(index), rows, tuple(active.tolist()), coefficients[np.ix_(rows, active)]
            )
            planner = _SegmentPlanner(graph, contents, shared, segment, here, joint)
            planner.plan()
            if not joint.add(graph, planner.forms):
                break
        segments.append(segment)
    weights = {node.id: [contents.tensor(name, 0) for name in node.entries] for node in graph.nodes}
    naive = sum(flops(node, weights[node.id], node.numel()) for node in graph.nodes if node.batched)
    return Program(graph, distinct, inverse.reshape(-1), shared.steps, segments, naive).pruned()


class _Shared:
    """The shared steps of all segments, numbered by what they compute."""

    def __init__(self, graph: Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "input"]
        self.steps = [SharedStep(node, (), (), ALL, 0.0, node.numel()) for node in inputs]
        self._known: dict[tuple[object, ...], int] = {}

    def add(self, key: tuple[object, ...], step: SharedStep) -> int:
        if key not in self._known:
            self._known[key] = len(self.steps)
            self.steps.append(step)
        return self._known[key]


class _SegmentPlanner:
    """Finds the forms of one segment's values."""

    def __init__(
        self,
        graph: Graph,
        contents: Contents,
        shared: _Shared,
        segment: Segment,
        tables: Mapping[str, Tensor],
        joint: Joint,
    ) -> None:
        self.graph, self.contents, self.shared, self.segment, self.tables = (
            graph,
            contents,
            shared,
            segment,
            tables,
        )
        self.joint = joint
        self.forms: dict[tuple[int, Units], Form] = {}
        # parts of values that were delivered with more
        self.taken: dict[tuple[int, Units], Form] = {}
        self.combined: dict[int, int] = {}  # id of a combination's terms → the step that adds it up
        self.ones = np.ones(len(segment.point_indices))
        self.everyone = tuple(range(len(segment.active)))
        # Entries, by the id of their tensor, and shared values that are fixed here and yet those of
        # no control point.
        self.mixed: set[int] = set()
        self.mixed_values: set[int] = set()

    def plan(self) -> None:
        for node_id in self.graph.outputs():
            self.segment.outputs[node_id] = self.value(node_id, ALL)
        # Without those that were tried and turned out not to be needed.
        steps, values = self.segment.used(), needed(self.shared.steps, self.segment.taken())
        self.forms = {
            key: form
            for key, form in self.forms.items()
            if (
                form.step in steps
                if isinstance(form, Varying)
                else all(term.value in values for term in form.terms)
            )
        }
        for (node_id, _), form in self.forms.items():
            self.segment.forms.setdefault(node_id, []).append(form)

    def value(self, node_id: int, wanted: Units) -> Form:
        """The form of a node's value; at least the wanted units of it. Its `units` say which it has."""
        node = self.graph.nodes[node_id]
        key = (node_id, self.joint.serving(node_id, wanted.of(node.shape)))
        if key not in self.forms:
            self.forms[key] = self._derive(node, key[1])
        return self.forms[key]

    # -- one node ----------------------------------------------------------------------------------

    def _derive(self, node: Node, wanted: Units) -> Form:
        if node.op == "input":
            return Combination((Term(node.id, self.ones),), ALL, node.numel())
        rule = rule_for(node)
        inputs, fit = self._inputs(node, rule, wanted, self.everyone)
        entries = [self._entry(name, cut) for name, cut in zip(node.entries, fit.cuts)]
        call = _called(node, fit)
        fixed = all(isinstance(entry, Tensor) for entry in entries)
        constant = all(isinstance(form, Combination) and form.constant for form in inputs)
        if node.op == "batch_norm" and self._stale(node, inputs, entries):
            self.segment.stale.add(node.id)
        if constant and fixed:
            return self._share(call, _constants(inputs), entries, fit.units, self.ones)  # type: ignore[arg-type]
        form: Form | None = None
        if constant:
            form = self._combine_entries(node, rule, wanted, inputs, entries, fit)
        elif fixed:
            form = self._combine_inputs(call, rule, inputs, entries, fit.units)  # type: ignore[arg-type]
        return form or self._vary(call, inputs, entries, fit.units)

    def _stale(
        self, node: Node, inputs: Sequence[Form], entries: Sequence[Tensor | Moving]
    ) -> bool:
        """Whether a batch norm's input or its statistics are those of no control point."""
        leaves = (node["mean"], node["var"])
        statistics = [entries[leaf.index] for leaf in leaves if isinstance(leaf, Entry)]
        return any(
            not isinstance(form, Combination)
            or not form.constant
            or form.terms[0].value in self.mixed_values
            for form in inputs
        ) or any(not isinstance(entry, Tensor) or id(entry) in self.mixed for entry in statistics)

    def _inputs(
        self, node: Node, rule: Rule, wanted: Units, points: Sequence[int]
    ) -> tuple[list[Form], Fit]:
        """The inputs' forms for the wanted units, looking only at some of the active control points' weights."""
        shapes = self._shapes(node)
        wishes = rule.wants(node, wanted, shapes, self._support(node, points))
        inputs = [self._wished(i, wish, rule) for i, wish in zip(node.inputs, wishes)]
        try:
            fit = rule.fit(node, wanted, [form.units for form in inputs], shapes)
        except Mismatch:
            inputs = [
                self._narrowed(i, form, wish) for i, form, wish in zip(node.inputs, inputs, wishes)
            ]
            fit = rule.fit(node, wanted, [form.units for form in inputs], shapes)
        return inputs, replace(fit, units=fit.units.of(node.shape))

    def _shapes(self, node: Node) -> Shapes:
        entries = [tuple(self.contents.tensor(name, 0).shape) for name in node.entries]
        return Shapes([self.graph.nodes[i].shape for i in node.inputs], entries)

    def _wished(self, node_id: int, wish: Units, rule: Rule) -> Form:
        """A value with the wanted units, and perhaps with others; but not with so many that taking out a part pays."""
        form, shape = self.value(node_id, wish), self.graph.nodes[node_id].shape
        pays = not rule.takes and wish.share(shape) <= _WORTH_TAKING * form.units.share(shape)
        return self._narrowed(node_id, form, wish) if pays else form

    def _narrowed(self, node_id: int, form: Form, wish: Units) -> Form:
        """The wanted units of a value and no others, where it was delivered with more."""
        node = self.graph.nodes[node_id]
        wish = wish.of(node.shape)
        if form.units == wish:
            return form
        if (node_id, wish) not in self.taken:
            places, shape = wish.within(form.units), wish.shape(node.shape)
            take = Node(
                node.id,
                "take",
                Take(places.along),
                {"x": In(0)},
                (node.id,),
                (),
                shape,
                node.source,
                batched=node.batched,
            )
            self.taken[node_id, wish] = (
                self._vary(take, [form], (), wish)
                if isinstance(form, Varying)
                else Combination(
                    tuple(
                        term
                        for t in form.terms
                        for term in self._share(take, [t.value], (), wish, t.coefficients).terms
                    ),
                    wish,
                    take.numel(),
                )
            )
        return self.taken[node_id, wish]

    def _support(self, node: Node, points: Sequence[int]) -> Support:
        """The support of the node's weights over some of the active control points."""

        def support(entry: int, axis: int, cut: Cut) -> np.ndarray:
            masks = [
                self.contents.support(self._tensor(node.entries[entry], k, cut), axis)
                for k in points
            ]
            live: np.ndarray = np.logical_or.reduce(masks)
            return live

        return support

    # -- weights -----------------------------------------------------------------------------------

    def _tensor(self, name: str, k: int, cut: Cut) -> Tensor:
        return self.contents.tensor(name, self.segment.active[k], cut)

    def _entry(self, name: str, cut: Cut) -> Tensor | Moving:
        """An entry on this segment: one tensor if it does not change with t, else a blend of the different ones."""
        if name in self.tables:
            return self._tabulated(self.tables[name], cut)
        tensors = [self._tensor(name, k, cut) for k in self.everyone]
        if not tensors[0].is_floating_point():
            return self.contents.tensor(name, 0, cut)
        groups = self._group([(tensor,) for tensor in tensors])
        if not groups:
            return self.contents.unique(torch.zeros_like(tensors[0]))
        different = tuple(each for _, (each,), _ in groups)
        columns = tuple(column for _, _, column in groups)
        alone = len(groups) == 1 and bool((columns[0] == 1.0).all())
        if alone or (self.contents.by_content and all(np.ptp(column) == 0 for column in columns)):
            mixed = self.contents.unique(blend(different, [column[0] for column in columns]))
            if len(groups) > 1 or columns[0][0] != 1.0:
                self.mixed.add(id(mixed))
            return mixed
        return Blend(different, columns)

    def _tabulated(self, table: Tensor, cut: Cut) -> Tensor | PerPoint:
        """The same for an entry with a tensor of its own at each point."""
        for axis, index in enumerate(cut):
            if index is not None:
                table = table.index_select(axis + 1, torch.from_numpy(index).to(table.device))
        return (
            self.contents.unique(table[0].clone())
            if bool((table == table[:1]).all())
            else PerPoint(table)
        )

    def _group(
        self, tuples: Sequence[tuple[Tensor, ...]]
    ) -> list[tuple[list[int], tuple[Tensor, ...], np.ndarray]]:
        """Merge active control points with equal tensors by adding their columns; drop those that are all zero.

        Returns:
            for each different tuple of tensors: the control points that have it, the tuple, and its
                column.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for k, tensors in enumerate(tuples):
            if not all(self.contents.is_zero(tensor) for tensor in tensors):
                members.setdefault(tuple(map(self.contents.number, tensors)), []).append(k)
        groups = []
        for points in members.values():
            column = self.segment.coefficients[:, points].sum(1)
            if np.ptp(column) <= _ROUNDING * np.abs(column).max(initial=1.0):
                column = np.full_like(
                    column, 1.0 if abs(column[0] - 1.0) <= _ROUNDING else column[0]
                )
            if column.any():
                groups.append((points, tuples[points[0]], column))
        return groups

    # -- the four classes --------------------------------------------------------------------------

    def _share(
        self,
        node: Node,
        inputs: Sequence[int],
        entries: Sequence[Tensor],
        units: Units,
        column: np.ndarray,
    ) -> Combination:
        """One shared value with a column."""
        numbers = node.numel()
        key = (node.id, node.op, tuple(inputs), tuple(map(self.contents.number, entries)), units)
        step = SharedStep(
            node, tuple(inputs), tuple(entries), units, flops(node, entries, numbers), numbers
        )
        value = self.shared.add(key, step)
        if any(id(entry) in self.mixed for entry in entries) or not self.mixed_values.isdisjoint(
            inputs
        ):
            self.mixed_values.add(value)
        return Combination((Term(value, column),), units, numbers)

    def _combine_entries(
        self,
        node: Node,
        rule: Rule,
        wanted: Units,
        inputs: Sequence[Form],
        entries: Sequence[Tensor | Moving],
        fit: Fit,
    ) -> Combination | None:
        """Constant inputs, weights that vary, and the value linear in them: one shared value per set of weights."""
        linear = rule.linear_entries(node)
        if any(
            not isinstance(entry, Tensor) and i not in linear for i, entry in enumerate(entries)
        ):
            return None
        sets = [
            tuple(
                self._tensor(name, k, cut)
                for i, (name, cut) in enumerate(zip(node.entries, fit.cuts))
                if i in linear
            )
            for k in self.everyone
        ]
        groups = self._group(sets)
        if len(groups) > len(self.segment.point_indices):
            return None  # fewer points than summands
        apart = self._apart(node, rule, wanted, [points for points, _, _ in groups])
        terms: list[Term] = []
        for points, _, column in groups:
            if apart:  # each set of weights looks at its own live inputs only
                inputs, fit = self._inputs(node, rule, wanted, points[:1])
            # An entry outside of `linear` is fixed here and goes into every summand.
            values = [
                self._tensor(name, points[0], cut) if i in linear else self._entry(name, cut)
                for i, (name, cut) in enumerate(zip(node.entries, fit.cuts))
            ]
            called, given = _called(node, fit), _constants(inputs)
            terms += self._share(called, given, values, fit.units, column).terms  # type: ignore[arg-type]
        return Combination(tuple(terms), fit.units, _called(node, fit).numel())

    def _apart(
        self, node: Node, rule: Rule, wanted: Units, groups: Sequence[Sequence[int]]
    ) -> bool:
        """Whether the sets of weights read inputs that overlap so little that each is better served by its own.

        On a swing of the constructive path the two readouts read disjoint units; taken apart, each
        is the network at its own end of the segment, which the neighbouring segments need as well.
        """
        shapes = self._shapes(node)

        def wished(points: Sequence[int]) -> float:
            wishes = rule.wants(node, wanted, shapes, self._support(node, points))
            return sum(wish.share(shape) for wish, shape in zip(wishes, shapes.inputs))

        return sum(wished(points) for points in groups) <= wished(self.everyone)

    def _combine_inputs(
        self,
        node: Node,
        rule: Rule,
        inputs: Sequence[Form],
        entries: Sequence[Tensor],
        units: Units,
    ) -> Combination | None:
        """Fixed weights, inputs that are combinations, and the value linear in them: one shared value per column."""
        combinations = [form for form in inputs if isinstance(form, Combination)]
        if len(combinations) < len(inputs):
            return None
        moving = frozenset(i for i, form in enumerate(combinations) if not form.constant)
        linearity = rule.linearity(node, moving)
        columns = [term.coefficients for term in combinations[min(moving)].terms]
        if not linearity or (
            linearity == "affine" and (np.abs(sum(columns) - 1.0) > _ROUNDING * len(columns)).any()
        ):
            return None
        picked: list[list[int]] = []  # per input, its shared value for each column
        for form in combinations:
            if form.constant:
                picked.append([form.terms[0].value] * len(columns))
            elif len(form.terms) == len(columns) and all(
                map(np.array_equal, (t.coefficients for t in form.terms), columns)
            ):
                picked.append([term.value for term in form.terms])
            else:
                return None
        terms = [
            term
            for values, column in zip(zip(*picked), columns)
            for term in self._share(node, values, entries, units, column).terms
        ]
        return Combination(tuple(terms), units, node.numel())

    def _vary(
        self, node: Node, inputs: Sequence[Form], entries: Sequence[Tensor | Moving], units: Units
    ) -> Varying:
        operands = tuple(self._operand(form) for form in inputs)
        numbers = node.numel()
        weights = [entry if isinstance(entry, Tensor) else entry.like for entry in entries]
        return self._step(
            VaryingStep(
                node, operands, tuple(entries), units, flops(node, weights, numbers), numbers
            )
        )

    def _operand(self, form: Form) -> Combination | int:
        """What a varying step reads: a constant, or an earlier step; a combination becomes a step that adds it up."""
        if isinstance(form, Varying):
            return form.step
        if form.constant:
            return form
        if id(form) not in self.combined:
            node = self.shared.steps[form.terms[0].value].node
            step = VaryingStep(node, (), (), form.units, form.flops, form.numel, combine=form)
            self.combined[id(form)] = self._step(step).step
        return self.combined[id(form)]

    def _step(self, step: VaryingStep) -> Varying:
        self.segment.steps.append(step)
        return Varying(len(self.segment.steps) - 1, step.units)


def _called(node: Node, fit: Fit) -> Node:
    """The node as it is called on parts of its inputs."""
    if not fit.arguments and not fit.units:
        return node
    arguments = {**node.arguments, **fit.arguments}
    return replace(node, arguments=arguments, shape=fit.units.shape(node.shape))


def _constants(forms: Sequence[Form]) -> list[int]:
    """The shared values of forms that are known to be constant."""
    return [form.terms[0].value for form in forms if isinstance(form, Combination)]


def flops(node: Node, weights: Sequence[Tensor], numbers: float) -> float:
    """Arithmetic of a node per row: 2 per multiply-add, 1 per number of anything else."""
    if node.op == "addmm" and len(weights) == 2:
        return 2.0 * numbers * len(weights[1])
    # every input goes to each output of its kernel
    if node.op.startswith("conv_transpose") and weights:
        stride = node["stride"]
        steps: int = math.prod(stride) ** ((weights[0].dim() - 2) // len(stride))
        return 2.0 * numbers * weights[0].numel() / max(weights[0].shape[1], 1) / steps
    if node.op == "linear" or node.op.startswith("conv"):
        return 2.0 * numbers * weights[0].numel() / max(len(weights[0]), 1) if weights else numbers
    if node.op == "module":
        return 2.0 * sum(tensor.numel() for tensor in weights if tensor.is_floating_point())
    return 0.0 if node.op == "input" else numbers
