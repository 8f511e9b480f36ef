"""Axes of values and entries as trees, which operations tie together to be permuted alike.

An axis is an *atom*, whose indices may be permuted as one pleases; a product of axes, outermost
first, as heads × units; or a sum of axes, one behind the other, as in a concatenation. Two axes are
tied where an operation needs them to be permuted alike. An atom is frozen, with the reason, where
no permutation is known to leave the network's function as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from modeconn.errors import Unsupported

# Stands for the number of rows in axes that depend on it: a prime that no layer's width is likely
# to have. Such an axis is a frozen atom of that size.
ROWS = 1009


class Axis:
    """An axis of some size."""

    size: int


class Atom(Axis):
    """An axis whose indices are permuted freely, or not at all.

    Args:
        size: the number of indices.
        reason: why it is frozen; "" where it is free.

    Attributes:
        to: the axis that it was found to be; None while it stands for itself.
    """

    def __init__(self, size: int, reason: str = "") -> None:
        self.size, self.reason = size, reason
        self.to: Axis | None = None


class Uniform(Axis):
    """An axis along which all numbers are equal: constants and broadcast copies.

    Any permutation leaves it as it is, and it is tied to nothing.
    """

    def __init__(self, size: int) -> None:
        self.size = size


class Product(Axis):
    """An axis that is several, the outermost first."""

    def __init__(self, parts: Sequence[Axis]) -> None:
        self.parts = list(parts)
        self.size = math.prod(part.size for part in parts)


class Sum(Axis):
    """An axis that is several, one behind the other."""

    def __init__(self, parts: Sequence[Axis]) -> None:
        self.parts = list(parts)
        self.size = sum(part.size for part in parts)


class Unflattened:
    """An axis seen as `count` × the rest; whether that is a product or slices shows later.

    A projection to queries, keys and values is unflattened to [3, units] and taken apart by
    `select`: then it is three slices, each with a permutation of its own. Heads are unflattened as
    well, and stay a product. The first operation that tells them apart decides.

    Args:
        axis: the axis; None where slices are given.
        count: the size of the outer axis.
        slices: the slices, where they are known.

    Attributes:
        outer, inner: its two axes.
    """

    def __init__(
        self, axis: Axis | None, count: int, size: int, slices: Sequence[Axis] = ()
    ) -> None:
        self.axis, self.count = axis, count
        self.slices = list(slices)
        self.factors: tuple[Axis, Axis] | None = None
        self.outer, self.inner = Part(self, count), Part(self, size)

    def sliced(self, reason: str) -> list[Axis] | None:
        """Its slices, one for each outer index; None where it is a product already."""
        if self.slices or self.factors is not None or self.axis is None:
            return self.slices or None
        rest, slices = self.axis, []
        for _ in range(self.count - 1):
            cut = split(rest, self.inner.size)
            if cut is None:
                freeze(self.axis, reason)
                return None
            slices.append(cut[0])
            rest = cut[1]
        self.slices = [*slices, rest]
        return self.slices

    def resolved(self) -> tuple[Axis, Axis]:
        """Both axes, as those of a product; slices have to be permuted alike then."""
        if self.factors is None and self.slices:
            for other in self.slices[1:]:
                tie(self.slices[0], other)
            self.factors = Atom(self.count, "slices of different parts"), self.slices[0]
        elif self.factors is None:
            assert self.axis is not None
            found = factor(self.axis, self.inner.size)
            if found is None:
                reason = "a view across its parts"
                freeze(self.axis, reason)
                found = Atom(self.count, reason), Atom(self.inner.size, reason)
            self.factors = found
        return self.factors


class Part(Axis):
    """One of the two axes of an unflattened one."""

    def __init__(self, of: Unflattened, size: int) -> None:
        self.of, self.size = of, size


# -- building and reading --------------------------------------------------------------------------


def product(parts: Sequence[Axis]) -> Axis:
    """Return the axis that some make up together, the outermost first."""
    flat: list[Axis] = []
    for part in _rejoined(parts):
        part = resolve(part)
        flat += part.parts if isinstance(part, Product) else [part]
    flat = [part for part in flat if part.size != 1]
    if not flat:
        return Uniform(1)
    return flat[0] if len(flat) == 1 else Product(flat)


def _rejoined(parts: Sequence[Axis]) -> list[Axis]:
    """The parts, with both parts of an undecided axis as that axis again."""
    found: list[Axis] = []
    for part in reversed(parts):  # the innermost were unflattened last
        last = found[-1] if found else None
        if isinstance(part, Part) and isinstance(last, Part) and part.of is last.of:
            whole = part.of
            if part is whole.outer and last is whole.inner and whole.factors is None:
                found[-1] = concatenated(whole.slices) if whole.axis is None else whole.axis
                continue
        found.append(part)
    return found[::-1]


def concatenated(parts: Sequence[Axis]) -> Axis:
    """Return the axis of several, one behind the other."""
    flat: list[Axis] = []
    for part in map(resolve, parts):
        flat += part.parts if isinstance(part, Sum) else [part]
    flat = [part for part in flat if part.size]
    return flat[0] if len(flat) == 1 else Sum(flat)


def resolve(axis: Axis) -> Axis:
    """Return what an axis is known to be by now."""
    while True:
        if isinstance(axis, Atom) and axis.to is not None:
            axis = axis.to
        elif isinstance(axis, Part):
            axis = axis.of.resolved()[axis is axis.of.inner]
        else:
            break
    if isinstance(axis, Product):
        return product(axis.parts)
    return concatenated(axis.parts) if isinstance(axis, Sum) else axis


def is_sliced(axis: Axis) -> bool:
    """Whether an axis is of one that was taken apart, so that it is no axis of its own."""
    while isinstance(axis, Atom) and axis.to is not None:
        axis = axis.to
    if not isinstance(axis, Part) or axis.of.factors is not None:
        return False
    return bool(axis.of.slices) or (axis.of.axis is not None and is_sliced(axis.of.axis))


def atoms(axis: Axis) -> list[Atom]:
    """Return the atoms of an axis, in order."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [axis]
    found: list[Atom] = []
    if isinstance(axis, Product | Sum):
        for part in axis.parts:
            found += atoms(part)
    return found


