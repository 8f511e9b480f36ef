"""Compares what is said about a path with what its weights and the data say.

Numbers may differ by what rounding can explain, which is computed, and by nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modeconn import models
from modeconn.connection.certificate import (
    Certificate,
    FalseCertificate,
    Rounding,
    Segment,
    plain_label,
)
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.local_rounding import live_units
from modeconn.connection.measurement import MeasuredPath
from modeconn.connection.segment_kinds import Evidence
from modeconn.errors import ModeconnError
from modeconn.parameters.paths import PolyChain
from modeconn.parameters.state import State

# t at the ends of a segment are quotients of small integers.
_T_TOLERANCE = 1e-12
# Certificates of the first format were made in float32, which moves a few samples whose two largest
# logits tie to rounding.
_EARLIER_ERRORS = 1e-4  # fraction of the samples
# Their losses are off by less, whatever the bound on rounding is.
_EARLIER_LOSS = 1e-3
# Where nothing is known of rounding, float64 sums of other machines may differ by this much.
_UNBOUNDED = 1e-9
# Bounds on rounding are computed themselves: in float32, and in another order elsewhere.
_ROUNDING_TOLERANCE = 1e-2
_LABEL = re.compile(r"S_(\d{1,6}) (?:of|in) ([ab])(?:, twins|, shifted)?")


def check_kinds(
    kinds: Sequence[str], evidence: Sequence[Evidence], error: type[ModeconnError]
) -> None:
    """Raises where the weights of a segment do not bear out the kind that it is said to have."""
    if len(kinds) != len(evidence):
        raise error(
            f"kinds: got {len(kinds)}, expected one for each of the {len(evidence)} segments"
        )
    for k, (kind, found) in enumerate(zip(kinds, evidence)):
        if not found.supports(kind):
            raise error(
                f"segment {k} is said to be a {kind}, "
                f"and its weights say {found.kind}: {found.text}"
            )


def check_structure(certificate: Certificate, evidence: Sequence[Evidence]) -> None:
    """Raises where a certificate's segments are not those of the path, whatever the data."""
    certificate.check_own_numbers()
    count = len(evidence)
    if len(certificate.segments) != count:
        raise FalseCertificate(
            f"the certificate has {len(certificate.segments)} segments, the path {count}"
        )
    check_kinds([segment.kind for segment in certificate.segments], evidence, FalseCertificate)
    for k, (segment, found) in enumerate(zip(certificate.segments, evidence)):
        if sorted(segment.moved) != sorted(found.moved):
            raise FalseCertificate(
                f"segment {k} is said to move {', '.join(segment.moved) or 'nothing'}; "
                f"it moves {', '.join(found.moved) or 'nothing'}"
            )
        start, end = k / count, (k + 1) / count
        ends_fit = _close(segment.start, start, _T_TOLERANCE)
        if not (ends_fit and _close(segment.end, end, _T_TOLERANCE)):
            raise FalseCertificate(
                f"segment {k} is said to go from t = {segment.start:.6g} to {segment.end:.6g}; "
                f"it goes from {start:.6g} to {end:.6g}"
            )
        if segment.evidence != found.text:
            raise FalseCertificate(
                f"segment {k}: the evidence is said to be {segment.evidence!r}; "
                f"the weights say {found.text!r}"
            )
        if not start - _T_TOLERANCE <= segment.max_error_at <= end + _T_TOLERANCE:
            raise FalseCertificate(
                f"segment {k}: the largest error is said to be at t = {segment.max_error_at:.6g}, "
                f"which is not on it"
            )


def check_numbers(stored: Certificate, found: Certificate, measured: MeasuredPath) -> None:
    """Raises where a certificate's numbers are not those of the data that it was made from."""
    if stored.samples != found.samples:
        raise FalseCertificate(
            f"the certificate says {stored.samples:,} samples, the data have {found.samples:,}"
        )
    if stored.loss != found.loss:
        raise FalseCertificate(
            f"the certificate is of the loss {stored.loss}, and verified is {found.loss}"
        )
    for k, (said, own) in enumerate(zip(stored.losses, found.losses)):
        if not _close(said, own, _allowed_loss(stored, measured, k)):
            raise FalseCertificate(
                f"the loss at breakpoint {k} is said to be {said:.12g}, and is {own:.12g}"
            )
    tallied = measured.tallied
    earlier = stored.rounding is None and found.rounding is not None
    for k, (said, own) in enumerate(zip(stored.errors, found.errors)):
        if not _within(earlier, said, tallied.error_range(k)):
            raise FalseCertificate(
                f"the error at breakpoint {k} is said to be {said:.8g}, and is {own:.8g}"
            )
    for k, (one, other) in enumerate(zip(stored.segments, found.segments)):
        if not _within(earlier, one.max_error, tallied.error_range(None, k)):
            raise FalseCertificate(
                f"the largest error of segment {k} is said to be {one.max_error:.8g}, "
                f"and is {other.max_error:.8g}"
            )
        _check_place(k, one, other, measured, earlier)
    _check_rounding(stored.rounding, found.rounding)


def _allowed_loss(stored: Certificate, measured: MeasuredPath, k: int) -> float:
    """Returns how far a stored loss may be off: rounding of its computation, and of this one."""
    earlier = stored.rounding is None
    slack = measured.tallied.loss_slack(k, float32=earlier)
    if slack is None:
        return _UNBOUNDED
    return min(2 * slack, _EARLIER_LOSS) if earlier else 2 * slack


def _within(earlier: bool, said: float, limits: tuple[float, float]) -> bool:
    lowest, highest = limits
    if said != said and lowest != lowest:
        return True  # a loss without an error
    few = 1e-12 + (_EARLIER_ERRORS if earlier else 0.0)
    return lowest - few <= said <= highest + few


