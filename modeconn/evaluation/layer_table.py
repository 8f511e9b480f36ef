"""The result of a layer-wise evaluation: metrics by layer and t, with barriers, text and plots."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn import plotting
from modeconn.errors import ModeconnError
from modeconn.evaluation.columns import Columns
from modeconn.evaluation.stored import decoded, encoded, plain_fields
from modeconn.files.fingerprints import digest_of_json
from modeconn.files.writing import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "modeconn.LayerTable/1"
# Columns of t that the text shows; others are between them.
_SHOWN = 5


@dataclass(eq=False, repr=False)
class LayerTable(Columns):
    """Metrics where one layer after another moves from a network a to a network b.

    Attributes:
        layers: the L names, in the order of the rows.
        t: float64 [T].
        values: float64 [L, T] by name of the metric.
        ends: by metric its value at a and at b.
        samples, passes, backend, seconds, info: as in `PathResult`; `info["mode"]` is "single" or
            "cumulative".
    """

    layers: tuple[str, ...]
    t: np.ndarray
    values: dict[str, np.ndarray]
    ends: dict[str, tuple[float, float]]
    samples: int
    passes: int
    backend: str
    seconds: float
    info: dict[str, str | int | float] = field(default_factory=dict)

    def metric(self, name: str) -> np.ndarray:
        """Return the values of one metric, [L, T].

        Raises:
            ModeconnError: the table has no such metric.
        """
        if name not in self.values:
            raise ModeconnError(
                f"metric {name!r} is not in this table, which has {', '.join(self.values)}"
            )
        return self.values[name]

    def barrier(self, metric: str = "loss") -> np.ndarray:
        """Return how far a metric rises above the line between a and b, by layer, [L].

        It is the maximum over t in [0, 1] of L_l(t) - ((1 - t) L(a) + t L(b)), where L_l(t) is the
        metric with layer l at t (Adilova et al. 2024). It is at least 0 where t = 0 is among them.

        Raises:
            ModeconnError: no t lies in [0, 1].
        """
        inside = (self.t >= 0) & (self.t <= 1)
        if not inside.any():
            raise ModeconnError("t has no value in [0, 1]: a barrier needs some")
        first, last = self.ends.get(metric, (0.0, 0.0))
        with np.errstate(invalid="ignore"):  # inf - inf is nan, and is reported as such
            line = (1 - self.t) * first + self.t * last
            highest: np.ndarray = (self.metric(metric) - line)[:, inside].max(1)
        return highest

    def __str__(self) -> str:
        shown = np.unique(np.linspace(0, len(self.t) - 1, min(_SHOWN, len(self.t))).astype(int))
        tables = []
        for name in self.values:
            header = [name, *(f"t = {self.t[i]:.3g}" for i in shown), "barrier"]
            rows = [header]
            for layer, row, barrier in zip(self.layers, self.values[name], self.barrier(name)):
                rows.append([layer, *(f"{row[i]:.4g}" for i in shown), f"{barrier:.4g}"])
            tables.append("\n".join(_aligned(rows)))
        return "\n\n".join(tables)

    def __repr__(self) -> str:
        return (
            f"LayerTable({len(self.layers)} layers, {len(self.t)} points, "
            f"mode={self.info.get('mode', '')!r}, metrics={[*self.values]}, "
            f"passes={self.passes}, backend={self.backend!r}, seconds={self.seconds:.3g})"
        )

    def _columns(self) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {
            "layer": np.repeat(np.array(self.layers, dtype=object), len(self.t)),
            "t": np.tile(self.t, len(self.layers)),
        }
        return columns | {name: value.ravel() for name, value in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values, with "nan", "inf" and "-inf" for such numbers."""
        return {
            "format": FORMAT,
            "layers": list(self.layers),
            "t": encoded(self.t.tolist()),
            "values": {name: encoded(value.tolist()) for name, value in self.values.items()},
            "ends": {name: encoded(list(pair)) for name, pair in self.ends.items()},
            "barrier": {name: encoded(self.barrier(name).tolist()) for name in self.values},
            "samples": self.samples,
            "passes": self.passes,
            "backend": self.backend,
            "seconds": self.seconds,
            "info": {key: encoded(value) for key, value in self.info.items()},
        }

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the table to a .json file, whole or not at all.

        Raises:
            ModeconnError: the file has another suffix, or cannot be written.
        """
        if Path(file).suffix.lower() != ".json":
            raise ModeconnError(f"{file}: a table of layers is saved as .json")
        content = self.to_dict()
        content["digest"] = digest_of_json(content)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        atomic_write(file, lambda stream: stream.write(text.encode()))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> LayerTable:
        """Read a table that `save` wrote.

        Raises:
            ModeconnError: the file is missing, or is no such table.
        """
        if not Path(file).is_file():
            raise ModeconnError(f"{file}: no such file")
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
            if content["digest"] != digest_of_json(content):
                raise ValueError("it is damaged, or was changed without its digest")
            return cls(
                layers=tuple(map(str, content["layers"])),
                t=decoded(content["t"]),
                values={name: decoded(value) for name, value in content["values"].items()},
                ends={k: tuple(decoded(v).tolist()) for k, v in content["ends"].items()},
                **plain_fields(content),
            )
        # json and our own look-ups each fail in their own way
        except Exception as error:
            raise ModeconnError(
                f"{file}: not a table saved by modeconn ({type(error).__name__}: {error})"
            ) from error

    def plot(self, ax: Axes | None = None, metric: str = "loss") -> Axes:
        """Draw a heat map of a metric, a row for each layer, and return the axes.

        Args:
            ax: matplotlib axes to draw on; a new figure if None.
            metric: the metric.

        Raises:
            ModeconnError: matplotlib is not installed.
        """
        values = self.metric(metric)
        ax = plotting.new_axes() if ax is None else ax
        image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
        ax.figure.colorbar(image, ax=ax, label=metric)
        ax.set_yticks(range(len(self.layers)), self.layers, fontsize=7)
        shown = np.unique(np.linspace(0, len(self.t) - 1, min(11, len(self.t))).astype(int))
        ax.set_xticks(shown, [f"{self.t[i]:.3g}" for i in shown])
        ax.set_xlabel("t of the layer")
        which = "up to each one" if self.info.get("mode") == "cumulative" else "one by one"
        ax.set_title(f"{metric.capitalize()} as layers move, {which}: {self.samples:,} samples")
        return ax


def _aligned(rows: list[list[str]]) -> list[str]:
    """The rows of a table as lines: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths)]
        cells[0] = f"{row[0]:<{widths[0]}}"
        lines.append("  ".join(cells).rstrip())
    return lines
