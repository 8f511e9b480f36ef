"""Whether two networks are one function: their outputs, beside the rounding that is expected.

A network that was permuted, folded, converted or saved and loaded should give what it gave before,
up to rounding. How much rounding that may be is measured, not guessed: how far either network is
from itself in float64, and how far its outputs move where every weight is off by up to half a unit
in the last place, as after any arithmetic on weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.capture.noise import seeded
from modeconn.capture.opaque import tensors_of
from modeconn.capture.trial import Runner, loaded, output_of
from modeconn.data.batches import as_batches
from modeconn.data.inputs import Inputs, leaves, moved
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.parameters import state as states
from modeconn.parameters.fitting import load_for

_BATCH = 128
# Both errors are maxima over some samples, of one draw of the weights' last places: other samples
# and draws give some times as much. What is another function is off by far more.
_FACTOR = 4.0
# Rounding errors of the largest value at a place, where both networks happen to make none.
_FLOOR = 16.0


@dataclass(frozen=True)
class Sameness:
    """Holds what `same_function` found.

    Attributes:
        same: whether all outputs are within what rounding explains.
        difference: the largest difference of the two networks' outputs, at the place of an output
            where it is largest beside the rounding expected there; inf where only one of them is
            NaN or infinite.
        rounding: what is expected there.
        output: the largest value of the outputs there, in magnitude, to compare with.
        place: of the number in an output: its index without the sample, behind the number of the
            tensor where a network returns several.
        row: the first sample with that difference.
        samples: that were run.
    """

    same: bool
    difference: float
    rounding: float
    output: float
    place: tuple[int, ...]
    row: int
    samples: int

    def __str__(self) -> str:
        verdict = "the same function" if self.same else "not the same function"
        return (
            f"{verdict}: outputs of {self.samples:,} samples differ by {self.difference:.2g} at "
            f"most, where rounding explains {self.rounding:.2g} (output {list(self.place)}, of up "
            f"to {self.output:.3g}, sample {self.row:,})"
        )


@without_autocast
def same_function(
    a: nn.Module,
    b: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    data: Any,
    *,
    batch_size: int | None = None,
) -> Sameness:
    """Compare the outputs of two networks, in eval mode, with what rounding explains.

    Args:
        a: a network; it is left as it was.
        b: another one, of any architecture that takes the same inputs and gives outputs of the same
            shape; or a state dict or checkpoint file for a.
        data: as for `evaluate`; targets are not used.
        batch_size: rows per batch, 128 by default.

    Returns:
        The largest difference beside the rounding expected; print it, or ask for `.same`. Numbers
        that are equal in both networks (masks, infinities) count as equal, and each place of the
        output is judged by its own size.

    Raises:
        ModeconnError: bad data, a network that does not run on them, weights that do not fit, or
            outputs of different shapes.
    """
    size = positive("batch_size", batch_size) or _BATCH
    first = Runner(a)
    pair = (_Network(first, first.state()), _other(first, b))
    found: list[_Place] = []
    samples = 0
    with torch.no_grad():
        for x, _ in as_batches(data, size):
            one, other = (network.outputs(x) for network in pair)
            _check_shapes(one.own, other.own)
            found = found or [_Place() for _ in one.own]
            for i, place in enumerate(found):
                place.add(one, other, i, samples)
            samples += len(leaves(x)[0])
    worst = [place.worst((i,) if len(found) > 1 else ()) for i, place in enumerate(found)]
    over, result = max(worst, key=lambda each: each[0])
    return replace(result, same=over <= 1.0, samples=samples)


@dataclass(frozen=True)
class _Outputs:
    """A network's outputs for a batch, as float64 tensors.

    Attributes:
        own: in the network's own dtype, as they are.
        exact: of its weights, computed in float64.
        jittered: the same with each weight off by up to half a unit in its last place.
    """

    own: list[Tensor]
    exact: list[Tensor]
    jittered: list[Tensor]

    def rounding(self, i: int) -> Tensor:
        """Return how far rounding moves each number of the i-th output."""
        own, exact, jittered = self.own[i], self.exact[i], self.jittered[i]
        return _apart(own, exact, odd=0.0) + _apart(jittered, exact, odd=0.0)


class _Network:
    """Copies of a network, to be run in its own dtype and in float64."""

    def __init__(self, runner: Runner, state: Mapping[str, Tensor]) -> None:
        floats = [value for value in state.values() if value.is_floating_point()]
        self._dtype = floats[0].dtype if floats else torch.float32
        self._device = next(iter(state.values())).device if state else torch.device("cpu")
        exact = Runner(runner.model, torch.float64)
        self._copies = [
            (runner, loaded(runner.copy(), state), self._dtype),
            (exact, loaded(exact.copy(), state), torch.float64),
            (exact, loaded(exact.copy(), _jittered(state)), torch.float64),
        ]

    def outputs(self, x: Inputs) -> _Outputs:
        """The outputs for a batch; what is drawn at random is the same for both networks."""
        return _Outputs(*(self._of(*copy, x) for copy in self._copies))

    def _of(self, runner: Runner, module: nn.Module, dtype: torch.dtype, x: Inputs) -> list[Tensor]:
        with seeded(0, self._device):
            output = output_of(module, moved(x, dtype, self._device))
        tensors = [tensor.double() for tensor in tensors_of(output)]
        if not tensors:
            raise ModeconnError(
                f"the model {type(runner.model).__name__} returns {type(output).__name__}: "
                "expected a tensor, or several"
            )
        return tensors


def _other(first: Runner, b: Any) -> _Network:
    """The second network: a module, or the first one with other weights."""
    if isinstance(b, nn.Module):
        return _Network(Runner(b), Runner(b).state())
    state = load_for(first.model, b)
    states.match([first.state(), state], ["the model", "b"], devices=False)
    return _Network(first, state)


def _jittered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float64, each off by up to half a unit in the last place of its own dtype."""
    generator = torch.Generator().manual_seed(0)
    jittered = {}
    for name, value in state.items():
        jittered[name] = value
        if value.is_floating_point():
            half = torch.finfo(value.dtype).eps / 2
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
            jittered[name] = value.double() * (1 + half * noise.to(value.device))
    return jittered


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_shapes(one: list[Tensor], other: list[Tensor]) -> None:
    of_a, of_b = (list(map(_shape, each)) for each in (one, other))
    if of_a != of_b:
        raise ModeconnError(
            f"b returns outputs of shape {of_b} and a {of_a}: expected the same shapes"
        )


