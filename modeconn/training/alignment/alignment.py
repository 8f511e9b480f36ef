"""Alignment: one network's units permuted so that they match another's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.capture.trial import Runner
from modeconn.data.batches import first_rows
from modeconn.data.inputs import Inputs, moved_like, take
from modeconn.data.tensors import as_inputs
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.parameters import state as states
from modeconn.parameters.comparison import check_points
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import unwrapped
from modeconn.training.alignment import storage
from modeconn.training.alignment.activations import Correlations
from modeconn.training.alignment.assignment import solver
from modeconn.training.alignment.discovery import symmetries
from modeconn.training.alignment.groups import Groups
from modeconn.training.alignment.layouts import Permutations
from modeconn.training.alignment.proof import difference, tolerance_of
from modeconn.training.alignment.weights import WeightMatching

METHODS = ("auto", "activations", "weights")
# Rows of a batch, of which two networks' values are held at once.
_BATCH = 250
ALONE = (
    "matched by weights alone, which seldom brings deep networks close: give data to match what "
    "units do"
)


@dataclass(frozen=True)
class Alignment:
    """Permutations of a network's units, as `align` finds them.

    Attributes:
        method: "activations" or "weights"; "" for permutations from elsewhere.
        permutations: by group, index [size], or [outer units, size] within another group: unit i of
            the permuted network is unit index[i] of the given one.
        groups: that are permuted; print them.
        objective_before, objective_after: what was raised, in [-1, 1]: the mean correlation of
            matched units, or the cosine between both networks' weights.
        samples: that units were compared on; 0 with weights alone.
        note: what to know of the result; "" for nothing.
    """

    method: str
    permutations: Permutations = field(repr=False)
    groups: Groups = field(repr=False)
    objective_before: float = float("nan")
    objective_after: float = float("nan")
    samples: int = 0
    note: str = ""

    def apply(self, state: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]) -> State:
        """Return a network with its units permuted, as a state dict.

        Args:
            state: the network: a module, state dict or file. It is left as it was; tensors that do
                not move are its own.

        Raises:
            ModeconnError: a tensor has another shape than the permutations are for, or is missing.
        """
        given = states.load(state)
        for name, axes in self.groups.layouts.items():
            expected = [axis.size for axis in axes]
            found = list(given[name].shape) if name in given else None
            if found != expected:
                raise ModeconnError(
                    f"state: '{name}' is {found or 'missing'}: expected {expected}, for which the "
                    "permutations are"
                )
        return self.groups.permuted(given, self.permutations)

    def inverse(self) -> Alignment:
        """Return the alignment that undoes this one."""
        found: Permutations = {}
        for group in self.groups:
            index = self.permutations[group.name]
            if group.within is None:
                found[group.name] = np.argsort(index)
                continue
            outer = self.permutations.get(group.within, np.arange(group.copies))
            found[group.name] = np.argsort(index, axis=1)[np.argsort(outer)]
        return replace(self, permutations=found)

    def check(self, model: nn.Module, x: Any) -> float:
        """Return the largest difference that the permutations make to a network's outputs.

        Args:
            model: the network, in its own weights; it runs in eval mode, in float64.
            x: inputs [N, …].

        Returns:
            The difference as a share of the largest output: rounding, some 1e-15.
        """
        inputs = as_inputs(x, "x")
        runner = Runner(model, torch.float64)
        state = states.load(unwrapped(model))
        return difference(runner, state, self.groups, self.permutations, inputs)

    @property
    def digest(self) -> str:
        """A name for the permutations: equal for equal ones."""
        return storage.digest(self.permutations)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the permutations: JSON, or safetensors where the name ends in .safetensors.

        Raises:
            ModeconnError: the file cannot be written.
        """
        about = {
            "method": self.method,
            "objective": [self.objective_before, self.objective_after],
            "samples": self.samples,
            "note": self.note,
        }
        storage.save(file, self.groups, self.permutations, about)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> Alignment:
        """Read permutations, and check that they are some.

        Raises:
            ModeconnError: the file is none of these, or holds what is no permutation: of another
                size, or with an index twice.
        """
        groups, permutations, about = storage.load(file)
        before, after = about.get("objective", [float("nan")] * 2)
        return Alignment(
            str(about.get("method", "")),
            permutations,
            groups,
            float("nan") if before is None else float(before),
            float("nan") if after is None else float(after),
            int(about.get("samples", 0)),
            str(about.get("note", "")),
        )

    def __str__(self) -> str:
        moved = sum(int((p != np.arange(p.shape[-1])).sum()) for p in self.permutations.values())
        units = sum(p.size for p in self.permutations.values())
        kind = "mean correlation of matched units" if self.samples else "cosine of the weights"
        text = (
            f"aligned by {self.method}: {moved:,} of {units:,} units in {len(self.groups)} groups "
            f"moved; {kind} {self.objective_before:.3f} → {self.objective_after:.3f}"
        )
        text += f" on {self.samples:,} samples" if self.samples else ""
        return text + (f"\nnote: {self.note}" if self.note else "")


