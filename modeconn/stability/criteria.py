"""Which of the conditions for connectivity a given network meets, entry layer by entry layer (Nguyen et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.connection.construct import room
from modeconn.connection.features import compute_features
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.subnetworks import check_entry, kept_units
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.stability.separability import coinciding, linear_separability
from modeconn.stability.table import aligned

if TYPE_CHECKING:
    import pandas

# done, total: entry layers.
Progress = Callable[[int, int], None]

_EXPLANATION = """\
kept: |I_l| of n_l units, drawn at random.  width: the smallest hidden width of the subnetwork S_l, - if it has no hidden layer.
room: S_l fits beside S_{l+1} in every layer.  equal rows: samples whose kept features equal an earlier sample's; conflicts:
those of them with another label, which no S_l can fit.  width/√N: the smaller of the widths of S_l's last two hidden layers
over √N; the theory asks for the order of 1 and for no equal rows, and says nothing of constants; - if it has one or none.
separable: the kept features are linearly separable (yes and no are proved, ? is not decided); margin: at norm 1."""


@dataclass(frozen=True)
class Condition:
    """One entry layer.

    Attributes:
        entry: l.
        units, kept: n_l and |I_l|.
        width: the smallest of the hidden widths m_{l,p} of the subnetwork, 0 if it has none (l =
            L-1).
        room: |I_{l+1}| + m_{l,l+1} ≤ n_{l+1} and m_{l+1,p} + m_{l,p} ≤ n_p for p ≥ l+2, and no
            width is 0.
        shortage: what is short of how many units, "" where there is room.
        repeated: samples whose kept features are those of an earlier sample, number by number.
        conflicting: those of them that have another label than the first such sample.
        root_ratio: the smaller of m_{l,L-2} and m_{l,L-1} over √N; NaN if the subnetwork has fewer
            than two hidden layers.
        separable: whether the kept features are linearly separable: True and False are proved, None
            is not decided or not asked for.
        margin: of the witness (U, c), normed to 1; NaN without one.
        reason: the verdict on separability in words, "" if it was not asked for.
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
        """Plain numbers and text; numbers that are not defined are None, so that it is valid JSON."""
        rows = [
            {
                k: None if isinstance(v, float) and math.isnan(v) else v
                for k, v in asdict(row).items()
            }
            for row in self.rows
        ]
        return {"samples": self.samples, "rows": rows}

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table with a row per entry layer.

        Raises:
            ModeconnError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ModeconnError(
                "to_frame() needs pandas, which is not installed: pip install pandas"
            ) from None
        return pandas.DataFrame(
            [asdict(row) for row in self.rows], columns=[field.name for field in fields(Condition)]
        )

    def __str__(self) -> str:
        lines = ["entry kept width room equal_rows conflicts width/√N separable margin".split()]
        for row in self.rows:
            decided = {True: "yes", False: "no", None: "?" if row.reason else "-"}[row.separable]
            lines.append(
                [
                    str(row.entry),
                    f"{row.kept}/{row.units}",
                    str(row.width or "-"),
                    "yes" if row.room else "no",
                    f"{row.repeated:,}",
                    f"{row.conflicting:,}",
                    _number(row.root_ratio),
                    decided,
                    _number(row.margin),
                ]
            )
        lines[0] = [name.replace("_", " ") for name in lines[0]]
        short = [f"entry layer {row.entry}: {row.shortage}" for row in self.rows if row.shortage]
        return "\n".join([f"{self.samples:,} samples", aligned(lines), *short, _EXPLANATION])


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
    """Say which of the paper's conditions a network meets at which entry layer.

    Nothing is trained. Room and the √N condition are about widths alone; equal rows and
    separability are about the features of the kept units over all training samples, which are drawn
    at random once (all inputs at entry layer 0). The √N condition is reported as a ratio, since the
    theory asks for the order of √N units and names no constant.

    Args:
        model: the architecture, a chain of layers.
        params: its weights: a module, state dict or checkpoint file.
        train: the data, as for `modeconn.evaluation.evaluator`; targets are class labels.
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
    for name, value in (("kept", kept), ("width", width)):
        if not 0 < value <= 1:
            raise ModeconnError(
                f"{name} is {value}: expected a fraction of the units, above 0 and at most 1"
            )
    state = states.load(params)
    source = as_batches(train, batch_size or 1024)
    chain = LayerChain.of(model, next(iter(source))[0][:2])
    wanted = list(range(chain.length)) if entries is None else sorted(set(entries))
    decided = set(wanted if separability is True else separability or ())
    for entry in [*wanted, *decided]:
        check_entry(chain, entry)
    units = {entry: _kept(chain, entry, kept, seed) for entry in range(chain.length)}
    features = compute_features(
        chain, state, source, wanted, kept={entry: units[entry] for entry in wanted}
    )
    rows = []
    for number, entry in enumerate(wanted, 1):
        h = features.entry(entry)
        found = coinciding(h, features.labels)
        rows.append(
            _condition(
                chain, entry, units, width, len(features), (found.repeated, found.conflicting)
            )
        )
        if entry in decided:
            separation = linear_separability(
                h, features.labels, classes=chain.classes, iterations=iterations
            )
            verdict = {
                "separable": separation.separable,
                "margin": separation.margin,
                "reason": separation.reason,
            }
            rows[-1] = Condition(**{**asdict(rows[-1]), **verdict})
        if progress is not None:
            progress(number, len(wanted))
    return ConditionsTable(tuple(rows), len(features))


def _kept(chain: LayerChain, entry: int, kept: float, seed: int) -> Tensor:
    """I_l: all inputs at entry layer 0, a random part of the units after that."""
    units = chain.widths[entry]
    if entry == 0:
        return torch.arange(units)
    word = np.random.SeedSequence([seed, entry]).generate_state(1, np.uint64)[0]
    return kept_units(units, float(kept), torch.Generator().manual_seed(int(word) >> 1))


def _condition(
    chain: LayerChain,
    entry: int,
    units: dict[int, Tensor],
    width: float,
    samples: int,
    rows: tuple[int, int],
) -> Condition:
    """What follows from widths and counts, without a verdict on separability."""
    hidden = {p: math.floor(width * chain.widths[p]) for p in range(1, chain.length)}
    widths = {e: [hidden[p] for p in range(e + 1, chain.length)] for e in (entry, entry + 1)}
    own = widths[entry]
    sizes = {e: len(each) for e, each in units.items()}
    # The lines about S_l come first; those about S_{l+1} belong to the next entry layer.
    lines = room(chain, sizes, widths)
    others = room(chain, sizes, {entry + 1: widths[entry + 1]})
    short = lines[: len(lines) - len(others)]
    short += [
        f"layer {p} has too few units for a subnetwork"
        for p in range(entry + 1, chain.length)
        if not hidden[p]
    ]
    ratio = min(own[-2:]) / math.sqrt(samples) if len(own) > 1 else math.nan
    return Condition(
        entry,
        chain.widths[entry],
        sizes[entry],
        min(own, default=0),
        not short,
        "; ".join(short),
        *rows,
        ratio,
        None,
        math.nan,
        "",
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
