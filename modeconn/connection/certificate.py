"""Certificates: proved bounds on the loss and error of a whole path, and what they rest on.

On a rewrite or shift the network's function does not change; on a swing the logits are affine in t,
so the loss, convex in the logits, stays below its chord (Nguyen, Bréchet, Mondelli 2021, proof of
Theorem 4.1). So the largest loss of the whole continuum is attained at a breakpoint. The error is
not convex, but known exactly (swing.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from modeconn.connection.segment_kinds import KINDS, SWING
from modeconn.errors import ModeconnError

FORMAT = "modeconn.Certificate/1"
# JSON has no numbers that are not finite: they are written as text.
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class FalseCertificate(ModeconnError):
    """Raised where a certificate says what its breakpoints and the data do not bear out."""


class Outcome(Enum):
    """The verdict of a certificate; its text says what to do."""

    CERTIFIED = "certified: on the whole path the loss stays at or below the bound"
    ENDS = (
        "certified: the end points themselves make the bound, "
        "so no path between them has a lower one; "
        "a lower one needs better end points"
    )
    SUBNETWORK = (
        "target not met: a subnetwork makes the bound; train it longer, "
        "give it more or other kept units, or more hidden units or layers"
    )
    ABOVE_ENDS = (
        "target not met: an end point makes the bound, and no path is below its own ends; "
        "train that network further, or ask for no less than its loss"
    )
    UNDECIDED = (
        "undecided: the loss is not finite at a breakpoint; "
        "look for weights or inputs that are too large"
    )


@dataclass(frozen=True)
class Segment:
    """One linear piece of the path, with its largest loss and error.

    Attributes:
        kind: "rewrite", "swing" or "shift".
        start, end: t at its ends.
        moved: keys of the parameters and buffers that differ between them.
        losses, errors: at the two ends: mean cross-entropy, and fraction of samples.
        max_error: the exact largest error on the segment; max_error_at: a t where it is attained.
        evidence: the reason for the kind, from the weights.
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


