"""Switches of what makes an evaluation faster and must not change its numbers: for tests alone.

with without("dead", "winograd"):
    mc.evaluate(...)

No public name: every evaluation has all of them on. The fuzzer draws which are off (tests/fuzz),
and tests/test_optimisations.py shows that each changes what is computed, and not what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Optimisations:
    """Lists what may be switched off.

    Attributes:
        dead: units that nothing reads are left out; off: every value is computed whole.
        constant: values that do not move are computed once per batch; off: at every point.
        combination: values that are linear in the coefficients are combined; off: they vary.
        merging: overlapping requests for a value become one.
        folding: norms become part of the layer before them, in the engine and in kernels.
        winograd: 3 × 3 convolutions in the engine take 16 products for four pixels.
        direct: networks of common layers are captured without torch.export.
        reuse: a captured graph is taken up again; off: every call captures anew.
        sharing: segments share equal values; off: each segment has its own.
        parting: points that have a prefix of the network in common share it.
    """

    dead: bool = True
    constant: bool = True
    combination: bool = True
    merging: bool = True
    folding: bool = True
    winograd: bool = True
    direct: bool = True
    reuse: bool = True
    sharing: bool = True
    parting: bool = True


NAMES = tuple(each.name for each in fields(Optimisations))
# Of this thread (and of tasks that it starts): other evaluations keep theirs.
_ALL = Optimisations()
_CURRENT: ContextVar[Optimisations] = ContextVar("optimisations", default=_ALL)


def current() -> Optimisations:
    """Return which optimisations are on here."""
    return _CURRENT.get()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Within, some optimisations are off, for captures, plans and backends that are made there."""
    before = _CURRENT.set(replace(current(), **dict.fromkeys(names, False)))
    try:
        yield
    finally:
        _CURRENT.reset(before)
