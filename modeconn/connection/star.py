"""Many networks joined through a hub: one subnetwork on the input, to which each of them descends.

The subnetwork S_0 reads the input alone, so that it belongs to no network. K networks that share it
need K descents, and all K (K-1) / 2 pairs are connected: down from one network, a rewrite of dead
units, up to the other. The certificate of a pair is made of those of its two descents.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.connection import star_figure
from modeconn.connection.certificate import Certificate, Rounding, Segment
from modeconn.connection.connection import Connection
from modeconn.connection.json_values import plain
from modeconn.connection.segment_kinds import REWRITE
from modeconn.errors import ModeconnError, SystemFailure
from modeconn.evaluation.result import PathResult
from modeconn.files.writing import atomic_write, locked, sweep, temporary_of
from modeconn.parameters.paths import PolyChain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "modeconn.Star/1"
CONTENT = "star.json"
Pair = tuple[str, str]


@dataclass(frozen=True)
class Join:
    """The rewrite of dead units that joins the ends of two descents, from the weights.

    Attributes:
        moved: keys of the parameters and buffers that differ.
        evidence: the reason for the kind.
    """

    moved: tuple[str, ...]
    evidence: str


@dataclass(eq=False, repr=False)
class Star:
    """Networks of one architecture, all connected pairwise, as `connect` of several returns it.

    Attributes:
        descents: by the network's name the path from it down to the hub, with its certificate.
        joins: for each pair of names, in order, the rewrite between their ends at the hub.
        model: the model's spec, or None.
        details: how it was made: plain values that JSON can hold.
    """

    descents: dict[str, Connection]
    joins: dict[Pair, Join]
    model: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [pair for pair in self.pairs if pair not in self.joins]
        if len(self.descents) < 2 or missing:
            raise ModeconnError(
                f"a star of {len(self.descents)} descents and {len(self.joins)} joins: expected at "
                "least two descents, and a join for every pair"
            )
        self.details = plain(self.details)

    @property
    def names(self) -> tuple[str, ...]:
        """The networks' names, in the order in which they were given."""
        return tuple(self.descents)

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of names, in order."""
        return list(itertools.combinations(self.descents, 2))

    @property
    def bound(self) -> float:
        """The largest loss on any of the paths."""
        return max(each.certificate.bound for each in self.descents.values())

    @property
    def error_bound(self) -> float:
        """The largest error on any of the paths."""
        return max(each.certificate.error_bound for each in self.descents.values())

    def connection(self, first: str | int, second: str | int) -> Connection:
        """Returns the path between two networks, with its certificates.

        Args:
            first, second: names, or numbers from 0.

        Raises:
            ModeconnError: there is no such network, or it is the same twice.
        """
        names = self._name(first), self._name(second)
        if names[0] == names[1]:
            raise ModeconnError(f"network {names[0]} is given twice: expected two networks")
        down, up = (self.descents[name] for name in names)
        join = self.joins[names if names in self.joins else (names[1], names[0])]
        points = [*down.path.control_points, *reversed(up.path.control_points)]
        kinds = (*down.kinds, REWRITE, *reversed(up.kinds))
        certificate = _composed(down.certificate, join, up.certificate)
        test = None
        if down.test_certificate is not None and up.test_certificate is not None:
            test = _composed(down.test_certificate, join, up.test_certificate)
        details = {**self.details, "networks": list(names)}
        return Connection(PolyChain(points), kinds, certificate, test, self.model, details)

    def connections(self) -> Iterator[tuple[Pair, Connection]]:
        """Yields all pairs of names with their connections."""
        for pair in self.pairs:
            yield pair, self.connection(*pair)

    def _name(self, network: str | int) -> str:
        names = self.names
        if isinstance(network, int) and -len(names) <= network < len(names):
            return names[network]
        if network not in self.descents:
            raise ModeconnError(
                f"network is {network!r}: expected one of {', '.join(names)}, "
                f"or a number from 0 to {len(names) - 1}"
            )
        return str(network)

    def plot(self, ax: Axes | None = None, lines: Mapping[Pair, PathResult] | None = None) -> Axes:
        """Draws the star: a ray for each network, coloured by the loss along its descent.

        Args:
            ax: matplotlib axes to draw on; a new figure if None.
            lines: straight lines between pairs, from `modeconn.evaluate`, for comparison.

        Raises:
            ModeconnError: where matplotlib is not installed.
        """
        certificates = {name: each.certificate for name, each in self.descents.items()}
        return star_figure.draw(certificates, ax, lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, without the weights."""
        return {
            "format": FORMAT,
            "model": self.model,
            "networks": list(self.names),
            "joins": [
                {"pair": list(pair), "moved": list(join.moved), "evidence": join.evidence}
                for pair, join in self.joins.items()
            ],
            "bounds": [
                {"pair": list(pair), "bound": max(self._bounds(pair))} for pair in self.pairs
            ],
            "details": self.details,
        }

    def _bounds(self, pair: Pair) -> list[float]:
        return [self.descents[name].certificate.bound for name in pair]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes star.json and a folder with the descent of each network.

        Args:
            folder: a new one.

        Raises:
            ModeconnError: it exists, or cannot be written.
        """
        target = Path(folder).expanduser().resolve()
        if target.exists():
            raise ModeconnError(f"{folder} exists: expected the name of a new folder")
        if not target.parent.is_dir():
            raise ModeconnError(f"{folder}: cannot be written: there is no folder {target.parent}")
        temporary = temporary_of(target)
        with locked(target):
            sweep(target)
            try:
                temporary.mkdir()
                for name, descent in self.descents.items():
                    descent.save(temporary / name)
                text = json.dumps(plain(self.to_dict()), indent=1, allow_nan=False) + "\n"
                atomic_write(temporary / CONTENT, lambda stream: stream.write(text.encode()))
                temporary.rename(target)
            except OSError as error:
                reason = error.strerror or error
                raise SystemFailure(f"{folder}: cannot be written: {reason}") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Star:
        """Reads what `save` wrote; its claims are for `verify` to check, pair by pair.

        Raises:
            ModeconnError: something is missing or damaged.
        """
        where = Path(folder).expanduser()
        try:
            content = json.loads((where / CONTENT).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModeconnError(
                f"{folder}: no star of connections: {CONTENT} cannot be read ({error.strerror})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ModeconnError(f"{where / CONTENT}: truncated or damaged: {error}") from error
        try:
            names, joins = _read(content)
            model, details = content["model"], dict(content["details"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModeconnError(f"{where / CONTENT} is damaged: {error!r}") from error
        descents = {name: Connection.load(where / name) for name in names}
        return Star(descents, joins, model, details)

    def __str__(self) -> str:
        count, pairs = len(self.descents), len(self.pairs)
        samples = next(iter(self.descents.values())).certificate.samples
        error = f"{100 * self.error_bound:.3g} %"
        title = f"{count} networks, {pairs} pairs: loss at most {self.bound:.4g}, error at most"
        lines = [f"{title} {error} on {samples:,} samples"]
        for name, descent in self.descents.items():
            found = descent.certificate
            where = found.labels[found.worst].replace(" of a", f" of {name}")
            bound = f"loss at most {found.bound:.4g}, at {name if where == 'a' else where}"
            lines.append(f"{name}: {found.losses[0]:.4g} itself; on its descent {bound}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Star({', '.join(self.names)}; bound={self.bound:.4g})"


def is_star(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a star rather than a connection."""
    return (Path(folder).expanduser() / CONTENT).is_file()