def freeze(axis: Axis, reason: str) -> None:
    """Freeze all atoms of an axis, for a reason; the first one stays."""
    for atom in atoms(axis):
        atom.reason = atom.reason or reason


# -- tying -----------------------------------------------------------------------------------------


def tie(one: Axis, other: Axis) -> Axis:
    """Have two axes permuted alike, and return that axis; what cannot be is frozen.

    Where one of them is uniform it takes part in nothing, and the axis is the other one.

    Raises:
        Unsupported: they are of different sizes.
    """
    one, other = resolve(one), resolve(other)
    if one is other or one.size == 1 or isinstance(other, Uniform):
        return one
    if isinstance(one, Uniform):
        return other
    if one.size != other.size:
        raise Unsupported(f"axes of {one.size} and {other.size} indices are tied")
    if isinstance(one, Atom):
        return _become(one, other)
    if isinstance(other, Atom):
        return _become(other, one)
    if isinstance(one, Sum) or isinstance(other, Sum):
        return _tie_sums(one, other)
    assert isinstance(one, Product)
    assert isinstance(other, Product)
    return _tie_products(one, other)


def _become(atom: Atom, axis: Axis) -> Axis:
    """An atom turns out to be another axis, whose uniform parts may be permuted with it."""
    axis = _concrete(axis)
    reason = atom.reason
    if any(each is atom for each in atoms(axis)):
        freeze(axis, reason or "an axis that is a part of itself")
        return axis
    if reason:
        freeze(axis, reason)
    atom.to = axis
    return axis