def _apart(one: Tensor, other: Tensor, odd: float) -> Tensor:
    """The difference of each number; `odd` where just one is NaN, or infinite."""
    equal = (one == other) | (one.isnan() & other.isnan())
    apart = (one - other).abs()
    known = one.isfinite() & other.isfinite()
    return torch.where(equal, 0.0, torch.where(known, apart, odd))


class _Place:
    """The largest values over the samples, at each place of one of the outputs."""

    def __init__(self) -> None:
        self._maxima: Tensor | None = None  # of difference, rounding and output, [3, …]
        self._rows: Tensor | None = None  # the sample of the largest difference

    def add(self, one: _Outputs, other: _Outputs, i: int, before: int) -> None:
        """Takes a batch, `before` samples of which have been taken."""
        difference = _apart(one.own[i], other.own[i], odd=float("inf"))
        rounding = one.rounding(i) + other.rounding(i)
        size = torch.maximum(one.own[i].abs(), other.own[i].abs()).nan_to_num(0.0, 0.0, 0.0)
        if difference.dim() == 0:
            difference, rounding, size = (v[None] for v in (difference, rounding, size))
        largest, rows = difference.max(0)
        maxima = torch.stack([largest, rounding.amax(0), size.amax(0)])
        rows = rows + before
        if self._maxima is not None and self._rows is not None:
            rows = torch.where(maxima[0] > self._maxima[0], rows, self._rows)
            maxima = torch.maximum(maxima, self._maxima)
        self._maxima, self._rows = maxima, rows

    def worst(self, prefix: tuple[int, ...]) -> tuple[float, Sameness]:
        """The place where the difference exceeds rounding most, as a share of what is allowed."""
        assert self._maxima is not None and self._rows is not None
        difference, rounding, size = (each.flatten() for each in self._maxima)
        floor = _FLOOR * torch.finfo(torch.float64).eps * size
        over = difference / (_FACTOR * rounding + floor).clamp(min=torch.finfo(torch.float64).tiny)
        at = int(over.argmax())
        place = np.unravel_index(at, self._rows.shape) if self._rows.dim() else ()
        found = Sameness(
            same=False,
            difference=float(difference[at]),
            rounding=float(rounding[at]),
            output=float(size[at]),
            place=(*prefix, *map(int, place)),
            row=int(self._rows.flatten()[at]),
            samples=0,
        )
        return float(over[at]), found
