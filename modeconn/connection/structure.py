"""What a linear segment of a path does to the network's function, derived from the weights at its two ends alone.

Everything here is linear in t on the segment, so what holds at both ends (a weight is zero, two
rows are equal, a row is what it was) holds throughout. Theory: Nguyen et al. 2021, the moves of
their path; see docs on certificates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.connection.chain import Chain, Layer
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

REWRITE, SWING, SHIFT = "rewrite", "swing", "shift"
KINDS = (REWRITE, SWING, SHIFT)
_LISTED = 6


@dataclass(frozen=True)
class Evidence:
    """What a segment was found to be.

    Attributes:
        kind: "rewrite" (only dead units changed: the function is constant), "shift" (units with
            equal functions traded outgoing weights: the function is constant) or "swing" (only the
            output layer moved: the logits are affine in t).
        moved: keys of the entries that differ between the ends; integer entries are not on the path
            and do not count.
        text: the evidence, in words.
    """

    kind: str
    moved: tuple[str, ...]
    text: str

    def supports(self, claimed: str) -> bool:
        """Whether the weights bear out a claimed kind: what is constant by dead units alone is so by classes, too."""
        return (
            claimed == self.kind
            or (claimed in KINDS and not self.moved)
            or (claimed == SHIFT and self.kind == REWRITE)
        )


def structure(chain: Chain, start: State, stop: State) -> Evidence:
    """What the segment from one state to another does, from the weights alone.

    Args:
        chain: the network.
        start, stop: states of equal keys and shapes.

    Raises:
        ModeconnError: the segment is none of the three kinds: the text names the layer and the live
            units that moved. Or a weight is not finite, or a variance negative.
    """
    moved = _moved(chain, start, stop)
    for state in (start, stop):
        _check_values(chain, state)
    stray = [key for key in moved if key in chain.others]
    if stray:
        raise ModeconnError(f"{stray[0]} changes, and is no entry of a layer")
    if not moved:
        return Evidence(REWRITE, (), "nothing moves")
    top = chain.layers[-1]
    if set(moved) <= set(top.incoming()):
        return Evidence(
            SWING,
            moved,
            f"only the output layer moves ({', '.join(moved)}): the logits are affine in t",
        )
    if _live_change(chain, start, stop, moved) is None:
        return Evidence(
            REWRITE, moved, f"only dead units move: {_moved_units(chain, start, stop, moved)}"
        )
    problem = _class_change(chain, start, stop)
    if problem is None:
        return Evidence(
            SHIFT,
            moved,
            f"units of equal functions trade weights: {_moved_units(chain, start, stop, moved)}",
        )
    raise ModeconnError(
        f"it is no swing, for more than the output layer moves, and the function is not constant: {problem}"
    )


# ------------------------------------------------------------------------------------------- single
# units


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)
    )


def _moved(chain: Chain, start: State, stop: State) -> tuple[str, ...]:
    """Keys of the floating point entries that differ, layer by layer; a path does not move the others."""
    keys = [*(key for layer in chain.layers for key in layer.incoming()), *chain.others]
    return tuple(
        key for key in keys if start[key].is_floating_point() and not _same(start[key], stop[key])
    )


def _check_values(chain: Chain, state: State) -> None:
    """Raise where a unit's value is no number, which even a weight of zero would pass on."""
    for key, value in state.items():
        if (
            value.is_floating_point()
            and value.numel()
            and not all(map(torch.isfinite, value.aminmax()))
        ):
            raise ModeconnError(f"{key} is not finite")
    for norm in (layer.norm for layer in chain.layers):
        if (
            norm is not None
            and norm.var is not None
            and float(state[norm.var].min()) + norm.eps <= 0
        ):
            raise ModeconnError(
                f"{norm.var} holds {float(state[norm.var].min()):.4g}: a variance cannot be negative"
            )


def _changed_units(layer: Layer, start: State, stop: State, moved: tuple[str, ...]) -> Tensor:
    """bool [n_p]: units of which an incoming entry differs."""
    changed = torch.zeros(layer.units, dtype=torch.bool, device=start[layer.weight].device)
    for key in layer.incoming():
        if key in moved:
            changed |= (
                (start[key] != stop[key]).flatten(1).any(1)
                if start[key].dim() > 1
                else start[key] != stop[key]
            )
    return changed