def _concrete(axis: Axis) -> Axis:
    """The axis with atoms in the place of uniform parts."""
    if isinstance(axis, Uniform):
        return Atom(axis.size)
    if isinstance(axis, Product):
        return Product([_concrete(part) for part in axis.parts])
    return Sum([_concrete(part) for part in axis.parts]) if isinstance(axis, Sum) else axis


def _tie_sums(one: Axis, other: Axis) -> Axis:
    if not isinstance(one, Sum):
        one, other = other, one
    assert isinstance(one, Sum)
    cut = split(other, one.parts[0].size)
    if cut is None:
        return _freeze_both(one, other, "a concatenation across parts of a product")
    first = tie(one.parts[0], cut[0])
    return concatenated([first, tie(concatenated(one.parts[1:]), cut[1])])


def _tie_products(one: Product, other: Product) -> Axis:
    inner, its = one.parts[-1], other.parts[-1]
    if inner.size > its.size:
        one, other, inner, its = other, one, its, inner
    rest = other.parts[:-1]
    if inner.size < its.size:
        cut = factor(its, inner.size)
        if cut is None:
            return _freeze_both(one, other, "views with parts of other sizes")
        rest, its = [*rest, cut[0]], cut[1]
    inner = tie(inner, its)
    return product([tie(product(one.parts[:-1]), product(rest)), inner])


def _freeze_both(one: Axis, other: Axis, reason: str) -> Axis:
    freeze(one, reason)
    freeze(other, reason)
    return one


def split(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Cut an axis in two behind `at` indices; None where that cuts through a part's inner axes."""
    axis = resolve(axis)
    if isinstance(axis, Uniform):
        return Uniform(at), Uniform(axis.size - at)
    if isinstance(axis, Atom):
        pair = Atom(at, axis.reason), Atom(axis.size - at, axis.reason)
        axis.to = Sum(pair)
        return pair
    if isinstance(axis, Sum):
        return _split_sum(axis, at)
    assert isinstance(axis, Product)
    inner = axis.size // axis.parts[0].size
    cut = None if at % inner else split(axis.parts[0], at // inner)
    if cut is None:
        return None
    first, second = cut
    return product([first, *axis.parts[1:]]), product([second, *axis.parts[1:]])


def _split_sum(axis: Sum, at: int) -> tuple[Axis, Axis] | None:
    before: list[Axis] = []
    for i, part in enumerate(axis.parts):
        if at == 0:
            return concatenated(before), concatenated(axis.parts[i:])
        if part.size > at:
            cut = split(part, at)
            if cut is None:
                return None
            return concatenated([*before, cut[0]]), concatenated([cut[1], *axis.parts[i + 1 :]])
        before.append(part)
        at -= part.size
    raise AssertionError("a cut behind the last index")


def factor(axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    """Write an axis as outer × inner indices; None where its parts are others."""
    axis = resolve(axis)
    if axis.size % inner:
        return None
    if inner == 1:
        return axis, Uniform(1)
    if inner == axis.size:
        return Uniform(1), axis
    outer = axis.size // inner
    if isinstance(axis, Uniform):
        return Uniform(outer), Uniform(inner)
    if isinstance(axis, Atom):
        pair = Atom(outer, axis.reason), Atom(inner, axis.reason)
        axis.to = Product(pair)
        return pair
    return _factor_product(axis, inner) if isinstance(axis, Product) else None


def _factor_product(axis: Product, inner: int) -> tuple[Axis, Axis] | None:
    done: list[Axis] = []
    have = 1
    for i in range(len(axis.parts) - 1, -1, -1):
        if have == inner:
            return product(axis.parts[: i + 1]), product(done)
        part = axis.parts[i]
        if have * part.size > inner:
            cut = None if inner % have else factor(part, inner // have)
            if cut is None:
                return None
            return product([*axis.parts[:i], cut[0]]), product([cut[1], *done])
        done = [part, *done]
        have *= part.size
    raise AssertionError("an inner axis as large as the whole")
