"""Activation matching: units are those of the other network that do the same on data.

The correlation of two units over samples (and pixels, or tokens) says how much they are alike; one
assignment a group finds the best match (Li et al. 2015, "Convergent learning"; Ainsworth et al.
2023, section 3.1). Both networks run once over the data, node by node: a value is kept until
nothing reads it any more, and what remains of it are sums in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.activations import OPERATIONS
from modeconn.capture.mixing import each_value
from modeconn.data.inputs import Inputs, rows
from modeconn.training.alignment.assignment import matched
from modeconn.training.alignment.groups import Group, Groups
from modeconn.training.alignment.layouts import Layout, Permutations, exposed
from modeconn.training.alignment.weights import WeightMatching

_NONLINEAR = OPERATIONS | {"softmax", "prelu", "getitem"}
# Where a group has no activation behind it, as the stream of a transformer: values that are looked
# at. Others are those in another arrangement.
_COMPUTED = frozenset(
    "linear addmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d matmul bmm mm add mul "
    "batch_norm layer_norm rms_norm group_norm embedding scaled_dot_product_attention".split()
)
# A variance below this share of the largest counts as none: the unit is constant.
_CONSTANT = 1e-12
# What weights count beside correlations: they decide where these are equal.
_DECIDES = 1e-6


class _Sums:
    """Sums over samples of the units of two networks, for their correlation [n, n]."""

    def __init__(self) -> None:
        self._count = 0
        # of both networks' values and of their squares, and of the products
        self._totals: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add values [samples, n] of both networks."""
        a, b = a.double(), b.double()
        new = [a.sum(0), a.square().sum(0), b.sum(0), b.square().sum(0), a.T @ b]
        old = self._totals or map(torch.zeros_like, new)
        self._totals = [total + more for total, more in zip(old, new)]
        self._count += len(a)

    def correlation(self) -> np.ndarray:
        """The correlations, [n, n]; zero with a unit that is constant."""
        *sums, products = (total / self._count for total in self._totals)
        mean_a, spread_a = _mean_and_spread(*sums[:2])
        mean_b, spread_b = _mean_and_spread(*sums[2:])
        covariance = products - mean_a[:, None] * mean_b
        found: np.ndarray = (covariance * spread_a[:, None] * spread_b).cpu().numpy()
        return found