def _check_place(
    k: int, said: Segment, own: Segment, measured: MeasuredPath, earlier: bool
) -> None:
    """Raises where the largest error is said to be where it is not."""
    curves, count = measured.tallied.computed, len(measured.segments)
    if said.max_error_at == own.max_error_at or own.max_error != own.max_error:
        return
    t = min(1.0, max(0.0, said.max_error_at * count - k))
    lowest, highest = measured.tallied.error_range(None, k)
    few = 1e-12 + (_EARLIER_ERRORS if earlier else highest - lowest)
    if not _close(curves.error_at(k, t), own.max_error, few):
        raise FalseCertificate(
            f"segment {k}: the largest error is said to be at t = {said.max_error_at:.6g}; there "
            f"it is {curves.error_at(k, t):.6g}, and {own.max_error:.6g} at {own.max_error_at:.6g}"
        )


def _check_rounding(said: Rounding | None, own: Rounding | None) -> None:
    """Raises where the bounds on rounding are said to be lower than they are.

    Higher ones are true, too: less effort finds coarser ones.
    """
    if said is None:
        return
    if own is None:
        raise FalseCertificate("the certificate bounds rounding, of which nothing is known here")
    for name, value in vars(said).items():
        mine = getattr(own, name)
        both_none = value != value and mine != mine
        if not (value >= mine * (1 - _ROUNDING_TOLERANCE) or both_none):
            raise FalseCertificate(
                f"the certificate's {name.replace('_', ' ')} of rounding is {value:.4g}, "
                f"and is {mine:.4g}"
            )


def _close(a: float, b: float, allowed: float) -> bool:
    """Whether numbers are close; NaN is close to NaN alone, whatever is allowed."""
    return a == b or abs(a - b) <= allowed or (a != a and b != b)


# -- what is no number -----------------------------------------------------------------------------


def checked_labels(
    labels: Sequence[str], path: PolyChain, chain: LayerChain | None
) -> tuple[tuple[str, ...], list[str]]:
    """Returns the labels that the weights bear out, with plain ones for the others.

    "S_3 of a" says that layers 1 to 3 are those of network a where they are live.

    Returns:
        the labels, and those that were not checked.

    Raises:
        FalseCertificate: a label is false.
    """
    last = len(labels) - 1
    found, unknown = [], []
    for k, label in enumerate(labels):
        match = _LABEL.fullmatch(label)
        if label == plain_label(k, last):
            found.append(label)
        elif match is None or chain is None:
            found.append(plain_label(k, last))
            unknown.append(label)
        else:
            _check_label(k, match, path, chain)
            found.append(label)
    return tuple(found), unknown


def _is_read(chain: LayerChain, point: State, live: list[Tensor], layer: int) -> bool:
    """Whether anything reads a layer's live units: one is counted where none is live."""
    after = chain.layers[layer]
    weight = after.by_unit(point[after.weight])
    rows = weight[live[layer + 1].to(weight.device)]
    return bool((rows[:, live[layer].to(weight.device)] != 0).any())


def _check_label(k: int, label: re.Match[str], path: PolyChain, chain: LayerChain) -> None:
    """Raises where a breakpoint does not begin with the layers that its label says."""
    entry, point = int(label[1]), path.control_points[k]
    end = path.control_points[-1 if label[2] == "b" else 0]
    live = live_units(chain, point)
    problem = f"{chain.name} has {chain.length} layers" if entry >= chain.length else None
    for layer, units in zip(chain.layers[:entry], live[1:]):
        above = range(layer.index, chain.length)
        if problem is not None or not all(_is_read(chain, point, live, i) for i in above):
            continue
        for key in layer.incoming():
            one, other = point[key], end[key]
            if not torch.equal(one[units], other[units]):
                problem = f"live units of layer {layer.index} are others ({key})"
    if problem is not None:
        raise FalseCertificate(f"breakpoint {k} is said to be {label[0]}: {problem}")


def check_model(spec: str | None, path: PolyChain) -> str:
    """Returns what can be said of the model that a connection names.

    Raises:
        FalseCertificate: it is a built-in network that the path does not fit.
    """
    if spec is None or not models.is_builtin(spec):
        return f"model {spec!r}: not checked, it is no built-in one"
    try:
        with torch.device("meta"):
            shapes = {key: tuple(v.shape) for key, v in models.build(spec).state_dict().items()}
    except ModeconnError as error:
        raise FalseCertificate(f"the connection names a model that is none: {error}") from error
    own = {key: tuple(v.shape) for key, v in path.control_points[0].items()}
    if shapes != own:
        different = sorted(set(shapes.items()) ^ set(own.items()))[0][0]
        raise FalseCertificate(f"the connection is said to be of {spec}; {different} does not fit")
    return f"model {spec}: its parameters and buffers fit the path"


def check_target(
    stored: Sequence[Certificate], details: Mapping[str, object], asked: float | None
) -> str:
    """Returns what can be said of the target: it is the caller's, what is stored is a claim.

    Raises:
        FalseCertificate: the connection names several.
    """
    said = [certificate.target for certificate in stored]
    said += [details["target"]] if "target" in details else []  # type: ignore[list-item]
    if any(target != said[0] for target in said):
        raise FalseCertificate(f"the connection names several targets: {said}")
    if said[0] is None:
        return "target: none is stored"
    if asked is None:
        return f"target {said[0]:.6g}: a claim, not used; give the target that you ask for"
    same = "the one asked for" if said[0] == asked else f"and {asked:.6g} is asked for"
    return f"target {said[0]:.6g} is stored, {same}"
