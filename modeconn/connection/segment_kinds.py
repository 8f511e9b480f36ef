"""Classifies the linear segments of a path from the weights at their two ends alone.

Weights are linear in t on a segment, so what holds at both ends (a weight is zero, two rows are
equal, a row is what it was) holds throughout. The kinds are the moves of the path of Nguyen,
Bréchet, Mondelli 2021, Theorem 4.1:

    rewrite  only dead units change: units whose outputs reach the network's output through no
             non-zero weights. The function is constant.
    shift    units with equal functions trade outgoing weights. The function is constant.
    swing    only the output layer changes. The logits are affine in t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.connection.layer_chain import AffineLayer, LayerChain
from modeconn.connection.unit_classes import moved_class
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

REWRITE, SWING, SHIFT = "rewrite", "swing", "shift"
KINDS = (REWRITE, SWING, SHIFT)
# Units that a message lists by number: enough to find the mistake.
_LISTED = 6


@dataclass(frozen=True)
class Evidence:
    """The kind of a segment and the reason for it.

    Attributes:
        kind: "rewrite", "shift" or "swing".
        moved: keys of the parameters and buffers that differ between the ends; integer buffers are
            not on the path and do not count.
        text: the reason, in words.
    """

    kind: str
    moved: tuple[str, ...]
    text: str

    def supports(self, claimed: str) -> bool:
        """Whether the weights bear out a claimed kind.

        Where nothing moves any kind is right; a rewrite is a shift, too, one that trades nothing.
        """
        if not self.moved:
            return claimed in KINDS
        return claimed == self.kind or (claimed == SHIFT and self.kind == REWRITE)


def classify_segment(chain: LayerChain, start: State, stop: State) -> Evidence:
    """Classifies the segment from one state to another, from the weights alone.

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
        raise ModeconnError(f"{stray[0]} changes, and is no parameter or buffer of a layer")
    if not moved:
        return Evidence(REWRITE, (), "nothing moves")
    if set(moved) <= set(chain.layers[-1].incoming()):
        keys = ", ".join(moved)
        return Evidence(
            SWING, moved, f"only the output layer moves ({keys}): the logits are affine in t"
        )
    units = _moved_units(chain, start, stop, moved)
    if _live_change(chain, start, stop, moved) is None:
        return Evidence(REWRITE, moved, f"only dead units move: {units}")
    found = moved_class(chain, start, stop)
    if isinstance(found, list):
        return Evidence(SHIFT, moved, f"units of equal functions trade weights: {units}")
    problem = _told(*found[:2])
    raise ModeconnError(
        "it is no swing, for more than the output layer moves, "
        f"and the function is not constant: {problem}"
    )


# -- single units ---------------------------------------------------------------------------------


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape hold equal numbers; shared memory is not read."""
    if a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return True
    return torch.equal(a, b)


def _moved(chain: LayerChain, start: State, stop: State) -> tuple[str, ...]:
    """Lists the keys of the floating point tensors that differ, layer by layer.

    A path does not move the others.
    """
    keys: list[str] = []
    for layer in chain.layers:
        keys += layer.incoming()
    return tuple(
        key
        for key in [*keys, *chain.others]
        if start[key].is_floating_point() and not _same(start[key], stop[key])
    )


def _check_values(chain: LayerChain, state: State) -> None:
    """Raises where a unit's value is no number, which even a weight of zero would pass on."""
    for key, value in state.items():
        numbers = value.is_floating_point() and value.numel()
        if numbers and not all(map(torch.isfinite, value.aminmax())):
            raise ModeconnError(f"{key} is not finite")
    for norm in (layer.norm for layer in chain.layers):
        if norm is None or norm.var is None:
            continue
        smallest = float(state[norm.var].min())
        if not smallest + norm.eps > 0:
            raise ModeconnError(f"{norm.var} holds {smallest:.4g}: a variance cannot be negative")


def _changed_units(layer: AffineLayer, start: State, stop: State, moved: tuple[str, ...]) -> Tensor:
    """Finds the units whose incoming weights, bias or norm differ: bool [n_p]."""
    changed = torch.zeros(layer.units, dtype=torch.bool, device=start[layer.weight].device)
    for key in layer.incoming():
        if key in moved:
            different = start[key] != stop[key]
            changed |= different.flatten(1).any(1) if different.dim() > 1 else different
    return changed


def _live_change(
    chain: LayerChain, start: State, stop: State, moved: tuple[str, ...]
) -> str | None:
    """Names the live units that change, in the highest layer that has any; None if there are none.

    Liveness goes down from the outputs: a unit is live where a live unit above reads it.
    """
    top = chain.layers[-1]
    live = torch.ones(top.units, dtype=torch.bool, device=start[top.weight].device)
    for layer in reversed(chain.layers):
        bad = _changed_units(layer, start, stop, moved) & live
        if bool(bad.any()):
            return _told(layer, bad.nonzero().flatten())
        # The rows of live units are the same at both ends, so one end tells which columns are zero.
        rows = live.nonzero().flatten()
        live = (layer.by_unit(start[layer.weight][rows]) != 0).flatten(2).any(2).any(0)
    return None


def _told(layer: AffineLayer, units: Tensor) -> str:
    """Names live units of a layer that move."""
    listed = ", ".join(map(str, units[:_LISTED].tolist()))
    if len(units) > _LISTED:
        listed += ", …"
    what = "live unit moves" if len(units) == 1 else "live units move"
    return f"layer {layer.index} ({layer.weight}): {len(units):,} {what}: {listed}"


def _moved_units(chain: LayerChain, start: State, stop: State, moved: tuple[str, ...]) -> str:
    """Counts the units that change, layer by layer, in words."""
    parts = []
    for layer in chain.layers:
        count = int(_changed_units(layer, start, stop, moved).sum())
        if count:
            parts.append(f"{count:,} of layer {layer.index}")
    return ", ".join(parts) if parts else "none"
