"""Bounds how far rounding can move the outputs of a chain along a path.

Every step makes an error of its own (local_rounding.py). To first order in the unit roundoff u the
outputs z move by the sum of these, each times its derivative:

    |δz| ≤ Σ_p |∂z/∂pre_p| γ (|W_p| |h_{p-1}| + |b_p|).

Derivatives cost a backward pass per output. So in the lowest layers, as many as a budget says, the
error is followed upward in the Euclidean norm, by the layers' Lipschitz constants, and |∂z/∂h| |δh|
is added: a coarser bound. Where a value is within its own rounding error of a kink, the largest
slope of the activation is taken.

Rewrites change dead units alone, so the breakpoints that they join have one bound. Between the ends
of a swing the bound is convex in t. On a shift the derivatives are polynomials in t: their values
at Chebyshev points, times the Lebesgue constant, bound them (Trefethen 2019, theorem 15.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modeconn.connection import lipschitz
from modeconn.connection.activation_bounds import bounds_of
from modeconn.connection.layer_chain import ACTIVATIONS, LayerChain
from modeconn.connection.local_rounding import UNIT_ROUNDOFF, LiveNetwork
from modeconn.connection.segment_kinds import REWRITE, SHIFT, Evidence
from modeconn.parameters.blending import blend

State = Mapping[str, Tensor]

# Derivatives and sizes are computed themselves: their own rounding, and γ_n against n u.
_MARGIN = 1.01
# Values of the lowest layers of one batch, by what they depend on, and their errors' norms.
Lowest = dict[tuple[object, ...], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sensitivity:
    """A bound on the outputs' errors, to first order in the unit roundoff u.

    Attributes:
        roundoffs: [N, C] in the weights' dtype: the error is at most u times this.
    """

    roundoffs: Tensor

    def errors(self, dtype: torch.dtype) -> Tensor:
        """Returns the bound for evaluations in a dtype, float64 [N, C]."""
        return self.roundoffs.double() * (_MARGIN * UNIT_ROUNDOFF[dtype])


class PathRounding(Protocol):
    """Bounds what rounding does to the outputs at the breakpoints of a path, and between them."""

    def of_rows(self, x: Tensor) -> Sequence[Sensitivity]:
        """Returns a bound for each breakpoint; those of its ends bound a segment.

        Args:
            x: inputs [N, …] in the weights' dtype.
        """


class ChainRounding:
    """The bounds of a path of chains.

    Args:
        points: the breakpoints. evidence: of the segments.
        rows: how many there will be, for the budget. budget: multiply-adds for derivatives.
    """

    def __init__(
        self,
        chain: LayerChain,
        points: Sequence[State],
        evidence: Sequence[Evidence],
        rows: int,
        budget: float,
    ) -> None:
        self._chain, self._inputs = chain, points[0]
        self._groups = groups_of(evidence)
        firsts = [self._groups.index(g) for g in range(self._groups[-1] + 1)]
        factors: dict[tuple[object, ...], float] = {}
        self._networks = [LiveNetwork(chain, points[k], points[k], factors) for k in firsts]
        self._shifts = {
            k: _between(chain, points[k], points[k + 1], max(1, len(found.moved)))
            for k, found in enumerate(evidence)
            if found.kind == SHIFT
        }
        self.lowest = self._affordable(budget / max(1, rows))

    def _affordable(self, budget: float) -> int:
        """Returns how many of the lowest layers go without derivatives."""
        networks = [*self._networks, *itertools.chain.from_iterable(self._shifts.values())]
        costs = torch.tensor([network.multiply_adds() for network in networks]).sum(0)
        costs *= self._chain.classes
        above = costs.flip(0).cumsum(0).flip(0)  # of layers p … L
        return int((above[1:] > budget).sum())

    def of_rows(self, x: Tensor) -> Sequence[Sensitivity]:
        """Returns the bound of each breakpoint, that of a shift at both of its ends."""
        lowest: Lowest = {}
        of_group = [self._roundoffs(network, x, lowest) for network in self._networks]
        for k, nodes in self._shifts.items():
            # Each |∂z/∂pre| is at most this many times the largest of its values at the points, and
            # the largest at most their sum.
            factor = 1 + 2 / math.pi * math.log(len(nodes))
            between = factor * torch.stack([self._roundoffs(n, x, lowest) for n in nodes]).sum(0)
            for group in self._groups[k : k + 2]:
                of_group[group] = torch.maximum(of_group[group], between)
        # What overflows is not bounded.
        finite = [each.nan_to_num(nan=torch.inf, posinf=torch.inf) for each in of_group]
        return [Sensitivity(finite[group]) for group in self._groups]

    def _roundoffs(self, network: LiveNetwork, x: Tensor, lowest: Lowest) -> Tensor:
        """Returns Σ |∂z/∂value| · (size of its error) [N, C]."""
        h, length = self._below(network, x, lowest)
        last = self._chain.layers[-1]
        if self.lowest == self._chain.length - 1 and last.kind == "linear":
            # Nothing is left to differentiate: the slopes are the last weights.
            slopes = network.state[last.weight].double().norm(dim=1)
            found: Tensor = length[:, None] * slopes + network.of_product(last, h)
            return found
        taps: list[tuple[Tensor, Tensor]] = []

        def tell(value: Tensor, error: Tensor | None, factor: float) -> None:
            if error is not None:
                taps.append((value, error))

        with torch.enable_grad():
            z = h = h.detach().requires_grad_()
            for layer in self._chain.layers[self.lowest :]:
                z = network.layer(layer, z, tell)
            values = [h, *(value for value, _ in taps)]
            columns = []
            for c in range(z.shape[1]):
                slopes = torch.autograd.grad(z[:, c].sum(), values, retain_graph=c < z.shape[1] - 1)
                total = (lipschitz.lengths(slopes[0]) * length).to(z.dtype)
                for slope, (_, size) in zip(slopes[1:], taps):
                    total += slope.abs_().mul_(size).flatten(1).sum(1)
                columns.append(total)
        return torch.stack(columns, 1)

    @torch.no_grad()
    def _below(self, network: LiveNetwork, x: Tensor, lowest: Lowest) -> tuple[Tensor, Tensor]:
        """Returns the values behind the lowest layers, and the norm of their errors [N]."""
        if () not in lowest:
            error = self._chain.fixed.error(x, self._inputs) if self._chain.fixed.moves else x * 0
            lowest[()] = self._chain.input(x, self._inputs), lipschitz.lengths(error).double()
        h, length = lowest[()]

        def tell(value: Tensor, error: Tensor | None, factor: float) -> None:
            nonlocal length
            length = length * factor
            if error is not None:
                length = length + lipschitz.lengths(error)

        for layer, key in zip(self._chain.layers[: self.lowest], network.keys[1:]):
            if key not in lowest:
                h = network.layer(layer, h, tell)
                lowest[key] = h, length
            h, length = lowest[key]
        return h, length


def chain_rounding(
    chain: LayerChain,
    points: Sequence[State],
    evidence: Sequence[Evidence],
    rows: int,
    budget: float,
) -> ChainRounding | None:
    """Returns the bounds of a path; None where the rounding of some activation is not known."""
    steps = itertools.chain.from_iterable(layer.steps for layer in chain.layers)
    if any(node.op in ACTIVATIONS and bounds_of(node) is None for node in steps):
        return None
    return ChainRounding(chain, points, evidence, rows, budget)


def _between(chain: LayerChain, start: State, stop: State, degree: int) -> list[LiveNetwork]:
    """Returns the networks at the Chebyshev points that fix polynomials of a degree."""
    sizes, networks = {}, []
    for key, value in start.items():
        moves = value.is_floating_point()
        sizes[key] = torch.maximum(value.abs(), stop[key].abs()) if moves else value
    for j in range(degree + 1):
        t = 0.5 - 0.5 * math.cos(math.pi * (2 * j + 1) / (2 * degree + 2))
        state = {
            key: blend([v, stop[key]], [1 - t, t]) if v.is_floating_point() else v
            for key, v in start.items()
        }
        networks.append(LiveNetwork(chain, state, sizes))
    return networks


def groups_of(evidence: Sequence[Evidence]) -> list[int]:
    """Numbers the breakpoints; those that rewrites join have one number."""
    groups = [0]
    for found in evidence:
        groups.append(groups[-1] + (found.kind != REWRITE))
    return groups
