"""Values that are derived from each other, without recursion: networks are deep, and stacks not.

What derives a value is a generator that yields what it needs to know, and is sent the answer. The
generators under way are a list, so that a chain of nodes may be of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from modeconn.plan.program import Form
from modeconn.plan.units import Units

# A node and units of its value; which of them are planned for is in the planner's hands.
Wanted = tuple[int, Units]
Result = TypeVar("Result")
# Yields values that it needs the forms of, is sent them, and returns.
Asking = Generator[Wanted, Form, Result]


def answered(
    first: Wanted,
    known: dict[Wanted, Form],
    key: Callable[[int, Units], Wanted],
    derive: Callable[[Wanted], Asking[Form]],
) -> Form:
    """Returns the form of a value, and notes those of all that it takes.

    Args:
        first: a node and units, as `key` returns them.
        known: forms that were derived before, to which those found here are added.
        key: the node and units to plan for where some are wanted.
        derive: begins to derive what a key stands for.
    """
    pending: list[tuple[Wanted, Asking[Form]]] = []
    if first not in known:
        pending.append((first, derive(first)))
    # A generator is begun with None, and told the form that it asked for after that.
    answer: Form | None = None
    while pending:
        wanted, deriving = pending[-1]
        try:
            asked = key(*deriving.send(answer))  # type: ignore[arg-type]
        except StopIteration as done:
            answer = known[wanted] = done.value
            pending.pop()
            continue
        answer = known.get(asked)
        if answer is None:
            pending.append((asked, derive(asked)))
    return known[first]
