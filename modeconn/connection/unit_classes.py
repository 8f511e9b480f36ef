"""Classes of units with equal functions, and whether a segment keeps the sums of what they pass on.

Units of equal functions are taken together as a class. Going up, two units are of one class where
their incoming rows, summed over the classes below, and their biases and norms are equal at both
ends of a segment, hence throughout: then their values are equal at every t. Going down, a class is
live where a live class above reads it; the function is constant where no live class changes.

Sums are compared exactly, not as float64 rounds them: 2^60 - 2^60 + 1 and 2^60 - 2^60 - 1 can round
alike, and a swap of the two changes the function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.connection.layer_chain import AffineLayer, LayerChain
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]


def moved_class(
    chain: LayerChain, start: State, stop: State
) -> tuple[AffineLayer, Tensor, list[Tensor]] | list[Tensor]:
    """Finds the live units whose class changes the function.

    Returns:
        the layer, its units that do, and the classes; the classes alone, int64 [n_p] for p = 0 …
        L, where the function is constant.

    Raises:
        ModeconnError: weights of a class are too large to be added.
    """
    groups = [torch.arange(chain.widths[0])]  # class of each unit, layer by layer from the input
    for layer in chain.layers[:-1]:
        groups.append(_equal_rows(torch.cat(_ends(layer, start, stop, groups[-1]), 1)))
    groups.append(torch.arange(chain.layers[-1].units))  # each output is a class of its own
    live = torch.ones(chain.layers[-1].units, dtype=torch.bool)
    for layer, below, own in zip(
        reversed(chain.layers), reversed(groups[:-1]), reversed(groups[1:])
    ):
        members = _first_members(own)[live]
        before, after = _ends(layer, start, stop, below, members)
        bad = (before != after).any(1)
        if bool(bad.any()):
            return layer, members[bad], groups
        classes = int(below.max()) + 1
        columns = before[:, : classes * _block(layer, start)]
        live = (columns.unflatten(1, (classes, -1)) != 0).any(2).any(0)
    return groups


def _block(layer: AffineLayer, state: State) -> int:
    return layer.by_unit(state[layer.weight]).shape[2]


def _ends(
    layer: AffineLayer, start: State, stop: State, below: Tensor, units: Tensor | None = None
) -> list[Tensor]:
    """Computes incoming rows of units at both ends: sums over the classes below, bias and norm.

    Returns:
        float64 [units, n] twice: sums as float64 rounds them, bias and norm, then what rounding
        left over, so that equal rows have equal exact sums.
    """
    chosen = torch.arange(layer.units) if units is None else units
    rows, rests = [], []
    for state in (start, stop):
        total, rest = _sums(layer.by_unit(state[layer.weight].cpu()[chosen]).double(), below)
        extras = [
            state[key].cpu()[chosen].double()[:, None]
            for key in layer.incoming()
            if key != layer.weight
        ]
        rows.append(torch.cat([total.flatten(1), *extras], 1))
        rests.append(rest)
    terms = max(rest.shape[-1] for rest in rests)
    padded = [F.pad(rest, (0, terms - rest.shape[-1])).flatten(1) for rest in rests]
    return [torch.cat(pair, 1) for pair in zip(rows, padded)]


def _sums(parts: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the weights of each class, exactly.

    Args:
        parts: float64 [units, units below, block]. below: the class of each unit below.

    Returns:
        the rounded sums [units, classes, block], and what is left, [units, classes, block, terms]:
        a sum is equal to its rounded value plus its terms, which are a function of it alone.
    """
    sizes = torch.bincount(below, minlength=int(below.max()) + 1)
    total = parts.new_zeros(len(parts), len(sizes), parts.shape[2])
    alone = sizes[below] == 1
    total[:, below[alone]] = parts[:, alone]
    rests: dict[tuple[int, int, int], list[float]] = {}
    for group in (sizes > 1).nonzero().flatten().tolist():
        own = parts[:, below == group]
        total[:, group] = own.sum(1)  # exact where no more than one of them is not zero
        for unit, column in ((own != 0).sum(1) > 1).nonzero().tolist():
            first, *rest = _expansion(own[unit, :, column].tolist())
            total[unit, group, column] = first
            if rest:
                rests[unit, group, column] = rest
    terms = max(map(len, rests.values()), default=0)
    left = total.new_zeros(*total.shape, terms)
    for place, rest in rests.items():
        left[place][: len(rest)] = torch.tensor(rest, dtype=torch.float64)
    return total, left


def _expansion(values: list[float]) -> list[float]:
    """Returns an exact sum as numbers: its rounded value, that of what is left, and so on."""
    terms: list[float] = []
    try:
        while not terms or terms[-1] != 0.0:
            terms.append(math.fsum([*values, *(-term for term in terms)]))
    except (OverflowError, ValueError) as error:
        raise ModeconnError(
            "weights of units of equal functions are too large to be added: "
            f"the largest is {max(map(abs, values)):.3g}"
        ) from error
    return terms[:-1] or [0.0]


def _equal_rows(rows: Tensor) -> Tensor:
    """Returns the class of each row, int64 [n], numbered by first appearance.

    Rows with equal numbers are of one class.
    """
    seen: dict[bytes, int] = {}
    array = (rows + 0.0).numpy()  # -0.0 becomes 0.0, as they are equal numbers
    return torch.tensor([seen.setdefault(row.tobytes(), len(seen)) for row in array])


def _first_members(groups: Tensor) -> Tensor:
    """Returns the first unit of each class, in the order of the classes."""
    first = torch.full((int(groups.max()) + 1,), len(groups))
    return first.scatter_reduce_(0, groups, torch.arange(len(groups)), "amin")