def _read(content: Any) -> tuple[list[str], dict[Pair, Join]]:
    """Reads names and joins from what JSON holds; names are folders and must look like it."""
    if content["format"] != FORMAT:
        raise ValueError(f"format is {content['format']!r}, expected {FORMAT!r}")
    names = [str(name) for name in content["networks"]]
    for name in names:
        if not name.isalnum():
            raise ValueError(f"{name!r} is no name of a network")
    joins = {}
    for item in content["joins"]:
        first, second = item["pair"]
        moved = tuple(str(key) for key in item["moved"])
        joins[str(first), str(second)] = Join(moved, str(item["evidence"]))
    return names, joins


# -- certificates of pairs -------------------------------------------------------------------------


def _composed(down: Certificate, join: Join, up: Certificate) -> Certificate:
    """Puts together the certificate of a pair from those of its descents.

    Nothing is measured again: the losses at all breakpoints are known, and the join is a rewrite.
    """
    count, at = len(down.segments) + 1 + len(up.segments), len(down.segments)
    errors = (down.errors[-1], up.errors[-1])
    start, end = at / count, (at + 1) / count
    middle = replace(
        down.segments[-1],
        kind=REWRITE,
        start=start,
        end=end,
        moved=join.moved,
        losses=(down.losses[-1], up.losses[-1]),
        errors=errors,
        max_error=max(errors),
        max_error_at=start if errors[0] >= errors[1] else end,
        evidence=join.evidence,
    )
    segments = [
        *(_moved(segment, k, count, False) for k, segment in enumerate(down.segments)),
        middle,
        *(_moved(each, k, count, True) for k, each in enumerate(reversed(up.segments), at + 1)),
    ]
    labels = [*down.labels, *(_of_b(label) for label in reversed(up.labels))]
    if up.labels[-1].startswith("S_0 of"):
        labels[at + 1] = "S_0 in b"
    return Certificate.of(
        segments,
        labels,
        down.samples,
        down.digest,
        down.target,
        down.loss,
        _rounding(down, up),
    )


def _of_b(label: str) -> str:
    """Returns the label of a breakpoint in a descent of b, which calls its own network a."""
    return "b" if label == "a" else label.replace(" of a", " of b").replace(" in a", " in b")


def _rounding(down: Certificate, up: Certificate) -> Rounding | None:
    """Returns how far rounding lifts the larger bounds of two descents."""
    if down.rounding is None or up.rounding is None:
        return None
    losses, errors = (down.bound, up.bound), (down.error_bound, up.error_bound)
    parts = down.rounding, up.rounding
    return Rounding(
        loss_float64=_lift(losses, [part.loss_float64 for part in parts]),
        loss_float32=_lift(losses, [part.loss_float32 for part in parts]),
        error_float64=_lift(errors, [part.error_float64 for part in parts]),
        error_float32=_lift(errors, [part.error_float32 for part in parts]),
    )


def _lift(bounds: Sequence[float], lifts: Sequence[float]) -> float:
    """Returns how far the largest of bounds and their lifts together is above the largest bound."""
    if any(map(math.isnan, lifts)):
        return math.nan
    highest = max(bounds)
    return max(0.0, *(lift - (highest - bound) for bound, lift in zip(bounds, lifts)))


def _moved(segment: Segment, k: int, count: int, backwards: bool) -> Segment:
    """Returns a descent's segment as segment k of a longer path, walked backwards or not."""
    start, end = k / count, (k + 1) / count
    part = (segment.max_error_at - segment.start) / (segment.end - segment.start)
    part = 1 - part if backwards else part
    losses, errors = segment.losses, segment.errors
    return replace(
        segment,
        start=start,
        end=end,
        losses=losses[::-1] if backwards else losses,
        errors=errors[::-1] if backwards else errors,
        max_error_at=start + part * (end - start),
    )
