"""Planning of one segment: the form of every value that the network's output takes.

The planner walks the graph from its output backwards and requests each node's value *of certain
units only*. A value comes out as a combination of shared values, Σ_j c_j(t) v_j, or as varying. A
constant is the combination with one term. What needs other values asks for them (plan/asking.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from modeconn.capture.graph import Entry, In, Node
from modeconn.capture.ops import Take
from modeconn.capture.optimisations import current
from modeconn.plan.asking import Asking, Wanted, answered
from modeconn.plan.calls import Call, SharedSteps, called, has_coefficients, shared_values
from modeconn.plan.cost import flops
from modeconn.plan.facts import Facts
from modeconn.plan.merging import Merging
from modeconn.plan.program import (
    Combination,
    Form,
    Segment,
    SharedStep,
    Term,
    Varying,
    VaryingStep,
    needed,
)
from modeconn.plan.rules.base import UNKNOWN, Fit, Mismatch, Rule
from modeconn.plan.segment_weights import Group, SegmentWeights, sum_to_one
from modeconn.plan.units import ALL, Units

# Taking a part out of a value reads and writes that part once more: it pays where at most this
# share of the value is left to work on.
_WORTH_TAKING = 0.5


class SegmentPlanner:
    """Finds the forms of one segment's values.

    Args:
        facts: of the graph's nodes.
        weights: parameters and buffers on the segment.
        shared: steps of all segments, to which those found here are added.
        segment: is filled in by `plan`.
        merging: requests that were merged in an earlier plan of the segment.

    Attributes:
        forms: by node and units, the forms that the output takes.
    """

    def __init__(
        self,
        facts: Facts,
        weights: SegmentWeights,
        shared: SharedSteps,
        segment: Segment,
        merging: Merging,
    ) -> None:
        self.forms: dict[Wanted, Form] = {}
        self._facts, self._graph, self._weights, self._shared = facts, facts.graph, weights, shared
        self._segment, self._merging = segment, merging
        self._on = current()
        self._parts: dict[Wanted, Form] = {}  # taken out of values that have more units
        self._materialized: dict[int, int] = {}  # id of a combination → the step that adds it up
        self._ones = np.ones(len(segment.point_indices))
        # Shared values that are fixed on the segment and yet those of no control point.
        self._mixed: set[int] = set()

    def plan(self) -> None:
        """Plans the segment."""
        for node_id in self._graph.outputs():
            self._segment.outputs[node_id] = self._value(node_id, ALL)
        # Others were tried and turned out not to be needed.
        steps = self._segment.used()
        values = needed(self._shared.steps, self._segment.taken())
        self.forms = {key: form for key, form in self.forms.items() if form.uses(steps, values)}
        for (node_id, _), form in self.forms.items():
            self._segment.forms.setdefault(node_id, []).append(form)

    def _value(self, node_id: int, requested: Units) -> Form:
        """Returns the form of a node's value, of the requested units or more: see its `units`."""
        return answered(self._key(node_id, requested), self.forms, self._key, self._begun)

    def _key(self, node_id: int, requested: Units) -> Wanted:
        units = requested.of(self._graph.nodes[node_id].shape) if requested else ALL
        return node_id, self._merging.covering(node_id, units)

    def _begun(self, wanted: Wanted) -> Asking[Form]:
        return self._derived(self._graph.nodes[wanted[0]], wanted[1])

    # -- one node ----------------------------------------------------------------------------------

    def _derived(self, node: Node, requested: Units) -> Asking[Form]:
        if node.op == "input":
            return Combination((Term(node.id, self._ones),), ALL, node.numel())
        rule = self._facts.rule(node)
        moving = self._weights.moving(node.entries)
        inputs, fit = yield from self._fitted(node, rule, requested, moving)
        entries = [self._weights.value(name, cut) for name, cut in zip(node.entries, fit.cuts)]
        call = Call(called(node, fit), rule, requested, inputs, entries, fit)
        if node.op == "batch_norm" and self._is_stale(call):
            self._segment.stale.add(node.id)
        fixed = [entry for entry in entries if isinstance(entry, Tensor)]
        constants = [form for form in inputs if isinstance(form, Combination) and form.constant]
        if len(constants) == len(inputs):
            if len(fixed) == len(entries):
                if not self._on.constant:
                    return self._vary(call)
                values = shared_values(constants)
                return self._share(call.node, values, fixed, fit.units, self._ones)
        if node.id in self._facts.infinite:
            return self._vary(call)
        if len(constants) == len(inputs):
            combined = yield from self._combine_weights(node, call)
            return combined or self._vary(call)
        if len(fixed) == len(entries):
            return self._combine_inputs(call, fixed) or self._vary(call)
        return self._vary(call)

    def _is_stale(self, norm: Call) -> bool:
        """Whether a batch norm's input or its statistics are those of no control point."""
        for form in norm.inputs:
            if not isinstance(form, Combination) or not form.constant:
                return True
            if form.terms[0].value in self._mixed:
                return True
        leaves = (norm.node["mean"], norm.node["var"])
        statistics = [norm.entries[leaf.index] for leaf in leaves if isinstance(leaf, Entry)]
        return any(
            not isinstance(entry, Tensor) or self._weights.is_mixed(entry) for entry in statistics
        )

    def _fitted(
        self, node: Node, rule: Rule, requested: Units, points: Sequence[int]
    ) -> Asking[tuple[list[Form], Fit]]:
        """The inputs' forms, and how the node is called on them, for the requested units.

        Args:
            points: the active control points whose weights decide which units are live.
        """
        shapes = self._facts.shapes(node)
        if not self._on.dead:
            return (yield from self._uncut(node))
        requests = rule.requests(node, requested, shapes, self._weights.support(node, points))
        inputs: list[Form] = []
        for i, units in zip(node.inputs, requests):
            inputs.append((yield from self._input(i, units, rule)))
        try:
            fit = rule.fit(node, requested, [form.units for form in inputs], shapes)
        except Mismatch:
            narrow = zip(node.inputs, inputs, requests)
            inputs = [self._narrowed(i, form, units) for i, form, units in narrow]
            try:
                fit = rule.fit(node, requested, [form.units for form in inputs], shapes)
            except Mismatch:  # empty parts, say: of whole inputs every operation can be called
                return (yield from self._uncut(node))
        return inputs, replace(fit, units=fit.units.of(node.shape)) if fit.units else fit

    def _uncut(self, node: Node) -> Asking[tuple[list[Form], Fit]]:
        """The inputs' forms, whole, and how the node is called on them for all units."""
        inputs: list[Form] = []
        for i in node.inputs:
            form = yield i, ALL
            inputs.append(self._narrowed(i, form, ALL))
        return inputs, UNKNOWN.fit(node, ALL, [ALL] * len(inputs), self._facts.shapes(node))

    def _input(self, node_id: int, requested: Units, rule: Rule) -> Asking[Form]:
        """Returns at least the requested units; slices the value when at most half is requested."""
        form = yield node_id, requested
        if not requested or rule.takes:
            return form
        shape = self._graph.nodes[node_id].shape
        narrow = requested.share(shape) <= _WORTH_TAKING * form.units.share(shape)
        return self._narrowed(node_id, form, requested) if narrow else form

    def _narrowed(self, node_id: int, form: Form, requested: Units) -> Form:
        """The requested units of a value and no others, where it has more."""
        node = self._graph.nodes[node_id]
        units = requested.of(node.shape)
        if form.units == units:
            return form
        key = node_id, units
        if key not in self._parts:
            part = Node(
                node.id,
                "take",
                Take(units.within(form.units).along),
                {"x": In(0)},
                (node.id,),
                (),
                units.shape(node.shape),
                node.source,
                batched=node.batched,
            )
            self._parts[key] = self._part(part, form, units)
        return self._parts[key]

    def _part(self, take: Node, form: Form, units: Units) -> Form:
        if isinstance(form, Varying):
            return self._vary(Call(take, UNKNOWN, units, [form], (), Fit(units)))
        terms: list[Term] = []
        for term in form.terms:
            terms += self._share(take, [term.value], (), units, term.coefficients).terms
        return Combination(tuple(terms), units, take.numel())

    # -- the four classes --------------------------------------------------------------------------

    def _share(
        self,
        node: Node,
        inputs: Sequence[int],
        entries: Sequence[Tensor],
        units: Units,
        coefficients: np.ndarray,
    ) -> Combination:
        """One shared value with its coefficients."""
        numel = node.numel()
        numbers = tuple(self._weights.number(entry) for entry in entries)
        cost = flops(node, entries, numel)
        step = SharedStep(node, tuple(inputs), tuple(entries), units, cost, numel)
        owner = None if self._on.sharing else self._segment.index
        key = (node.id, node.op, tuple(inputs), numbers, units, owner)
        value = self._shared.add(key, step)
        mixed = any(self._weights.is_mixed(entry) for entry in entries)
        if mixed or not self._mixed.isdisjoint(inputs):
            self._mixed.add(value)
        return Combination((Term(value, coefficients),), units, numel)

    def _combine_weights(self, node: Node, call: Call) -> Asking[Combination | None]:
        """Combines one shared value per set of weights, where inputs are constant and weights vary.

        None where the value is not linear in the weights, where points are fewer than sets, or
        where an entry that is fixed would be scaled.
        """
        if not self._on.combination:
            return None
        linear = call.rule.linear_entries(node)
        moving = {i for i, entry in enumerate(call.entries) if not isinstance(entry, Tensor)}
        if not moving <= linear or not self._weights.combinable(node, linear):
            return None
        everyone = self._weights.moving(node.entries)
        groups = self._weights.groups(everyone, self._weight_sets(node, call.fit, linear))
        if len(groups) > len(self._segment.point_indices):
            return None
        apart = self._read_apart(node, call, groups)
        inputs, fit = call.inputs, call.fit
        terms: list[Term] = []
        for group in groups:
            if apart:  # each set of weights looks at its own live inputs only
                own = self._fitted(node, call.rule, call.requested, group.points[:1])
                inputs, fit = yield from own
            given = self._weights_of(node, fit, linear, group.points[0])
            summand, values = called(node, fit), shared_values(inputs)
            terms += self._share(summand, values, given, fit.units, group.coefficients).terms
        return Combination(tuple(terms), fit.units, called(node, fit).numel())

    def _weight_sets(
        self, node: Node, fit: Fit, linear: frozenset[int]
    ) -> list[tuple[Tensor, ...]]:
        """Per active control point, the tensors in which the value is linear."""
        cuts = [(node.entries[i], fit.cuts[i]) for i in sorted(linear)]

        def tensors(k: int) -> tuple[Tensor, ...]:
            return tuple(self._weights.tensor(name, k, cut) for name, cut in cuts)

        return [tensors(k) for k in self._weights.moving(node.entries)]

    def _weights_of(self, node: Node, fit: Fit, linear: frozenset[int], k: int) -> list[Tensor]:
        """A node's weights with those of one control point, where the value is linear in them.

        All others are fixed on the segment, and go into every summand.
        """
        tensors = []
        for i, (name, cut) in enumerate(zip(node.entries, fit.cuts)):
            if i in linear:
                tensors.append(self._weights.tensor(name, k, cut))
                continue
            fixed = self._weights.value(name, cut)
            assert isinstance(fixed, Tensor)
            tensors.append(fixed)
        return tensors

    def _read_apart(self, node: Node, call: Call, groups: Sequence[Group]) -> bool:
        """Whether sets of weights read inputs so disjoint that each is better served by its own.

        On a swing of the constructive path the two readouts read disjoint units; taken apart, each
        is the network at its own end of the segment, which the neighbouring segments need as well.
        """
        shapes, moving = self._facts.shapes(node), self._weights.moving(node.entries)

        def share(points: Sequence[int]) -> float:
            support = self._weights.support(node, points)
            requests = call.rule.requests(node, call.requested, shapes, support)
            return sum(units.share(shape) for units, shape in zip(requests, shapes.inputs))

        return sum(share(group.points) for group in groups) <= share(moving)

    def _combine_inputs(self, call: Call, entries: Sequence[Tensor]) -> Combination | None:
        """Combines one shared value per term of the inputs, where these are combinations.

        None where the value is not linear in them, or where they have different coefficients.
        """
        combinations = [form for form in call.inputs if isinstance(form, Combination)]
        if not self._on.combination or len(combinations) < len(call.inputs):
            return None
        moving = frozenset(i for i, form in enumerate(combinations) if not form.constant)
        linearity = call.rule.linearity(call.node, moving)
        coefficients = [term.coefficients for term in combinations[min(moving)].terms]
        if not linearity or (linearity == "affine" and not sum_to_one(coefficients)):
            return None
        picked: list[list[int]] = []  # per input, its shared value for each term
        for form in combinations:
            if form.constant:
                picked.append([form.terms[0].value] * len(coefficients))
            elif has_coefficients(form, coefficients):
                picked.append([term.value for term in form.terms])
            else:
                return None
        units = call.fit.units
        terms: list[Term] = []
        for values, each in zip(zip(*picked), coefficients):
            terms += self._share(call.node, values, entries, units, each).terms
        return Combination(tuple(terms), units, call.node.numel())

    def _vary(self, call: Call) -> Varying:
        operands = tuple(self._operand(form) for form in call.inputs)
        numel = call.node.numel()
        likes = [entry if isinstance(entry, Tensor) else entry.like for entry in call.entries]
        cost = flops(call.node, likes, numel)
        entries, units = tuple(call.entries), call.fit.units
        return self._add_step(VaryingStep(call.node, operands, entries, units, cost, numel))

    def _operand(self, form: Form) -> Combination | int:
        """Returns what a varying step reads: a constant, or the earlier step that has the value.

        A combination is materialized, by a step of its own.
        """
        if isinstance(form, Varying):
            return form.step
        if form.constant:
            return form
        if id(form) not in self._materialized:
            node = self._shared.steps[form.terms[0].value].node
            step = VaryingStep(node, (), (), form.units, form.flops, form.numel, combine=form)
            self._materialized[id(form)] = self._add_step(step).step
        return self._materialized[id(form)]

    def _add_step(self, step: VaryingStep) -> Varying:
        self._segment.steps.append(step)
        return Varying(len(self._segment.steps) - 1, step.units)
