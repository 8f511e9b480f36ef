"""Checks the conditions of Nguyen et al. 2021 for connectivity, entry layer by entry layer.

They are the room condition of Theorem 4.1 and its two corollaries: subnetworks whose last two
hidden layers have order of √N units on distinct features, and linearly separable features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.connection.features import Features, compute_features
from modeconn.connection.kept import needed_units
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.memorising import memorising_maps, why_not_memorised
from modeconn.connection.memorising_layers import evaluated
from modeconn.connection.positions import room
from modeconn.connection.separability import coinciding, linear_separability
from modeconn.connection.subnetworks import check_entry, kept_units, restrict
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.parameters.fitting import load_for
from modeconn.stability.table import aligned

if TYPE_CHECKING:
    import pandas

# done, total: entry layers.
Progress = Callable[[int, int], None]

_BATCH = 1024
_COLUMNS = "entry kept width room equal_rows conflicts width/√N memorised separable margin"
_EXPLANATION = (
    "kept: |I_l| of n_l units, drawn at random, * chosen since those drawn are not separable.  "
    "width: the smallest hidden width of the subnetwork S_l, - if it has no hidden layer.\n"
    "room: S_l fits beside S_{l+1} in every layer.  "
    "equal rows: samples whose kept features equal an earlier sample's; conflicts:\n"
    "those of them with another label, which no S_l can fit.  "
    "width/√N: the smaller of the widths of S_l's last two hidden layers\n"
    "over √N, of which the theory asks for the order of 1; - if it has one or none.  "
    "memorised: yes if layers of these widths were built\nthat give every sample its label, "
    "no if equal rows forbid it, else ? (the reason is in the table's rows).\n"
    "separable: so many units are linearly separable (yes: a witness; no: all units of the layer "
    "together are not; ? is not decided); margin: at norm 1."
)


@dataclass(frozen=True)
class Condition:
    """The conditions at one entry layer.

    Attributes:
        entry: l.
        units, kept: n_l and |I_l|.
        width: the smallest of the hidden widths m_{l,p} of the subnetwork, 0 if it has none (l =
            L-1).
        room: |I_{l+1}| + m_{l,l+1} ≤ n_{l+1} and m_{l+1,p} + m_{l,p} ≤ n_p for p ≥ l+2, and no
            width is 0.
        shortage: the layers without room and the units that they lack, "" where there is room.
        repeated: samples whose kept features equal those of an earlier sample.
        conflicting: those of them that have another label than the first such sample.
        root_ratio: the smaller of m_{l,L-2} and m_{l,L-1} over √N; NaN if the subnetwork has fewer
            than two hidden layers.
        separable: whether so many units of the layer are linearly separable: True is proved by a
            witness for those drawn, or for others that were chosen; False by a proof that even all
            units together are not; None is not decided or not asked for.
        margin: of the witness (U, c), normed to 1; NaN without one.
        reason: the verdict on separability in words, "" if it was not asked for.
        chosen: whether the witness is one of chosen units.
        memorised: whether layers of order √N units give every sample its label from the kept
            features: True where they were built (in float64) and checked; False where two samples
            of different labels have equal features in all units of the layer; None where this
            construction does not do it.
        memorised_reason: the verdict in words.
    """

    entry: int
    units: int
    kept: int
    width: int
    room: bool
    shortage: str
    repeated: int
    conflicting: int
    root_ratio: float
    separable: bool | None
    margin: float
    reason: str
    chosen: bool = False
    memorised: bool | None = None
    memorised_reason: str = ""

    @property
    def distinct(self) -> bool:
        """Whether no two samples have the same kept features."""
        return self.repeated == 0


@dataclass(frozen=True)
class ConditionsTable:
    """The conditions at every entry layer.

    Attributes:
        rows: by entry layer.
        samples: N.
    """

    rows: tuple[Condition, ...]
    samples: int

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; numbers that are not defined are None."""
        return {"samples": self.samples, "rows": [_defined(asdict(row)) for row in self.rows]}

    def to_frame(self) -> pandas.DataFrame:
        """Returns a pandas table with a row per entry layer.

        Raises:
            ModeconnError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ModeconnError(
                "to_frame() needs pandas, which is not installed: pip install pandas"
            ) from None
        columns = [field.name for field in fields(Condition)]
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def __str__(self) -> str:
        lines = [_COLUMNS.split()]
        for row in self.rows:
            decided = {True: "yes", False: "no", None: "?" if row.reason else "-"}[row.separable]
            memorised = {True: "yes", False: "no", None: "?"}[row.memorised]
            lines.append(
                [
                    str(row.entry),
                    f"{row.kept}/{row.units}{'*' if row.chosen else ''}",
                    str(row.width or "-"),
                    "yes" if row.room else "no",
                    f"{row.repeated:,}",
                    f"{row.conflicting:,}",
                    _number(row.root_ratio),
                    memorised if row.width else "-",
                    decided,
                    _number(row.margin),
                ]
            )
        lines[0] = [name.replace("_", " ") for name in lines[0]]
        short = [f"entry layer {row.entry}: {row.shortage}" for row in self.rows if row.shortage]
        return "\n".join([f"{self.samples:,} samples", aligned(lines), *short, _EXPLANATION])


@without_autocast
def conditions(
    model: nn.Module,
    params: Any,
    train: Any,
    *,
    kept: float = 0.5,
    width: float = 0.5,
    entries: Sequence[int] | None = None,
    seed: int = 0,
    separability: bool | Sequence[int] = True,
    iterations: int = 1000,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ConditionsTable:
    """Checks which of the paper's conditions a network meets at which entry layer.

    Nothing is trained. Room is about widths alone; equal rows, memorising and separability are
    about the features of the kept units over all training samples, which are drawn at random once
    (all inputs at entry layer 0). The √N condition is reported as a ratio, since the theory asks
    for the order of √N units and names no constant, and decided by building such layers
    (memorising_layers.py), which takes m·m' ≥ 4N. Separability is decided by a witness, for the
    units drawn or else for those that a readout of all units needs most; "no" is a proof for all.

    Args:
        model: the architecture, a chain of layers.
        params: its weights: a module, state dict or checkpoint file.
        train: the data, as for `modeconn.evaluate`; targets are class labels.
        kept: |I_l| / n_l, the fraction of units whose features a subnetwork reads.
        width: m_{l,p} / n_p, the fraction of a layer's units that a subnetwork has; rounded down.
        entries: the entry layers, 0 … L-1; all of them if None.
        seed: of the kept units.
        separability: whether to decide linear separability, the dear part; or the entry layers to
            decide it at.
        iterations: for `linear_separability`.
        batch_size: rows per batch of the pass over the data.
        progress: called with (entry layers done, entry layers).

    Raises:
        ModeconnError: the model is no chain; kept, width or entries out of range; bad data.
    """
    _check_fractions(kept=kept, width=width)
    state = load_for(model, params)
    source = as_batches(train, batch_size or _BATCH)
    chain = LayerChain.of(model, next(iter(source))[0][:2])
    requested = list(range(chain.length)) if entries is None else sorted(set(entries))
    decided = set(requested if separability is True else separability or ())
    for entry in [*requested, *decided]:
        check_entry(chain, entry)
    units = {entry: _kept(chain, entry, kept, seed) for entry in range(chain.length)}
    read = {entry: units[entry] for entry in requested}
    features = compute_features(chain, state, source, requested, kept=read)
    sizes = {entry: len(each) for entry, each in units.items()}
    whole = _Whole(chain, state, source)
    rows = []
    for number, entry in enumerate(requested, 1):
        row = _condition(chain, entry, sizes, width, features)
        row = _memorised(row, chain, features, width, whole)
        if entry in decided:
            row = _with_verdict(row, chain, features, iterations, whole)
        rows.append(row)
        if progress is not None:
            progress(number, len(requested))
    return ConditionsTable(tuple(rows), len(features))


@dataclass(frozen=True, eq=False)
class _Whole:
    """Computes the features of all units of a layer, which few layers need."""

    chain: LayerChain
    state: Mapping[str, Tensor]
    source: Any

    def entry(self, entry: int) -> Tensor:
        return compute_features(self.chain, self.state, self.source, [entry]).entry(entry)


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 < value <= 1:
            raise ModeconnError(
                f"{name} is {value}: expected a fraction of the units, above 0 and at most 1"
            )


def _kept(chain: LayerChain, entry: int, kept: float, seed: int) -> Tensor:
    """Draws I_l: all inputs at entry layer 0, a random part of the units after that."""
    units = chain.widths[entry]
    if entry == 0:
        return torch.arange(units)
    word = np.random.SeedSequence([seed, entry]).generate_state(1, np.uint64)[0]
    return kept_units(units, float(kept), torch.Generator().manual_seed(int(word) >> 1))


def _condition(
    chain: LayerChain, entry: int, sizes: Mapping[int, int], width: float, features: Features
) -> Condition:
    """Checks widths and equal rows at one entry layer, without a verdict on separability.

    Args:
        sizes: |I_l| by entry layer.
    """
    hidden = {p: math.floor(width * chain.widths[p]) for p in range(1, chain.length)}
    own = [hidden[p] for p in range(entry + 1, chain.length)]
    short = _shortages(chain, entry, sizes, hidden)
    found = coinciding(features.entry(entry), features.labels)
    # The ratio needs two hidden layers.
    ratio = min(own[-2:]) / math.sqrt(len(features)) if len(own) > 1 else math.nan
    return Condition(
        entry=entry,
        units=chain.widths[entry],
        kept=sizes[entry],
        width=min(own, default=0),
        room=not short,
        shortage="; ".join(short),
        repeated=found.repeated,
        conflicting=found.conflicting,
        root_ratio=ratio,
        separable=None,
        margin=math.nan,
        reason="",
    )


def _shortages(
    chain: LayerChain, entry: int, sizes: Mapping[int, int], hidden: Mapping[int, int]
) -> list[str]:
    """Lists where S_l has no room beside S_{l+1}, or no unit at all."""
    widths = {}
    for each in (entry, entry + 1):
        widths[each] = [hidden[p] for p in range(each + 1, chain.length)]
    # The lines about S_l come first; those about S_{l+1} belong to the next entry layer.
    lines = room(chain, sizes, widths)
    others = room(chain, sizes, {entry + 1: widths[entry + 1]})
    short = lines[: len(lines) - len(others)]
    for p in range(entry + 1, chain.length):
        if not hidden[p]:
            short.append(f"layer {p} has too few units for a subnetwork")
    return short


def _with_verdict(
    row: Condition, chain: LayerChain, features: Features, iterations: int, whole: _Whole
) -> Condition:
    """Adds the verdict on linear separability: of the units drawn, of all, of chosen ones."""
    labels, classes = features.labels, chain.classes
    decide = partial(linear_separability, labels=labels, classes=classes, iterations=iterations)
    found = decide(features.entry(row.entry))
    if found.separable or row.kept == row.units:
        return replace(row, separable=found.separable, margin=found.margin, reason=found.reason)
    h = whole.entry(row.entry)
    of_all = decide(h)
    if not of_all.separable:
        reason = f"all {row.units} units: {of_all.reason}"
        return replace(row, separable=of_all.separable, reason=reason)
    units = needed_units([h], row.units, labels, classes, row.kept)
    found = decide(restrict(chain, row.entry, h, units))
    if not found.separable:
        reason = f"all {row.units} units are separable, and no {row.kept} of them were found to be"
        return replace(row, separable=None, reason=reason)
    reason = f"{found.reason}, of units chosen"
    return replace(row, separable=True, margin=found.margin, reason=reason, chosen=True)


def _memorised(
    row: Condition, chain: LayerChain, features: Features, width: float, whole: _Whole
) -> Condition:
    """Adds the verdict on memorising: tries to build the layers, and checks what they give."""
    if not row.width or row.entry > chain.length - 2:
        return replace(row, memorised_reason="a linear readout has no hidden layer to do it")
    if row.conflicting:
        conflicts = (
            row.kept == row.units or coinciding(whole.entry(row.entry), features.labels).conflicting
        )
        reason = "samples of different labels have equal features"
        return replace(row, memorised=False if conflicts else None, memorised_reason=reason)
    unfit = why_not_memorised(chain)
    if unfit is not None:
        return replace(row, memorised_reason=unfit)
    last = chain.length - 1
    widths = [math.floor(width * chain.widths[p]) if p else 0 for p in (last - 1, last)]
    h, labels = features.entry(row.entry).double().cpu(), features.labels.cpu()
    try:
        maps = memorising_maps(chain, row.entry, h, labels, (widths[0], widths[1]))
    except ModeconnError as failure:
        return replace(row, memorised_reason=str(failure))
    numbers = evaluated(maps, h.numpy())[:, 0]
    right = bool((np.rint(numbers) == labels.numpy()).all())
    reason = "built: every sample gets its label" if right else "built, and lost in rounding"
    return replace(row, memorised=right or None, memorised_reason=reason)


def _defined(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN by None, which JSON has."""
    return {name: None if _is_nan(value) else value for name, value in values.items()}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
