"""Whether two networks can be the ends of a path, before anything is evaluated."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.trial import Runner, loaded
from modeconn.errors import ModeconnError, listed
from modeconn.evaluation.arguments import fitted
from modeconn.evaluation.differences import (
    Comparison,
    Finding,
    LayerDistance,
    distances_of,
    wide,
)
from modeconn.evaluation.sameness import same_function
from modeconn.models.pretrained import PREFIX, build_pretrained, load_pretrained
from modeconn.parameters import state as states
from modeconn.parameters.comparison import is_mask, tied
from modeconn.parameters.configs import (
    Config,
    FileState,
    check_ignore,
    config_of,
    differences,
    is_from_file,
    is_ignored,
)
from modeconn.parameters.fitting import Names
from modeconn.parameters.folders import CONFIG
from modeconn.parameters.paths import Line
from modeconn.parameters.quantised import Quantised
from modeconn.parameters.state import State
from modeconn.parameters.tokenizers import tokenizer_difference


@dataclass
class _End:
    """One of the networks.

    Attributes:
        source: as it was given.
        title: what messages call it.
        config: of its folder, or of a module that has one.
        state: its tensors; None where they are quantised, as `refused` says.
    """

    source: Any
    title: str
    config: Config | None = None
    state: State | None = None
    removed: str = ""
    refused: str = ""
    folder: FilePath | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.source, (str, os.PathLike)):
            path = FilePath(self.source).expanduser()
            self.title = str(self.source)
            self.folder = path if path.is_dir() else None
        try:
            self.state, self.removed = states.load_with_prefix(self.source)
        except Quantised as error:
            self.refused = str(error)
        self.config = config_of(self.source)

    def network(self) -> Any:
        """Return what a path takes, of a file what was read of it already."""
        if self.state is not None and is_from_file(self.source):
            return FileState(self.state, self.config)
        return self.source


def check(
    a: Any,
    b: Any,
    data: Any = None,
    *,
    model: nn.Module | None = None,
    ignore: Collection[str] = (),
    batch_size: int | None = None,
) -> Comparison:
    """Check whether two networks can be the ends of a path, and say how they differ.

    Compared are architectures, the entries of config.json that change the forward, tokenizers,
    quantisation, names, shapes, dtypes, ties, values that are not finite, and weights. With data
    each end is run as its own model and as the end of the line between them.

    Args:
        a: a module, a state dict, or the name of a checkpoint file or folder.
        b: another one.
        data: as for `evaluate`; targets are not used. It needs an architecture: `model`, a module
            as an end, or a folder that transformers can build it from.
        model: the architecture, where neither end says it.
        ignore: entries of config.json that may differ.
        batch_size: rows of data per batch, 128 by default.

    Returns:
        Findings with a verdict each, and the distance of each layer.

    Raises:
        ModeconnError: a network that cannot be read, or data that do not fit.
    """
    check_ignore(ignore)
    ends = _End(a, "a"), _End(b, "b")
    if data is not None and model is None:
        model = _architecture(ends)
    if model is not None:
        for end in ends:
            _fit(end, model)
    findings = [
        *_architectures(*ends),
        *_configs(*ends, ignore),
        *_tokenizers(*ends),
        *_quantisation(*ends),
    ]
    one, other = (end.state for end in ends)
    layers: tuple[LayerDistance, ...] = ()
    if one is not None and other is not None:
        names = _names(one, other)
        findings += [*names, *_values(one, other), _ties(one, other)]
        if all(each.passed for each in names):
            layers = distances_of(one, other)
            findings.append(_weights(layers))
            if data is not None and model is not None:
                findings += _outputs(ends, model, data, batch_size)
    return Comparison(tuple(findings), layers)


def _fit(end: _End, model: nn.Module) -> None:
    """Give a file's entries the model's names, where they can be."""
    if end.state is not None and is_from_file(end.source):
        try:
            names = Names(model)
            end.state = names.fitted(end.state, end.title, end.removed, end.config)[0]
        except ModeconnError:
            pass  # names and shapes are compared below, and what differs is listed


def _architecture(ends: tuple[_End, _End]) -> nn.Module:
    for end in ends:
        if isinstance(end.source, nn.Module):
            return end.source
    for end in ends:
        if end.folder is not None and end.config is not None:
            return build_pretrained(f"{PREFIX}{end.folder}")
    raise ModeconnError(
        "data need an architecture to run: expected model=…, a module as an end, or a folder of "
        f"save_pretrained with its {CONFIG}"
    )


# -- what is compared ------------------------------------------------------------------------------


def _architectures(a: _End, b: _End) -> list[Finding]:
    kinds = [_kind(end) for end in (a, b)]
    if None in kinds:
        return []
    same = kinds[0] == kinds[1]
    text = f"both are {kinds[0]}" if same else f"a is {kinds[0]}, b is {kinds[1]}"
    return [Finding("architecture", same, text)]


def _kind(end: _End) -> str | None:
    if end.config is not None:
        named = end.config.get("architectures") or [end.config.get("model_type")]
        return ", ".join(map(str, named))
    return type(end.source).__name__ if isinstance(end.source, nn.Module) else None


def _configs(a: _End, b: _End, ignore: Collection[str]) -> list[Finding]:
    if a.config is None or b.config is None:
        without = [end.title for end in (a, b) if end.folder is not None and end.config is None]
        text = f"{listed(without)}: no {CONFIG}, so that nothing is known of the forward"
        return [Finding("config", False, text)] if without else []
    found = []
    for key, (one, other) in differences(a.config, b.config).items():
        ignored = is_ignored(key, ignore)
        text = f"{key} is {one!r} in a and {other!r} in b"
        found.append(Finding("config", ignored, text + (" (ignored)" if ignored else "")))
    return found or [Finding("config", True, "all entries that the forward reads are equal")]


def _tokenizers(a: _End, b: _End) -> list[Finding]:
    if a.folder is None or b.folder is None:
        return []
    found = tokenizer_difference(a.folder, b.folder)
    if found is None:
        return []
    return [Finding("tokenizer", not found, found or "the same tokens have the same numbers")]


def _quantisation(a: _End, b: _End) -> list[Finding]:
    return [Finding("quantised", False, end.refused) for end in (a, b) if end.refused]


def _names(one: State, other: State) -> list[Finding]:
    texts = []
    for mine, its, where in ((one, other, "a"), (other, one, "b")):
        alone = [f"'{key}' {list(mine[key].shape)}" for key in mine if key not in its]
        if alone:
            texts.append(f"in {where} alone: {listed(alone, of=len(mine))}")
    found = [Finding("names", not texts, "; ".join(texts) or f"both have {len(one):,} tensors")]
    shapes = [
        f"'{key}' is {list(one[key].shape)} in a and {list(other[key].shape)} in b"
        for key in one
        if key in other and one[key].shape != other[key].shape
    ]
    if shapes:
        found.append(Finding("shapes", False, listed(shapes, of=len(one))))
    dtypes = [_dtypes(state) for state in (one, other)]
    text = dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]} in a, {dtypes[1]} in b"
    half = any("float16" in each for each in dtypes)
    widened = "; half precision is widened to float32" if half else ""
    known = all("float8" not in each for each in dtypes)
    found.append(Finding("dtypes", known, text + widened))
    return found


def _dtypes(state: State) -> str:
    found = {str(v.dtype).removeprefix("torch.") for v in state.values() if v.is_floating_point()}
    return ", ".join(sorted(found)) or "no floating point"


def _values(one: State, other: State) -> list[Finding]:
    found = []
    for mine, its, where in ((one, other, "a"), (other, one, "b")):
        bad = [f"'{key}'" for key, value in mine.items() if not _is_weight(value, its.get(key))]
        if bad:
            found.append(Finding("values", False, f"{where} is not finite in {listed(bad)}"))
    return found


def _is_weight(value: Tensor, other: Tensor | None) -> bool:
    """Whether the values can be on a path: finite, or those of a mask, alike at both ends."""
    if states.is_finite(wide(value)):
        return True
    return other is not None and value.dtype == other.dtype and is_mask([value, other])


def _ties(one: State, other: State) -> Finding:
    pairs = [_tied(state) for state in (one, other)]
    texts = []
    for mine, its, where, there in ((*pairs, "a", other), (*pairs[::-1], "b", one)):
        apart = [
            f"'{x}' and '{y}'" for x, y in mine if (x, y) not in its and x in there and y in there
        ]
        if apart:
            texts.append(f"tied in {where} alone: {listed(apart)}")
    common = [f"'{x}' and '{y}'" for x, y in pairs[0] if (x, y) in pairs[1]]
    text = "; ".join(texts) or (f"both tie {listed(common)}" if common else "none is tied")
    more = ": a path has tensors of their own for these" if texts else ""
    return Finding("ties", True, text + more)


def _tied(state: State) -> list[tuple[str, str]]:
    """Pairs of names with one value: one tensor in memory, or equal matrices in a file."""
    pairs = list(tied(state))
    first: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        if value.dim() < 2 or not value.is_floating_point() or value.numel() < 2:
            continue
        # equal matrices have equal first rows, and others have them hardly ever
        place = (tuple(value.shape), value.dtype, tuple(value[0].flatten()[:8].tolist()))
        same = first.setdefault(place, key)
        if same != key and (same, key) not in pairs and torch.equal(state[same], value):
            pairs.append((same, key))
    return pairs


def _weights(layers: tuple[LayerDistance, ...]) -> Finding:
    equal = sum(each.equal for each in layers)
    tensors = sum(each.tensors for each in layers)
    if equal == tensors:
        return Finding("weights", False, "equal in every tensor: what is between is one point")
    whole = sum(each.distance**2 for each in layers) ** 0.5
    text = f"{equal:,} of {tensors:,} tensors are equal; the distance is {whole:.4g}"
    return Finding("weights", True, text)


# -- outputs ---------------------------------------------------------------------------------------


def _outputs(
    ends: tuple[_End, _End], model: nn.Module, data: Any, batch_size: int | None
) -> list[Finding]:
    """Each end as its own model, beside the end of the line."""
    line = Line(*(end.network() for end in ends))
    line.names = [end.title for end in ends]
    runner = Runner(fitted(model, line))
    found = []
    for end, t in zip(ends, (0.0, 1.0)):
        own = _own_model(end)
        made = loaded(runner.copy(), line.at(t))
        if own is None:
            text = f"{end.title} has no model of its own to compare with"
            found.append(Finding("outputs", True, text))
            continue
        same = same_function(own, made, data, batch_size=batch_size)
        text = f"{end.title} as its own model and as the line's end: {same}"
        found.append(Finding("outputs", same.same, text))
    return found


def _own_model(end: _End) -> nn.Module | None:
    if isinstance(end.source, nn.Module):
        return end.source
    if end.folder is not None and end.config is not None:
        return load_pretrained(end.folder)
    return None
