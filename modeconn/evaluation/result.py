"""The result of an evaluation: metrics at every t, with barrier, files, tables and plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn import plotting
from modeconn.errors import ModeconnError
from modeconn.evaluation.columns import Columns
from modeconn.evaluation.stored import PLAIN, Barrier, decoded, encoded, plain_fields
from modeconn.files.fingerprints import digest_of_json
from modeconn.files.writing import atomic_write, check_sums
from modeconn.parameters import ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "modeconn.PathResult/1"
SUFFIXES = (".npz", ".json")


@dataclass(eq=False, repr=False)
class PathResult(Columns):
    """Metrics along a path, one value per t, each an exact mean over all samples.

    Metrics are attributes too: ``result.loss`` is ``result.values["loss"]``. A metric with the name
    of a field or method, such as ``samples``, is reached through ``values``.

    Attributes:
        t: float64 ``[T]``, or ``[T, D]`` where a path has D coordinates.
        values: float64 ``[T]`` by name of the metric. ``loss`` is a mean per sample; names that end
            in ``error`` are fractions in [0, 1]. Non-finite values are kept as they are.
        samples: the number of samples that every value is a mean over.
        passes: the number of passes over the data.
        backend: the backend that ran.
        seconds: wall-clock time of the evaluation.
        info: versions, device, precision and the like, as text and numbers. ``info["statistics"]``
            is the backend that recomputed the norms' statistics, "native" or "reference", or "".
            ``info["control_points"]``, if present, is JSON text: the t of each control point, which
            a plot of a plane marks.

    Raises:
        ModeconnError: the shapes of ``t`` and ``values`` do not agree.
    """

    t: np.ndarray
    values: dict[str, np.ndarray]
    samples: int
    passes: int
    backend: str
    seconds: float
    info: dict[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.t = np.asarray(self.t, dtype=np.float64)
        self.values = {
            name: np.asarray(column, dtype=np.float64) for name, column in self.values.items()
        }
        if self.t.ndim not in (1, 2) or not len(self.t):
            raise ModeconnError(
                f"t has shape {list(self.t.shape)}: expected [T] or [T, D] with T >= 1"
            )
        for name, column in self.values.items():
            if column.shape != self.t.shape[:1]:
                raise ModeconnError(
                    f"metric {name!r} has shape {list(column.shape)}: "
                    f"expected [{len(self.t)}], one value per t"
                )

    def __getattr__(self, name: str) -> np.ndarray:
        # Reached only where the ordinary look-up failed. `values` itself is missing while
        # unpickling.
        values: dict[str, np.ndarray] = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(
            f"PathResult has no {name!r}; its metrics are {', '.join(values) or 'none'}"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.values})

    def __repr__(self) -> str:
        ranges = [f"{name}={_range(column)}" for name, column in self.values.items()]
        counts = [f"samples={self.samples}", f"passes={self.passes}"]
        run = [f"backend={self.backend!r}", f"seconds={self.seconds:.3g}"]
        return f"PathResult({', '.join([f'points={len(self.t)}', *ranges, *counts, *run])})"

    def metric(self, name: str) -> np.ndarray:
        """Return the values of one metric, ``[T]``.

        Raises:
            ModeconnError: the result has no such metric.
        """
        if name not in self.values:
            known = ", ".join(self.values) or "none"
            raise ModeconnError(f"metric {name!r} is not in this result, which has {known}")
        return self.values[name]

    def highest(self, metric: str = "loss") -> tuple[float | tuple[float, ...], float]:
        """Return the t of the largest value of a metric, and that value; NaN counts as largest."""
        return self._at(metric, int(self.metric(metric).argmax()))

    def lowest(self, metric: str = "loss") -> tuple[float | tuple[float, ...], float]:
        """Return the t of the smallest finite value of a metric, and that value.

        Raises:
            ModeconnError: the metric is finite at none of the points.
        """
        index = ranking.best(self.metric(metric), f"metric {metric!r}, by point,")
        return self._at(metric, index)

    def _at(self, metric: str, index: int) -> tuple[float | tuple[float, ...], float]:
        t = self.t[index]
        where = float(t) if self.t.ndim == 1 else tuple(map(float, t))
        return where, float(self.metric(metric)[index])

    def barrier(self, metric: str = "loss") -> Barrier:
        """Return how far a metric rises above the straight line between its two ends.

        It is the maximum over the evaluated t in [0, 1] of ``L(t) - ((1 - t) L(0) + t L(1))``, so
        never below 0 (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket
        Hypothesis"), and not finite where the metric is not. Its attribute `found` says how the
        maximum was found: of how many points, or by which rule with points="adaptive".

        Raises:
            ModeconnError: t has several coordinates, or does not hold exactly 0 and 1.
        """
        column = self.metric(metric)
        if self.t.ndim != 1:
            raise ModeconnError(
                f"t has {self.t.shape[1]} coordinates: a barrier needs t with one coordinate"
            )
        missing = [str(end) for end in (0, 1) if end not in self.t]
        if missing:
            raise ModeconnError(
                "a barrier needs the ends of the path: "
                f"t = {' and '.join(missing)} was not evaluated"
            )
        first, last = (column[self.t == end][0] for end in (0.0, 1.0))
        inside = (self.t >= 0) & (self.t <= 1)
        t, column = self.t[inside], column[inside]
        with np.errstate(invalid="ignore"):  # inf - inf is nan, and is reported as such
            height = (column - ((1 - t) * first + t * last)).max()
        return Barrier(height, str(self.info.get("rule", f"largest of {_count(len(t), 'point')}")))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, with "nan", "inf" and "-inf" for such numbers."""
        try:
            barriers = {name: encoded(self.barrier(name)) for name in self.values}
        except ModeconnError:
            barriers = {}
        return {
            "format": FORMAT,
            "t": encoded(self.t.tolist()),
            "values": {name: encoded(column.tolist()) for name, column in self.values.items()},
            "barrier": barriers,
            "samples": self.samples,
            "passes": self.passes,
            "backend": self.backend,
            "seconds": self.seconds,
            "info": {key: encoded(value) for key, value in self.info.items()},
        }

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the result to a ``.npz`` (no pickle) or ``.json`` file, whole or not at all.

        Both keep every float64 exactly. JSON has the strings "nan", "inf" and "-inf" for such
        numbers, and the barriers for readers without modeconn.

        Raises:
            ModeconnError: the file has another suffix, or cannot be written.
        """
        content = self.to_dict()
        if _suffix(file) == ".json":
            content["digest"] = digest_of_json(content)
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            atomic_write(file, lambda stream: stream.write(text.encode()))
            return
        meta = {key: content[key] for key in ("format", *PLAIN)}
        arrays = {f"values/{name}": column for name, column in self.values.items()}
        arrays |= {"t": self.t, "meta": np.array(json.dumps(meta, allow_nan=False))}
        atomic_write(file, lambda stream: np.savez(stream, **arrays))  # type: ignore[arg-type]  # ** also fills flags

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> PathResult:
        """Read a result that :meth:`save` wrote; no code in the file ever runs.

        Raises:
            ModeconnError: the file is missing, or is not a saved result.
        """
        if not Path(file).is_file():
            raise ModeconnError(f"{file}: no such file")
        try:
            return cls._from_json(file) if _suffix(file) == ".json" else cls._from_npz(file)
        except ModeconnError:
            raise
        # zipfile, numpy, json and our own look-ups each fail in their own way
        except Exception as error:
            raise ModeconnError(
                f"{file}: not a result saved by modeconn ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _from_json(cls, file: str | os.PathLike[str]) -> PathResult:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if "digest" in content and content["digest"] != digest_of_json(content):
            raise ValueError("it is damaged, or was changed without its digest")
        return cls._from_content(content)

    @classmethod
    def _from_npz(cls, file: str | os.PathLike[str]) -> PathResult:
        with Path(file).open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            check_sums(archive.zip)
            content = json.loads(str(archive["meta"]))
            names = [name for name in archive.files if name.startswith("values/")]
            values = {name.removeprefix("values/"): archive[name] for name in names}
            return cls._from_content({**content, "t": archive["t"], "values": values})

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> PathResult:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
        values = content["values"]
        if not isinstance(values, dict):
            raise TypeError(f"values are a {type(values).__name__}, expected a table")
        return cls(
            t=decoded(content["t"]),
            values={name: decoded(column) for name, column in values.items()},
            **plain_fields(content),
        )

    def _columns(self) -> dict[str, np.ndarray]:
        if self.t.ndim == 1:
            return {"t": self.t} | self.values
        columns = {f"t{index}": self.t[:, index] for index in range(self.t.shape[1])}
        return columns | self.values

    def plot(self, ax: Axes | None = None, metric: str = "loss", surface: bool = False) -> Axes:
        """Draw the result with matplotlib and return the axes.

        With one coordinate: the metric against t, its barrier, and the error rates (%) on a second
        axis. With two: filled contours of the metric, the control points marked if ``info`` has
        them, and joined up if they are a training trajectory; or a surface in three dimensions.

        Args:
            ax: matplotlib axes to draw on, made with ``projection="3d"`` for a surface; a new
                figure if None.
            metric: the metric of the left axis, of the contours or of the surface.
            surface: draw a surface, where t has two coordinates.

        Raises:
            ModeconnError: matplotlib is not installed, or t has more than two coordinates.
        """
        column = self.metric(metric)
        if surface and self._coordinates() != 2:
            raise ModeconnError("t has one coordinate: a surface needs t with two coordinates")
        if ax is None:
            ax = plotting.new_axes(surface)
        if surface:
            plotting.draw_surface(ax, self.t, column, metric, self._marks())
        elif self._coordinates() == 2:
            joined = "trajectory" in self.info
            plotting.draw_plane(ax, self.t, column, metric, self._marks(), joined=joined)
        else:
            errors = {
                name: values
                for name, values in self.values.items()
                if name.endswith("error") and name != metric
            }
            plotting.draw_curve(ax, self.t.reshape(-1), column, metric, self._chord(metric), errors)
        where = "on a plane" if self._coordinates() == 2 else "along the path"
        size = _count(len(self.t), "point")
        if self.samples:  # a surface that another program wrote does not say
            size += f", {_count(self.samples, 'sample')}"
        ax.set_title(f"{metric.capitalize()} {where}: {size}")
        return ax

    def terminal_plot(self, width: int = 72, height: int = 15, metric: str = "loss") -> str:
        """Draw one metric as a small picture in Unicode text, without a newline at the end.

        With one coordinate: a curve in Braille dots, and the straight line between the ends dotted.
        With two: shades.

        Args:
            width: columns of the whole picture, labels included; at least 30.
            height: rows of the whole picture; at least 6.
            metric: the metric to draw.

        Raises:
            ModeconnError: the size is too small, or t has more than two coordinates.
        """
        column = self.metric(metric)
        if width < 30 or height < 6:
            raise ModeconnError(
                f"the size of the terminal plot is {width} × {height}: expected at least 30 × 6"
            )
        if self._coordinates() == 2:
            return plotting.text_plane(self.t, column, metric, width, height)
        return plotting.text_curve(
            self.t.reshape(-1), column, metric, self._chord(metric), width, height
        )

    def _coordinates(self) -> int:
        """Return the number of coordinates, 1 or 2; a plot cannot show more."""
        count = 1 if self.t.ndim == 1 else self.t.shape[1]
        if count > 2:
            raise ModeconnError(
                f"t has {count} coordinates: a plot shows t with one or two coordinates"
            )
        return count

    def _chord(self, metric: str) -> tuple[float, float] | None:
        """Return the metric at t = 0 and t = 1 where both were evaluated and are finite."""
        try:
            self.barrier(metric)
        except ModeconnError:
            return None
        first, last = (float(self.metric(metric)[self.t == end][0]) for end in (0.0, 1.0))
        return (first, last) if math.isfinite(first) and math.isfinite(last) else None

    def _marks(self) -> list[list[float]]:
        marks: list[list[float]] = json.loads(str(self.info.get("control_points", "[]")))
        return marks


def _suffix(file: str | os.PathLike[str]) -> str:
    suffix = Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        raise ModeconnError(
            f"{file}: a result is saved as {' or '.join(SUFFIXES)}, "
            f"not as {suffix or 'a bare name'}"
        )
    return suffix


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _range(column: np.ndarray) -> str:
    finite = column[np.isfinite(column)]
    if not len(finite):
        return "not finite"
    bad = len(column) - len(finite)
    return f"{finite.min():.4g}…{finite.max():.4g}" + (f" ({bad} not finite)" if bad else "")