@dataclass(frozen=True)
class Certificate:
    """Proved bounds on the loss and the 0-1 error along a whole path, for one data set.

    Attributes:
        bound: the largest mean cross-entropy on the path; it is attained at a breakpoint.
        error_bound: the largest fraction of misclassified samples on the path, exact.
        losses, errors: float64, at the S + 1 breakpoints.
        labels: what each breakpoint is, such as "S_3 of a".
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
        """Puts segments together; labels default to numbers.

        Raises:
            ModeconnError: there are no segments, or not one label per breakpoint; a target that is
                not finite.
        """
        if target is not None and not math.isfinite(target):
            raise ModeconnError(f"target is {target}: expected a finite loss, or None")
        if not segments:
            raise ModeconnError("segments is empty: expected at least one for a certificate")
        count = len(segments) + 1
        if labels is None:
            labels = ["a", *(f"breakpoint {k}" for k in range(1, count - 1)), "b"]
        if len(labels) != count:
            raise ModeconnError(
                f"labels: got {len(labels)}, expected one for each of the {count} breakpoints"
            )
        losses = (segments[0].losses[0], *(segment.losses[1] for segment in segments))
        errors = (segments[0].errors[0], *(segment.errors[1] for segment in segments))
        return Certificate(
            bound=_largest(losses),
            error_bound=_largest([segment.max_error for segment in segments]),
            losses=losses,
            errors=errors,
            labels=tuple(labels),
            segments=tuple(segments),
            samples=samples,
            digest=digest,
            target=target,
        )

    @property
    def worst(self) -> int:
        """The number of the breakpoint that makes the bound; an end point where they tie."""
        last = len(self.losses) - 1
        bad = [k for k, loss in enumerate(self.losses) if not math.isfinite(loss)]
        at = bad or [k for k, loss in enumerate(self.losses) if loss == max(self.losses)]
        return next((k for k in at if k in (0, last)), at[0])

    @property
    def outcome(self) -> Outcome:
        """The verdict: whether there is a bound, whether it meets the target, what makes it."""
        if not math.isfinite(self.bound):
            return Outcome.UNDECIDED
        at_end = self.worst in (0, len(self.losses) - 1)
        if self.target is not None and self.bound > self.target:
            return Outcome.ABOVE_ENDS if at_end else Outcome.SUBNETWORK
        return Outcome.ENDS if at_end else Outcome.CERTIFIED

    @property
    def advice(self) -> str:
        """The outcome's text, followed by the breakpoint that makes the bound."""
        target = "" if self.target is None else f", target {self.target:.4g}"
        where = (
            f"loss {self.bound:.4g} at breakpoint {self.worst} ({self.labels[self.worst]}){target}"
        )
        return f"{self.outcome.value}: {where}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; "nan", "inf" and "-inf" are numbers that are not finite."""
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
        """Reads what `to_dict` wrote, as it stands: whether it is true is for `verify` to say.

        Raises:
            ModeconnError: something is missing or of another kind than it should be.
        """
        try:
            return _certificate(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModeconnError(f"not a certificate: {type(error).__name__}: {error}") from error

    def check_own_numbers(self) -> None:
        """Raises FalseCertificate where its own numbers do not fit together."""
        count = len(self.segments) + 1
        if not count == len(self.losses) == len(self.errors) == len(self.labels):
            raise FalseCertificate(
                f"the certificate has {count - 1} segments, but {len(self.losses)} losses, "
                f"{len(self.errors)} errors and {len(self.labels)} labels: "
                f"expected {count} of each"
            )
        for k, segment in enumerate(self.segments):
            losses_fit = _all_equal(self.losses[k : k + 2], segment.losses)
            if not (losses_fit and _all_equal(self.errors[k : k + 2], segment.errors)):
                raise FalseCertificate(
                    f"segment {k} says other losses or errors of its ends than the breakpoints'"
                )
            if segment.max_error < max(segment.errors):
                raise FalseCertificate(
                    f"segment {k}: largest error {segment.max_error:.6g} is below that of its end, "
                    f"{max(segment.errors):.6g}"
                )
        _check_largest("bound", self.bound, self.losses)
        _check_largest("error bound", self.error_bound, [s.max_error for s in self.segments])

    def __str__(self) -> str:
        summary = (
            f"loss at most {self.bound:.4g} and error at most {100 * self.error_bound:.3g} % "
            f"on the whole path, {len(self.segments)} segments, {self.samples:,} samples"
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
        return "\n".join([summary, self.advice, "", *_columns(rows)])


def plain(value: Any) -> Any:
    """Returns the JSON values of nested dicts, lists and tuples, numpy numbers included.

    Floats that are not finite become text.

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
        return value if math.isfinite(value) else _name_of(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise ModeconnError(
        f"a value of type {type(value).__name__} cannot be written as JSON: "
        "expected numbers, text, lists and dicts"
    )


def _name_of(value: float) -> str:
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns cells in columns, flush right; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows)][:-1]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


def _largest(values: Sequence[float]) -> float:
    """Returns the largest value; NaN if one is NaN."""
    return math.nan if any(math.isnan(value) for value in values) else float(max(values))


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _all_equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(map(_equal, a, b))


def _check_largest(name: str, said: float, own: Sequence[float]) -> None:
    if not _equal(said, _largest(own)):
        raise FalseCertificate(
            f"the certificate's {name} is {said:.6g}, "
            f"and the largest of its own values is {_largest(own):.6g}"
        )


# -- reading what JSON holds -----------------------------------------------------------------------


def _certificate(content: Mapping[str, Any]) -> Certificate:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
    segments = tuple(_segment(item) for item in _array(content["segments"]))
    count = len(segments) + 1
    losses, errors = _numbers(content["losses"], count), _numbers(content["errors"], count)
    labels = tuple(_text(item) for item in _array(content["labels"], count))
    target = None if content["target"] is None else _number(content["target"])
    samples = content["samples"]
    whole = isinstance(samples, int) and not isinstance(samples, bool)
    if not whole or samples < 1 or not segments:
        raise ValueError(
            f"samples is {samples!r}, segments are {len(segments)}: expected at least one of each"
        )
    return Certificate(
        bound=_number(content["bound"]),
        error_bound=_number(content["error_bound"]),
        losses=losses,
        errors=errors,
        labels=labels,
        segments=segments,
        samples=samples,
        digest=_text(content["digest"]),
        target=target,
    )


def _segment(content: Mapping[str, Any]) -> Segment:
    unknown = set(content) - {item.name for item in fields(Segment)}
    if unknown:
        raise ValueError(f"a segment has {sorted(unknown)}, which is no field of one")
    if content["kind"] not in KINDS:
        raise ValueError(f"segment kind {content['kind']!r}, expected one of {', '.join(KINDS)}")
    loss, next_loss = _numbers(content["losses"], 2)
    error, next_error = _numbers(content["errors"], 2)
    return Segment(
        kind=content["kind"],
        start=_number(content["start"]),
        end=_number(content["end"]),
        moved=tuple(_text(key) for key in _array(content["moved"])),
        losses=(loss, next_loss),
        errors=(error, next_error),
        max_error=_number(content["max_error"]),
        max_error_at=_number(content["max_error_at"]),
        evidence=_text(content["evidence"]),
    )


def _array(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
        expected = "some" if count is None else count
        raise ValueError(f"a list of {expected} values was expected, got {got}")
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
