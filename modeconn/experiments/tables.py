"""Results of an experiment: subnetworks beside dropout networks, over one or more solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeconn.stability.table import MEASURES, Level, Row, StabilityTable

# Quantiles 0.975 of Student's t distribution with 1, 2, … 29 degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)
# That of the normal distribution, for more.
_NORMAL = 1.96


@dataclass(frozen=True)
class Interval:
    """A mean over solutions and the half-width of its 95 % interval, 0 for a single solution."""

    mean: float
    half: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Computes the interval of Student's t distribution, as the paper's figures have it."""
        count = len(values)
        if count < 2:
            return Interval(float(values[0]), 0.0)
        factor = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
        return Interval(float(np.mean(values)), factor * float(np.std(values, ddof=1)) / count**0.5)


@dataclass(frozen=True)
class Tables:
    """Subnetworks (A) and dropout networks (B) at one fraction F, by solution."""

    fraction: float
    subnetworks: tuple[StabilityTable, ...]
    dropout: tuple[StabilityTable, ...]

    @property
    def entries(self) -> list[int]:
        """The entry layers of the subnetworks; dropout networks have none at layer 0."""
        return self.subnetworks[0].entries

    def best(self, kind: str, entry: int) -> list[Row]:
        """Returns the best draw of each solution, by training error and then loss.

        Args:
            kind: "subnetworks" or "dropout".
        """
        tables: tuple[StabilityTable, ...] = getattr(self, kind)
        found = []
        for table in tables:
            found += [each.best_by_error for each in table.summary() if each.entry == entry]
        return found

    def originals(self) -> list[Level]:
        """Returns the numbers of the solutions themselves."""
        return [table.original for table in self.subnetworks]

    def lines(self) -> list[dict[str, Any]]:
        """Compares the best draws of each entry layer: means over solutions, and intervals."""
        rows = []
        for entry in self.entries:
            line: dict[str, Any] = {"fraction": self.fraction, "entry": entry}
            for kind, name in (("subnetworks", "subnetwork"), ("dropout", "dropout")):
                line |= _columns(name, self.best(kind, entry), len(self.subnetworks) > 1)
            both = line["dropout_loss"] is not None
            line["better"] = line["subnetwork_loss"] < line["dropout_loss"] if both else None
            rows.append(line)
        return rows


def _columns(name: str, best: Sequence[Row], several: bool) -> dict[str, Any]:
    """Returns a line's numbers of one kind of network; None where there are none."""
    line: dict[str, Any] = {}
    for measure in MEASURES:
        column = f"{name}_{measure.removeprefix('train_')}"
        found = Interval.of([getattr(row, measure) for row in best]) if best else None
        line[column] = None if found is None else found.mean
        if several:
            line[f"{column}_interval"] = None if found is None else found.half
    return line


def dropout_level(tables: Sequence[StabilityTable]) -> Level:
    """Returns the level of a path by dropout: of each measure for itself, as published.

    A path through dropout networks needs those of all layers. So a draw's level is the largest
    among its layers, a network's the least among the draws, and a pair's the larger of both.
    """
    levels = []
    for measure in MEASURES:
        networks = []
        for table in tables:
            by_draw = np.stack([table.column(measure, entry) for entry in table.entries])
            networks.append(by_draw.max(0).min())
        levels.append(float(max(networks)))
    return Level(*levels)
