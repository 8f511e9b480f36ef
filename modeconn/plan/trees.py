"""Trees of points that part, as rows and as text for `explain`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from modeconn.plan.parting import Branch

# Branches further in than this are not indented further, so that lines stay readable.
_DEEPEST = 20


def tree_rows(tree: Branch) -> list[dict[str, Any]]:
    """Return the branches of a tree, each before its parts, which say what they are within."""
    rows: list[dict[str, Any]] = []
    within: dict[int, int] = {}
    for number, branch in enumerate(tree.all()):
        within |= dict.fromkeys(map(id, branch.parts), number)
        rows.append(
            {
                "source": branch.source,
                "points": branch.points,
                "segment": branch.segment if len(branch.own) else None,
                "own": len(branch.own),
                "within": within.get(id(branch)),
            }
        )
    return rows


def tree_lines(tree: Branch) -> list[str]:
    """Return a tree as lines of text: parts that read alike are told once, with their number."""
    kinds = _kinds(tree)
    lines = []
    pending: list[tuple[Branch, int, str]] = [(tree, 1, "")]
    while pending:
        branch, depth, heading = pending.pop()
        lines += [heading] if heading else []
        indent = "  " * min(depth, _DEEPEST)
        if len(branch.own):
            where = f"from {branch.source} on" if branch.source else "nowhere apart"
            points = "1 point" if len(branch.own) == 1 else f"{len(branch.own)} points"
            lines.append(f"{indent}{points}: {where}, segment {branch.segment}")
        alike: dict[int, list[Branch]] = {}
        for part in branch.parts:
            alike.setdefault(kinds[id(part)], []).append(part)
        for equal in reversed(alike.values()):
            more = f" ({len(equal)} times alike)" if len(equal) > 1 else ""
            heading = f"{indent}go on together at {branch.source}{more}:"
            pending.append((equal[0], depth + 1, heading))
    return lines


def _kinds(tree: Branch) -> dict[int, int]:
    """By branch, a number that is equal for those that read alike."""
    known: dict[Any, int] = {}
    kinds: dict[int, int] = {}
    for branch in reversed([*tree.all()]):
        inside = Counter(kinds[id(part)] for part in branch.parts)
        key = branch.source, len(branch.own), tuple(inside.items())
        kinds[id(branch)] = known.setdefault(key, len(known))
    return kinds