def _live_change(chain: Chain, start: State, stop: State, moved: tuple[str, ...]) -> str | None:
    """What is wrong with "only dead units change": the highest layer with live units that do. None where it holds."""
    live = torch.ones(
        chain.layers[-1].units, dtype=torch.bool, device=start[chain.layers[-1].weight].device
    )
    for layer in reversed(chain.layers):
        bad = _changed_units(layer, start, stop, moved) & live
        if bool(bad.any()):
            return _told(layer, bad.nonzero().flatten())
        # The rows of live units are the same at both ends, so one end tells which columns are zero.
        rows = live.nonzero().flatten()
        live = (layer.by_unit(start[layer.weight][rows]) != 0).flatten(2).any(2).any(0)
    return None


def _told(layer: Layer, units: Tensor) -> str:
    listed = ", ".join(map(str, units[:_LISTED].tolist())) + (", …" if len(units) > _LISTED else "")
    what = "live unit moves" if len(units) == 1 else "live units move"
    return f"layer {layer.index} ({layer.weight}): {len(units):,} {what}: {listed}"


def _moved_units(chain: Chain, start: State, stop: State, moved: tuple[str, ...]) -> str:
    counts = [
        (layer.index, int(_changed_units(layer, start, stop, moved).sum()))
        for layer in chain.layers
    ]
    parts = [f"{count:,} of layer {index}" for index, count in counts if count]
    return ", ".join(parts) if parts else "none"


# ---------------------------------------------------------------------------------- classes of
# equal units


def _class_change(chain: Chain, start: State, stop: State) -> str | None:
    """What is wrong with "the function is constant", with units of equal functions taken together. None where it holds.

    Going up, two units are of one class where their incoming rows, added up over the classes below,
    and their other entries are equal at both ends, hence throughout: then their values are equal at
    every t. Going down, a class is live where a live class above reads it; the function is constant
    where no live class changes.
    """
    groups = [torch.arange(chain.widths[0])]  # class of each unit, layer by layer from the input
    for layer in chain.layers[:-1]:
        ends = [_rows(layer, state, groups[-1]) for state in (start, stop)]
        groups.append(_equal_rows(torch.cat(ends, 1)))
    groups.append(torch.arange(chain.layers[-1].units))  # outputs are what is looked at, one by one
    live = torch.ones(chain.layers[-1].units, dtype=torch.bool)
    for layer, below, own in zip(
        reversed(chain.layers), reversed(groups[:-1]), reversed(groups[1:])
    ):
        members = _first_members(own)[live]
        before, after = (_rows(layer, state, below, members) for state in (start, stop))
        bad = (before != after).any(1)
        if bool(bad.any()):
            return _told(layer, members[bad])
        classes = int(below.max()) + 1
        columns = before[:, : before.shape[1] - _extras(layer)]
        live = (columns.unflatten(1, (classes, -1)) != 0).any(2).any(0)
    return None


def _rows(layer: Layer, state: State, below: Tensor, units: Tensor | None = None) -> Tensor:
    """Incoming rows of units, added up over the classes below, then bias and norm entries.

    Returns:
        float64 [units, classes · block + extras].
    """
    weight = state[layer.weight].cpu()
    chosen = torch.arange(layer.units) if units is None else units
    parts = layer.by_unit(weight[chosen]).double()  # [units, units below, block]
    classes = int(below.max()) + 1
    total = torch.zeros(len(chosen), classes, parts.shape[2], dtype=torch.float64)
    sizes = torch.bincount(below, minlength=classes)
    alone = sizes[below] == 1
    total[:, below[alone]] = parts[:, alone]
    for group in (sizes > 1).nonzero().flatten().tolist():
        # In order of size, so that the same numbers in other places have the same sum, bit for bit.
        total[:, group] = parts[:, below == group].sort(1).values.sum(1)
    extras = [
        state[key].cpu()[chosen].double()[:, None]
        for key in layer.incoming()
        if key != layer.weight
    ]
    return torch.cat([total.flatten(1), *extras], 1)


def _extras(layer: Layer) -> int:
    return len(layer.incoming()) - 1


def _equal_rows(rows: Tensor) -> Tensor:
    """The class of each row, int64 [n], numbered by first appearance: rows with equal numbers are of one class."""
    seen: dict[bytes, int] = {}
    array = (rows + 0.0).numpy()  # -0.0 becomes 0.0, as they are equal numbers
    return torch.tensor([seen.setdefault(row.tobytes(), len(seen)) for row in array])


def _first_members(groups: Tensor) -> Tensor:
    """The first unit of each class, in the order of the classes."""
    first = torch.full((int(groups.max()) + 1,), len(groups))
    return first.scatter_reduce_(0, groups, torch.arange(len(groups)), "amin")
