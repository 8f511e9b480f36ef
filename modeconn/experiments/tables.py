"""Results of an experiment: subnetworks beside dropout networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modeconn.stability.table import StabilityTable


@dataclass(frozen=True)
class Tables:
    """Subnetworks (A) and dropout networks (B) of one solution, at one fraction F."""

    fraction: float
    subnetworks: StabilityTable
    dropout: StabilityTable

    def lines(self) -> list[dict[str, Any]]:
        """Compares the best draws of each entry layer, by training loss."""
        rows = []
        for a, b in zip(self.subnetworks.summary(), self.dropout.summary(), strict=True):
            rows.append(
                {
                    "fraction": self.fraction,
                    "entry": a.entry,
                    "subnetwork_loss": a.best.train_loss,
                    "subnetwork_error": a.best.train_error,
                    "dropout_loss": b.best.train_loss,
                    "dropout_error": b.best.train_error,
                    "better": a.best.train_loss < b.best.train_loss,
                }
            )
        return rows
