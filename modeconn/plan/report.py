"""Reports of plans for people, as `mc.explain` returns them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from modeconn.capture.graph import Node
from modeconn.capture.opaque import Opaque
from modeconn.plan.program import Combination, Form, Program, Segment
from modeconn.plan.rules.base import UNKNOWN
from modeconn.plan.rules.table import rule_for
from modeconn.plan.trees import tree_lines, tree_rows
from modeconn.plan.units import Units


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan for evaluating a network along a path; `print` it.

    Attributes:
        program: the plan itself.
        naive_flops: arithmetic per sample of a pass per point, over all points that were asked for.
        flops: arithmetic per sample of this plan, over the same points.
    """

    program: Program

    @property
    def naive_flops(self) -> float:
        return self.program.naive_flops * len(self.program.inverse)

    @property
    def flops(self) -> float:
        return self.network_flops + self.point_flops

    @property
    def network_flops(self) -> float:
        """The part of `flops` that is done once, whatever the number of points."""
        return self.program.shared_flops

    @property
    def point_flops(self) -> float:
        """The part of `flops` that is done for every point."""
        return self.program.varying_flops

    def to_json(self) -> dict[str, Any]:
        """The plan as plain lists and numbers."""
        program = self.program
        return {
            "points": len(program.inverse),
            "distinct_points": len(program.points),
            "fallback": program.graph.fallback,
            "closed": list(program.graph.closed),
            "flops_per_sample": {
                "naive": self.naive_flops,
                "plan": self.flops,
                "once": self.network_flops,
                "per_point": self.point_flops,
            },
            "segments": [self._segment(segment) for segment in program.segments],
            "trees": [tree_rows(tree) for tree in program.trees],
        }

    def _segment(self, segment: Segment) -> dict[str, Any]:
        return {
            "segment": segment.index,
            "points": len(segment.point_indices),
            "active": list(segment.active),
            "flops_per_point": segment.flops,
            "nodes": self.nodes(segment),
        }

    def nodes(self, segment: Segment) -> list[dict[str, Any]]:
        """Describes each node on one segment: class, live units, arithmetic per sample."""
        rows = []
        for node in self.program.graph.nodes:
            if node.op == "input":
                continue
            forms = segment.forms.get(node.id, [])
            each = sum(step.flops for step in segment.steps if step.node.id == node.id)
            output = segment.outputs.get(node.id)
            each += output.flops if isinstance(output, Combination) else 0.0
            rows.append(
                {
                    "node": node.id,
                    "op": node.op,
                    "source": node.source,
                    "class": _class(forms),
                    "units": _units(node, forms),
                    "once": self._once(node, forms),
                    "per_point": each,
                    "note": _note(node),
                }
            )
        return rows

    def _once(self, node: Node, forms: list[Form]) -> float:
        """The arithmetic of a node's shared values on a segment.

        A value that other segments use as well counts on each of them.
        """
        values: set[int] = set()
        for form in forms:
            if isinstance(form, Combination):
                values |= {term.value for term in form.terms}
        steps = [self.program.shared[value] for value in values if value in self.program.order]
        return sum(step.flops for step in steps if step.node.id == node.id)

    def __str__(self) -> str:
        program = self.program
        points = _of(len(program.inverse), "point")
        segments = _of(len(program.segments), "segment")
        naive, flops = _count(self.naive_flops), _count(self.flops)
        ratio = self.naive_flops / max(self.flops, 1.0)
        passes = self.network_flops / max(program.naive_flops, 1.0)
        once = f"{_count(self.network_flops)} once, or {passes:.2f} forward passes"
        lines = [
            f"{points} ({len(program.points)} distinct) on {segments}",
            f"arithmetic per sample: {naive} by a pass per point, {flops} by this plan",
            f"  {ratio:.1f} times less: {once}",
            f"  and {_count(self.point_flops)} for the points",
        ]
        if program.graph.fallback:
            reason = program.graph.fallback
            lines.append(
                f"  runs as it is, once per point, since it could not be captured: {reason}"
            )
        for tree in program.trees:
            lines += ["where points part that share what is below:", *tree_lines(tree)]
        alike: dict[str, list[Segment]] = {}
        for segment in program.segments:
            alike.setdefault("\n".join(_table(self.nodes(segment))), []).append(segment)
        for table, equal in alike.items():
            names = ", ".join(str(segment.index) for segment in equal)
            count = sum(len(segment.point_indices) for segment in equal)
            lines += [f"segment{'s' if len(equal) > 1 else ''} {names} ({count} points)", table]
        return "\n".join(lines)


def _class(forms: list[Form]) -> str:
    if not forms:
        return "dead"
    combinations = [form for form in forms if isinstance(form, Combination)]
    if len(combinations) < len(forms):
        return "varying"
    return "constant" if all(form.constant for form in combinations) else "combination"


def _units(node: Node, forms: list[Form]) -> str:
    """live/all along the axes that are cut down, "all" where none is."""
    if not forms:
        return "none"
    live = functools.reduce(Units.union, (form.units for form in forms)).of(node.shape)
    parts = [f"{len(index)}/{node.shape[axis]}" for axis, index in live.along.items()]
    return " × ".join(parts) or "all"


def _note(node: Node) -> str:
    if isinstance(node.function, Opaque):
        return f"the module itself, per point: {node.function.reason}"
    return f"no rule for {node.op}: evaluated as it is" if rule_for(node) is UNKNOWN else ""


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [_line("operation", "where", "class", "units", "once", "a point")]
    for row in rows:
        once, each = (_count(row[key]) if row[key] else "-" for key in ("once", "per_point"))
        line = _line(row["op"], row["source"], row["class"], row["units"], once, each)
        lines.append(f"{line}  {row['note']}".rstrip())
    return lines


def _line(*cells: str) -> str:
    op, source, kind, units, once, each = cells
    return f"  {op[:21]:<22}{source[:23]:<24}{kind:<13}{units:>14}{once:>10}{each:>10}"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _of(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