@without_autocast
def align(
    model: nn.Module,
    a: Any,
    b: Any,
    data: Any = None,
    *,
    method: str = "auto",
    samples: int = 10_000,
    groups: Groups | None = None,
    seed: int = 0,
    sample: Any = None,
    batch_size: int | None = None,
) -> Alignment:
    """Find the permutation of b's units that matches them with a's.

    Units that do the same on data are matched, by the correlation of what they give behind the
    nonlinearity (Ainsworth et al. 2023, section 3.1); `alignment.apply(b)` is the same function as
    b, in a's basin as far as permutations lead there. A network is permuted only after random
    permutations of its groups left it the same function, in float64.

    Args:
        model: the architecture: any module; it is left as it was.
        a, b: modules, state dicts or checkpoint files that fit the model.
        data: as for `evaluate`; targets are not used.
        method: "activations" with data, "weights" without; by default what data allow. Weights
            alone seldom suffice for deep networks.
        samples: the most rows of the data to compare units on, from its first.
        groups: of `symmetries`, where they are known.
        seed: of the order in which weights are matched.
        sample: a few rows of input where there are no data, [N, …].
        batch_size: rows at a time, 250 by default.

    Returns:
        The permutations; print them.

    Raises:
        ModeconnError: states that do not match; "activations" without data; neither data, sample
            nor groups to capture the network with; no units that can be permuted (the operations in
            the way are named); SciPy is not installed.
    """
    if method not in METHODS:
        raise ModeconnError(f"method is {method!r}: expected one of {', '.join(METHODS)}")
    if method == "activations" and data is None:
        raise ModeconnError(
            'method is "activations" and data is None: expected data to compare units on'
        )
    most, size = positive("samples", samples) or 1, positive("batch_size", batch_size) or _BATCH
    solver()  # before long work
    pair = _matching(model, a, b)
    first = _first_rows(data, sample, groups, size)
    found = symmetries(model, first) if groups is None else groups
    found.check_some(type(unwrapped(model)).__name__)
    if data is None or method == "weights":
        search = WeightMatching(found, *pair)
        permutations = search.search(seed)
        before, after = search.similarity(found.identity()), search.similarity(permutations)
        result = Alignment("weights", permutations, found, before, after, 0, ALONE)
    else:
        if found.graph is None:
            found = symmetries(model, first)
        result = _by_activations(pair, found, first_rows(data, most, size))
    if first is not None:
        _check_same(model, result, pair[1], first)
    return result


def _matching(model: nn.Module, a: Any, b: Any) -> tuple[State, State]:
    """Load both networks and compare them with the model.

    Raises:
        ModeconnError: they do not match.
    """
    own = states.load(unwrapped(model))
    found = states.load(a), states.load(b)
    states.match([own, *found], ["the model", "a", "b"], devices=False, dtypes=False)
    states.match(found, ["a", "b"])
    check_points(found, ["a", "b"], directions=False)
    return found


def _first_rows(data: Any, sample: Any, groups: Groups | None, size: int) -> Inputs | None:
    """A few rows to capture the network with, and to run it on."""
    if sample is not None:
        return as_inputs(sample, "sample")
    if data is None:
        if groups is None:
            raise ModeconnError(
                "data, sample and groups are None: expected a few rows of input as sample, to see "
                "what the model computes"
            )
        return None
    return next(first_rows(data, size, size))


def _by_activations(
    pair: tuple[State, State], groups: Groups, batches: Iterable[Inputs]
) -> Alignment:
    """Match units by their correlations over the data, in one pass for all of them."""
    correlations = Correlations(groups, *pair)
    with torch.no_grad():
        for x in batches:
            correlations.add(moved_like(x, pair[0]))
    permutations, before, after = correlations.matched(WeightMatching(groups, *pair))
    return Alignment("activations", permutations, groups, before, after, correlations.samples)


def _check_same(model: nn.Module, found: Alignment, b: State, x: Inputs) -> None:
    """Raise a ModeconnError unless b is the same function with its units permuted."""
    runner = Runner(model, torch.float64)
    few = take(x, 0, 8)
    tolerance = tolerance_of(runner, b, few)
    change = difference(runner, b, found.groups, found.permutations, few)
    if not change <= tolerance:
        raise ModeconnError(
            f"b is another function with its units permuted: outputs differ by {change:.1g} of the "
            f"largest, expected at most {tolerance:g}; are groups those of this model?"
        )
