"""Proof by trial that permutations leave a network's function as it is, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeconn.capture.noise import seeded
from modeconn.capture.opaque import tensors_of
from modeconn.capture.trial import Runner, loaded, output_of, saved_tensors
from modeconn.data.inputs import Inputs, leaves, moved_like, take
from modeconn.errors import ModeconnError
from modeconn.parameters.comparison import tied
from modeconn.training.alignment.groups import Groups
from modeconn.training.alignment.layouts import Permutations

# Of the largest output: sums in another order differ by some 1e-15 of it.
TOLERANCE = 1e-10
# Of a network that computes in float32 whatever its weights are, as norms of language models do: so
# many times the rounding, and the most, above which nothing would be proved.
_ROUNDINGS, _MOST = 100, 1e-3
# Rows of a sample that are run, and the share of its own size that each weight is moved by, so that
# weights that are zero or equal, as after initialising, prove something.
_ROWS, _JITTER = 8, 0.1


def difference(
    runner: Runner,
    state: Mapping[str, Tensor],
    groups: Groups,
    permutations: Permutations,
    inputs: Inputs,
) -> float:
    """Return the largest difference that permutations make to a network's outputs in eval mode.

    Args:
        runner: of the architecture, in float64.
        state: of the network.
        groups: of the architecture.
        permutations: of some of its groups.
        inputs: to run it on.

    Returns:
        The difference as a share of the largest output.
    """
    outputs = []
    for each in (state, groups.permuted(state, permutations)):
        found = exact_outputs(runner, each, inputs)
        outputs.append([t for t in found if t.is_floating_point()])
    return apart(*outputs)


class _Coarsest(TorchDispatchMode):
    """Notes the largest rounding of the numbers that are computed."""

    rounding = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 1:
                self.rounding = max(self.rounding, torch.finfo(tensor.dtype).eps)
        return made


def tolerance_of(runner: Runner, state: Mapping[str, Tensor], inputs: Inputs) -> float:
    """Return the largest difference of outputs that is rounding: 1e-10 for all of float64.

    Args:
        runner: of the architecture, in float64.
        state: of the network.
        inputs: to run it on.
    """
    seen = _Coarsest()
    with seen:
        exact_outputs(runner, state, inputs)
    coarse = seen.rounding > torch.finfo(torch.float64).eps
    return min(_ROUNDINGS * seen.rounding, _MOST) if coarse else TOLERANCE


def exact_outputs(runner: Runner, state: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """Return the tensors that a network gives in float64.

    Args:
        runner: of the architecture, in float64.
        state: of the network, in any dtype.
        inputs: to run it on.
    """
    exact = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    x = moved_like(inputs, exact)
    runner.expect(x)
    with torch.no_grad(), seeded(0, leaves(x)[0].device):
        found = output_of(loaded(runner.copy(), exact), x)
    return tensors_of(found)


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of two networks' outputs, as a share of the first's largest.

    It is NaN where one is: Python's `max` would pass over that.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel()]
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    between = torch.tensor([0.0, *((a - b).abs().max() for a, b in pairs)], dtype=torch.float64)
    return float(between.max()) / max(largest, torch.finfo(torch.float64).tiny)


def proved(runner: Runner, groups: Groups, inputs: Inputs) -> Groups:
    """Return the groups that random permutations of are seen to change nothing; others are frozen.

    Args:
        runner: of the network, in float64.
        groups: to be tried, all together; one by one where that changes the function.
        inputs: a sample.
    """
    if not groups:
        return groups
    x = take(inputs, 0, _ROWS)
    state = _jittered(runner)
    tolerance = tolerance_of(runner, state, x)
    if difference(runner, state, groups, groups.random(0), x) <= tolerance:
        return groups
    for outer, inner in groups.clusters().items():
        names = {outer, *(group.name for group in inner)}
        some = {k: p for k, p in groups.random(1).items() if k in names}
        change = difference(runner, state, groups, some, x)
        if not change <= tolerance:
            reason = f"a random permutation changed the outputs by {change:.1g} of the largest"
            groups = groups.without(frozenset(names), reason)
    if groups and not difference(runner, state, groups, groups.random(2), x) <= tolerance:
        raise ModeconnError(
            f"the model {type(runner.model).__name__} is another function when its units are "
            "permuted: expected one whose outputs depend on its weights and inputs alone"
        )
    return groups


def _jittered(runner: Runner) -> dict[str, Tensor]:
    """The network's state, with each parameter moved at random; tied ones stay tied."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name for name, _ in runner.model.named_parameters(remove_duplicate=False)}
    found = {name: value.detach() for name, value in saved_tensors(runner.model).items()}
    first = {other: one for one, other in tied(found)}
    for name, value in found.items():
        if name in first:
            found[name] = found[first[name]]
        elif name in parameters and value.is_floating_point() and value.numel():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            size = max(float(value.abs().mean()), _JITTER)
            found[name] = value.double() + _JITTER * size * noise.to(value.device)
    return found
