"""What is proved of a path: its largest loss and error, from its breakpoints, with what the proof rests on.

On a rewrite or shift the network's function does not change; on a swing the logits are affine in t,
so the loss, convex in the logits, stays below its chord. So the largest loss of the whole continuum
is attained at a breakpoint. The error is not convex, but known exactly (swing.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from modeconn.connection.structure import KINDS, SWING
from modeconn.errors import ModeconnError

FORMAT = "modeconn.Certificate/1"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class FalseCertificate(ModeconnError):
    """A certificate says something that its breakpoints and the data do not bear out."""


class Outcome(Enum):
    """What a certificate comes to; the text says what to do."""

    CERTIFIED = "certified: on the whole path the loss stays at or below the bound"
    ENDS = (
        "certified: the end points themselves make the bound, so no path between them has a lower one; "
        "a lower one needs better end points"
    )
    SUBNETWORK = (
        "target not met: a subnetwork makes the bound; train it longer, give it more or other kept units, "
        "or more hidden units or layers"
    )
    ABOVE_ENDS = (
        "target not met: an end point makes the bound, and no path is below its own ends; "
        "train that network further, or ask for no less than its loss"
    )
    UNDECIDED = "undecided: the loss is not finite at a breakpoint; look for weights or inputs that are too large"

    @property
    def met(self) -> bool:
        """Whether there is a finite bound, at or below the target if one was given."""
        return self in (Outcome.CERTIFIED, Outcome.ENDS)


@dataclass(frozen=True)
class Segment:
    """One linear piece of the path, with its largest loss and error.

    Attributes:
        kind: "rewrite", "swing" or "shift".
        start, end: t at its ends.
        moved: keys of the entries that differ between them.
        losses, errors: at the two ends: mean cross-entropy, and fraction of samples.
        max_error: the exact largest error on the segment; max_error_at: a t where it is attained.
        evidence: why the kind is what it is, from the weights.
    """

    kind: str
    start: float
    end: float
    moved: tuple[str, ...]
    losses: tuple[float, float]
    errors: tuple[float, float]
    max_error: float
    max_error_at: float
    evidence: str

    @property
    def max_loss(self) -> float:
        """The largest loss on the segment: that of one of its ends. NaN where either is NaN."""
        return _largest(self.losses)


@dataclass(frozen=True)
class Certificate:
    """Proved bounds on the loss and the 0-1 error along a whole path, for one data set.

    Attributes:
        bound: the largest mean cross-entropy on the path; it is attained at a breakpoint.
        error_bound: the largest fraction of misclassified samples on the path, exact.
        losses, errors: float64, at the S + 1 breakpoints.
        labels: what each breakpoint is.
        segments: the S linear pieces.
        samples: in the data. digest: of the data (SHA-256 of inputs and targets as computed with,
            in their order).
        target: what the loss should not exceed, if that was asked.
        same_data: False where `verify` was given other data than the stored certificates were made
            from.
    """

    bound: float
    error_bound: float
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    labels: tuple[str, ...]
    segments: tuple[Segment, ...]
    samples: int
    digest: str
    target: float | None = None
    same_data: bool = field(default=True, compare=False)

    @staticmethod
    def of(
        segments: Sequence[Segment],
        labels: Sequence[str] | None,
        samples: int,
        digest: str,
        target: float | None = None,
    ) -> Certificate:
        """The certificate that the segments make; labels default to numbers.

        Raises:
            ModeconnError: there are no segments, or not one label per breakpoint; a target that is
                not finite.
        """
        if target is not None and not math.isfinite(target):
            raise ModeconnError(f"target is {target}: expected a finite loss, or None")
        if not segments:
            raise ModeconnError("a certificate needs at least one segment")
        count = len(segments) + 1
        if labels is None:
            labels = ["a", *(f"breakpoint {k}" for k in range(1, count - 1)), "b"]
        if len(labels) != count:
            raise ModeconnError(
                f"labels: got {len(labels)}, expected one for each of the {count} breakpoints"
            )
        losses = (segments[0].losses[0], *(segment.losses[1] for segment in segments))
        errors = (segments[0].errors[0], *(segment.errors[1] for segment in segments))
        bound, error_bound = _largest(losses), _largest([segment.max_error for segment in segments])
        return Certificate(
            bound,
            error_bound,
            losses,
            errors,
            tuple(labels),
            tuple(segments),
            samples,
            digest,
            target,
        )

    @property
    def worst(self) -> int:
        """The breakpoint that makes the bound, by number; an end point where it ties with one."""
        last = len(self.losses) - 1
        bad = [k for k, loss in enumerate(self.losses) if not math.isfinite(loss)]
        at = bad or [k for k, loss in enumerate(self.losses) if loss == max(self.losses)]
        return next((k for k in at if k in (0, last)), at[0])

    @property
    def outcome(self) -> Outcome:
        """What it comes to."""
        if not math.isfinite(self.bound):
            return Outcome.UNDECIDED
        at_end = self.worst in (0, len(self.losses) - 1)
        if self.target is not None and self.bound > self.target:
            return Outcome.ABOVE_ENDS if at_end else Outcome.SUBNETWORK
        return Outcome.ENDS if at_end else Outcome.CERTIFIED

    @property
    def advice(self) -> str:
        """The outcome's text, with the breakpoint that makes the bound."""
        target = "" if self.target is None else f", target {self.target:.4g}"
        where = (
            f"loss {self.bound:.4g} at breakpoint {self.worst} ({self.labels[self.worst]}){target}"
        )
        return f"{self.outcome.value}: {where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite are the strings "nan", "inf" and "-inf"."""
        content = asdict(self)
        del content["same_data"]
        return {
            "format": FORMAT,
            **plain(content),
            "outcome": self.outcome.name.lower(),
            "advice": self.advice,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Certificate:
        """The certificate that `to_dict` wrote, as it stands: whether it is true is for `verify` to say.

        Raises:
            ModeconnError: something is missing or of another kind than it should be.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
            segments = tuple(_segment(item) for item in _array(content["segments"]))
            count = len(segments) + 1
            losses, errors = (_numbers(content[name], count) for name in ("losses", "errors"))
            labels = tuple(_text(item) for item in _array(content["labels"], count))
            target = None if content["target"] is None else _number(content["target"])
            samples = content["samples"]
            if (
                not isinstance(samples, int)
                or isinstance(samples, bool)
                or samples < 1
                or not segments
            ):
                raise ValueError(
                    f"samples is {samples!r}, segments are {len(segments)}: expected at least one of each"
                )
            bound, error_bound = _number(content["bound"]), _number(content["error_bound"])
            return Certificate(
                bound,
                error_bound,
                losses,
                errors,
                labels,
                segments,
                samples,
                _text(content["digest"]),
                target,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModeconnError(f"not a certificate: {type(error).__name__}: {error}") from error

    def check_own_numbers(self) -> None:
        """Raise FalseCertificate where its own numbers do not fit together."""
        count = len(self.segments) + 1
        if not count == len(self.losses) == len(self.errors) == len(self.labels):
            raise FalseCertificate(
                f"the certificate has {count - 1} segments, but {len(self.losses)} losses, {len(self.errors)} errors and "
                f"{len(self.labels)} labels: expected {count} of each"
            )
        for k, segment in enumerate(self.segments):
            ends = (self.losses[k : k + 2], self.errors[k : k + 2])
            if not all(
                _equal(a, b)
                for pair in zip(ends, (segment.losses, segment.errors))
                for a, b in zip(*pair)
            ):
                raise FalseCertificate(
                    f"segment {k} says other losses or errors of its ends than the breakpoints'"
                )
            if segment.max_error < max(segment.errors):
                raise FalseCertificate(
                    f"segment {k}: largest error {segment.max_error:.6g} is below that of its end, {max(segment.errors):.6g}"
                )
        errors = [segment.max_error for segment in self.segments]
        for name, said, own in (
            ("bound", self.bound, self.losses),
            ("error bound", self.error_bound, errors),
        ):
            if not _equal(said, _largest(own)):
                raise FalseCertificate(
                    f"the certificate's {name} is {said:.6g}, and the largest of its own values is {_largest(own):.6g}"
                )

    def __str__(self) -> str:
        head = (
            f"loss at most {self.bound:.4g} and error at most {100 * self.error_bound:.3g} % on the whole path, "
            f"{len(self.segments)} segments, {self.samples:,} samples"
        )
        rows = [["segment", "kind", "loss", "error %", "largest error %", "ends at"]]
        first = f"{self.losses[0]:.4g}", f"{100 * self.errors[0]:.3g}"
        rows.append(["", "", *first, "", self.labels[0]])
        for k, segment in enumerate(self.segments):
            mark = " <- bound" if self.worst == k + 1 else ""
            loss, error = f"{segment.losses[1]:.4g}", f"{100 * segment.errors[1]:.3g}"
            largest = f"{100 * segment.max_error:.3g}" if segment.kind == SWING else ""
            rows.append([str(k), segment.kind, loss, error, largest, self.labels[k + 1] + mark])
        if self.worst == 0:
            rows[1][-1] += " <- bound"
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join([*(f"{cell:>{w}}" for cell, w in zip(row, widths)), row[-1]]).rstrip()
            for row in rows
        ]
        return "\n".join([head, self.advice, "", *lines])


def plain(value: Any) -> Any:
    """JSON values of nested dicts, lists and tuples, numpy numbers included; non-finite floats become text.

    Raises:
        ModeconnError: something that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    if isinstance(value, float):
        return (
            value
            if math.isfinite(value)
            else "nan"
            if math.isnan(value)
            else "inf"
            if value > 0
            else "-inf"
        )
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise ModeconnError(f"a value of type {type(value).__name__} cannot be written as JSON")


def _largest(values: Sequence[float]) -> float:
    """The largest value; NaN if one is NaN."""
    return math.nan if any(math.isnan(value) for value in values) else float(max(values))


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _segment(content: Mapping[str, Any]) -> Segment:
    unknown = set(content) - {item.name for item in fields(Segment)}
    if unknown:
        raise ValueError(f"a segment has {sorted(unknown)}, which is no field of one")
    if content["kind"] not in KINDS:
        raise ValueError(f"segment kind {content['kind']!r}, expected one of {', '.join(KINDS)}")
    (loss, next_loss), (error, next_error) = (
        _numbers(content[name], 2) for name in ("losses", "errors")
    )
    numbers = [_number(content[name]) for name in ("start", "end", "max_error", "max_error_at")]
    return Segment(
        content["kind"],
        numbers[0],
        numbers[1],
        tuple(_text(key) for key in _array(content["moved"])),
        (loss, next_loss),
        (error, next_error),
        numbers[2],
        numbers[3],
        _text(content["evidence"]),
    )


def _array(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(
            f"a list of {'some' if count is None else count} values was expected, got {got}"
        )
    return list(value)


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    return tuple(_number(item) for item in _array(value, count))


def _number(value: Any) -> float:
    if isinstance(value, str):
        return _SPECIAL[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