def _mean_and_spread(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The means, and the inverse standard deviations; zero for constant units."""
    variance = square - mean.square()
    varies = variance > _CONSTANT * square.max().clamp_min(torch.finfo(torch.float64).tiny)
    return mean, torch.where(varies, variance.clamp_min(0), torch.inf).rsqrt()


class Correlations:
    """The correlations of all groups' units between two networks, over data.

    Args:
        groups: of a captured network.
        a, b: the networks.
    """

    def __init__(self, groups: Groups, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        assert groups.graph is not None
        self._groups, self._graph = groups, groups.graph
        self._states = a, b
        self._by_name = {group.name: group for group in groups}
        self._read = self._nodes()
        self._sums: dict[tuple[str, int, int, int], _Sums] = {}
        self.samples = 0

    def _nodes(self) -> dict[int, set[str]]:
        """The nodes whose values are looked at, with the groups for which they are."""
        found: dict[str, dict[bool, list[int]]] = {}
        for i, axes in self._groups.values.items():
            op = self._graph.nodes[i].op
            if op not in _NONLINEAR and op not in _COMPUTED:
                continue
            shape = [_extent(axis) for axis in axes]
            for _, names, _ in exposed(torch.empty(shape, device="meta"), axes):
                for name in names:
                    if self._around(name, names):
                        found.setdefault(name, {}).setdefault(op in _NONLINEAR, []).append(i)
        nodes: dict[int, set[str]] = {}
        for name, kinds in found.items():
            for i in kinds.get(True) or kinds[False]:
                nodes.setdefault(i, set()).add(name)
        return nodes

    def add(self, x: Inputs) -> None:
        """Add a batch."""
        self.samples += rows(x)
        streams = [each_value(self._graph, state, x, self._read) for state in self._states]
        for (node, one), (_, other) in zip(*streams):
            axes = self._groups.values[node]
            parts = zip(exposed(one, axes), exposed(other, axes))
            for part, ((a, names, _), (b, _, _)) in enumerate(parts):
                self._add_part(node, part, names, (a, b))

    def _add_part(
        self, node: int, part: int, names: Sequence[str], pair: tuple[Tensor, Tensor]
    ) -> None:
        for axis, name in enumerate(names):
            around = self._around(name, names) if name in self._read[node] else []
            if around:
                # units last, all else are samples
                flat = [_units_last(x, around) for x in pair]
                self._sums.setdefault((name, node, part, axis), _Sums()).add(*flat)

    def _around(self, name: str, names: Sequence[str]) -> list[int]:
        """The axes of a group's units, with those that they are within, among the axes of a value.

        No axes where other units are beside them, which would be samples in another order.
        """
        group = self._by_name.get(name)
        if group is None:
            return []
        own = [name] if group.within is None else [group.within, name]
        free = [n for n in names if n in self._by_name or n in own]
        return [names.index(n) for n in own] if sorted(free) == sorted(own) else []

    def matched(self, weights: WeightMatching) -> tuple[Permutations, float, float]:
        """Match the units; also return the mean correlation before and after.

        Args:
            weights: of the same networks, which decide between units that are constant on the data,
                and units that no value of the graph shows.
        """
        tables: dict[str, np.ndarray] = {}
        for (name, *_), sums in self._sums.items():
            tables[name] = tables.get(name, 0.0) + sums.correlation()
        counts = Counter(name for name, *_ in self._sums)
        permutations = self._groups.identity()
        clusters = self._groups.clusters()
        shown: dict[str, dict[str, np.ndarray]] = {}
        for outer, inner in clusters.items():
            names = [outer, *(group.name for group in inner)]
            shown[outer] = {
                name: _by_pairs(tables[name], self._by_name[name])
                for name in names
                if name in tables
            }
            permutations |= matched(outer, inner, shown[outer], outer in permutations)
        for outer, inner in (*clusters.items(), *clusters.items()):
            both = weights.tables(outer, permutations)
            for name, table in both.items():
                table *= _DECIDES / max(float(np.abs(table).max()), 1e-300)
                if name in shown[outer]:
                    table += shown[outer][name]
            permutations |= matched(outer, inner, shown[outer] | both, outer in permutations)
        before = self._mean(tables, counts, self._groups.identity())
        return permutations, before, self._mean(tables, counts, permutations)

    def _mean(
        self, tables: Mapping[str, np.ndarray], counts: Mapping[str, int], chosen: Permutations
    ) -> float:
        """The mean correlation of units that are matched."""
        total = units = 0.0
        for name, table in tables.items():
            group, index = self._by_name[name], chosen[name]
            if group.within is not None:
                outer = chosen.get(group.within, np.arange(group.copies))
                index = (outer[:, None] * group.size + index).reshape(-1)
            total += float(table[np.arange(len(index)), index].sum())
            units += len(index) * counts[name]
        return total / max(units, 1.0)


def _extent(layout: Layout) -> int:
    """The size of an axis where there is one sample."""
    if layout.kind == "leaf":
        return layout.size or 1
    sizes = [_extent(part) for part in layout.parts]
    return math.prod(sizes) if layout.kind == "product" else sum(sizes)


def _by_pairs(table: np.ndarray, group: Group) -> np.ndarray:
    """A table of units within others, [n · m, n · m], by pairs of those: [n, n, m, m]."""
    if group.within is None:
        return table
    sizes = (group.copies, group.size)
    return table.reshape(*sizes, *sizes).transpose(0, 2, 1, 3)


def _units_last(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Values [samples, units], of units along some axes together."""
    moved = x.movedim(list(axes), list(range(-len(axes), 0)))
    return moved.flatten(-len(axes)).flatten(0, -2)
