"""Certificates: proved bounds on the loss and error of a whole path, and what they rest on.

On a rewrite or shift the network's function does not change; on a swing the logits are affine in t,
so the loss, convex in the logits, stays below its chord (Nguyen, Bréchet, Mondelli 2021, proof of
Theorem 4.1). So the largest loss of the whole continuum is attained at a breakpoint. The error is
not convex, but known exactly (swing.py). Both are computed, and so is how far rounding can lift
them (rounding.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from modeconn.connection.json_values import array, number, numbers, plain, text
from modeconn.connection.outcome import Outcome
from modeconn.connection.segment_kinds import KINDS, SWING
from modeconn.errors import ModeconnError

FORMAT = "modeconn.Certificate/2"
# Certificates of this format were computed in float32, and say nothing of rounding.
_EARLIER = "modeconn.Certificate/1"
# A bound on rounding's part of a loss that says nothing of it.
_USELESS = 10.0
# Fields that say how a certificate was verified, and are not part of it.
_OF_VERIFY = ("same_data", "checked", "test")


class FalseCertificate(ModeconnError):
    """Raised where a certificate says what its breakpoints and the data do not bear out."""


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
class Rounding:
    """Bounds how far rounding can lift loss and error above their bounds, to first order.

    A loss computed in float32 along the path is at most the bound plus `loss_float32`, whatever the
    order of additions; inf where nothing is bounded.

    Attributes:
        loss_float64, loss_float32: for evaluations in float64, as the certificate's own, and in
            float32.
        error_float64, error_float32: fractions of the samples; NaN where there is no error.
    """

    loss_float64: float
    loss_float32: float
    error_float64: float
    error_float32: float

    @property
    def short(self) -> str:
        """Says how far the loss can be lifted, in a few words."""
        known = self.loss_float32 < _USELESS
        in_float32 = f"{self.loss_float32:.2g}" if known else "unknown"
        return f"+{self.loss_float64:.2g} in float64, +{in_float32} in float32"

    def __str__(self) -> str:
        def added(loss: float, error: float) -> str:
            part = "" if math.isnan(error) else f" and {100 * error:.2g} % to the error"
            return f"{loss:.2g} to the loss{part}"

        lines = f"rounding adds at most {added(self.loss_float64, self.error_float64)} in float64"
        if self.loss_float32 >= _USELESS:
            return f"{lines}; nothing useful is known of float32"
        return f"{lines}, {added(self.loss_float32, self.error_float32)} in float32"


@dataclass(frozen=True)
class Certificate:
    """Proved bounds on the loss and the 0-1 error along a whole path, for one data set.

    Attributes:
        bound: the largest mean loss on the path; it is attained at a breakpoint.
        error_bound: the largest fraction of misclassified samples on the path, exact.
        losses, errors: float64, at the S + 1 breakpoints.
        labels: what each breakpoint is, such as "S_3 of a".
        segments: the S linear pieces.
        samples: in the data. digest: of the data (SHA-256 of inputs and targets as computed with,
            in their order).
        target: what the loss should not exceed, if that was asked.
        loss: names the loss, its options included.
        rounding: how far rounding can exceed the bounds; None where that is not known.
        same_data: False where `verify` was given other data than the main certificate was made
            from: then nothing stored was compared.
        checked: what `verify` compared, and what it could not, a line each.
        test: of `verify`, the certificate of the test data that were given; else None.
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
    loss: str = "cross_entropy"
    rounding: Rounding | None = None
    same_data: bool = field(default=True, compare=False)
    checked: tuple[str, ...] = field(default=(), compare=False)
    test: Certificate | None = field(default=None, compare=False)

    @staticmethod
    def of(
        segments: Sequence[Segment],
        labels: Sequence[str] | None,
        samples: int,
        digest: str,
        target: float | None = None,
        loss: str = "cross_entropy",
        rounding: Rounding | None = None,
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
            labels = [plain_label(k, count - 1) for k in range(count)]
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
            loss=loss,
            rounding=rounding,
        )

    @property
    def worst(self) -> int:
        """The number of the breakpoint that makes the bound; an end point where they tie."""
        last = len(self.losses) - 1
        bad = [k for k, loss in enumerate(self.losses) if not math.isfinite(loss)]
        at = bad or [k for k, loss in enumerate(self.losses) if loss == max(self.losses)]
        return next((k for k in at if k in (0, last)), at[0])

    @property
    def _lift(self) -> float:
        """Returns how far the exact bound can be above the computed one."""
        return 0.0 if self.rounding is None else self.rounding.loss_float64

    @property
    def outcome(self) -> Outcome:
        """The verdict: whether there is a bound, whether it meets the target, what makes it."""
        if not math.isfinite(self.bound):
            return Outcome.UNDECIDED
        at_end = self.worst in (0, len(self.losses) - 1)
        if self.target is not None and not self.bound + self._lift <= self.target:
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

    @property
    def summary(self) -> str:
        """The bounds, and those on rounding, in two lines."""
        error = _error_text(self.error_bound)
        rounding = "rounding is not bounded" if self.rounding is None else str(self.rounding)
        return (
            f"loss at most {self.bound:.4g}{error} on the whole path, "
            f"{len(self.segments)} segments, {self.samples:,} samples\n{rounding}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; "nan", "inf" and "-inf" are numbers that are not finite."""
        content = asdict(replace(self, test=None))
        for name in _OF_VERIFY:
            del content[name]
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
            ModeconnError: something is missing or of another kind than it should be, or the outcome
                is not that of the numbers.
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
            if not _is_largest(segment.max_error, segment.errors):
                raise FalseCertificate(
                    f"segment {k}: largest error {segment.max_error:.6g} is below that of its end, "
                    f"{max(segment.errors):.6g}"
                )
        _check_largest("bound", self.bound, self.losses)
        _check_largest("error bound", self.error_bound, [s.max_error for s in self.segments])

    def __str__(self) -> str:
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
        return "\n".join([self.summary, self.advice, "", *_columns(rows)])


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


def _is_largest(largest: float, values: Sequence[float]) -> bool:
    """Whether no value is larger; NaN stands for an error that there is none of, in all alike."""
    if all(map(math.isnan, (largest, *values))):
        return True
    return all(largest >= value for value in values)


def _all_equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(map(_equal, a, b))


def _check_largest(name: str, said: float, own: Sequence[float]) -> None:
    if not _equal(said, _largest(own)):
        raise FalseCertificate(
            f"the certificate's {name} is {said:.6g}, "
            f"and the largest of its own values is {_largest(own):.6g}"
        )


def _error_text(error: float) -> str:
    return "" if math.isnan(error) else f" and error at most {100 * error:.3g} %"


def plain_label(k: int, last: int) -> str:
    """Returns the label of breakpoint k where nothing else is known of it."""
    return {0: "a", last: "b"}.get(k, f"breakpoint {k}")


# -- reading what JSON holds -----------------------------------------------------------------------


def _certificate(content: Mapping[str, Any]) -> Certificate:
    if content["format"] not in (FORMAT, _EARLIER):
        raise ValueError(f"format {content['format']!r}, expected {FORMAT!r} or {_EARLIER!r}")
    earlier = content["format"] == _EARLIER
    segments = tuple(_segment(item) for item in array(content["segments"]))
    count = len(segments) + 1
    losses, errors = numbers(content["losses"], count), numbers(content["errors"], count)
    labels = tuple(text(item) for item in array(content["labels"], count))
    target = None if content["target"] is None else number(content["target"])
    if target is not None and not math.isfinite(target):
        raise ValueError(f"target is {target}")
    samples = content["samples"]
    whole = isinstance(samples, int) and not isinstance(samples, bool)
    if not whole or samples < 1 or not segments:
        raise ValueError(
            f"samples is {samples!r}, segments are {len(segments)}: expected at least one of each"
        )
    found = Certificate(
        bound=number(content["bound"]),
        error_bound=number(content["error_bound"]),
        losses=losses,
        errors=errors,
        labels=labels,
        segments=segments,
        samples=samples,
        digest=text(content["digest"]),
        target=target,
        loss="cross_entropy" if earlier else text(content["loss"]),
        rounding=None if earlier else _rounding(content["rounding"]),
    )
    if content.get("outcome", own := found.outcome.name.lower()) != own:
        raise ValueError(f"the outcome is {content['outcome']!r}, and its numbers say {own!r}")
    return found


def _rounding(content: Mapping[str, Any] | None) -> Rounding | None:
    if content is None:
        return None
    names = [item.name for item in fields(Rounding)]
    if sorted(content) != sorted(names):
        raise ValueError(f"rounding has {sorted(content)}, expected {names}")
    return Rounding(**{name: number(content[name]) for name in names})


def _segment(content: Mapping[str, Any]) -> Segment:
    unknown = set(content) - {item.name for item in fields(Segment)}
    if unknown:
        raise ValueError(f"a segment has {sorted(unknown)}, which is no field of one")
    if content["kind"] not in KINDS:
        raise ValueError(f"segment kind {content['kind']!r}, expected one of {', '.join(KINDS)}")
    loss, next_loss = numbers(content["losses"], 2)
    error, next_error = numbers(content["errors"], 2)
    return Segment(
        kind=content["kind"],
        start=number(content["start"]),
        end=number(content["end"]),
        moved=tuple(text(key) for key in array(content["moved"])),
        losses=(loss, next_loss),
        errors=(error, next_error),
        max_error=number(content["max_error"]),
        max_error_at=number(content["max_error_at"]),
        evidence=text(content["evidence"]),
    )
