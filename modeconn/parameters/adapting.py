"""Networks and paths that PEFT adapters make of their base."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, overload

import numpy as np
from torch import nn

from modeconn.errors import ModeconnError, listed
from modeconn.parameters import state as states
from modeconn.parameters.adapters import Adapter, crossed, read_adapter
from modeconn.parameters.configs import FileState, config_of
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points, is_count
from modeconn.parameters.state import State

SPACES = ("deltas", "factors")
_Folder = str | os.PathLike[str]


class Adapters(Path):
    """base + Σ_i w_i Δ_i for the weights t = (w_1, …, w_n) of n adapters of one base.

    In the space of "factors" it is base + (Σ_i w_i s_i B_i)(Σ_i w_i A_i), which is quadratic in the
    weights. At w = 0 it is the base, and at a weight of 1 alone that adapter's network, both
    bitwise. `mc.lora` makes it.
    """

    def __init__(
        self, base: State, adapters: Sequence[Adapter], space: str, name: str, source: Any
    ) -> None:
        points = [base, *(each.merged(base) for each in adapters)]
        names = [name, *(each.name for each in adapters)]
        self._pairs: list[tuple[int, int]] | None = None
        if space == "factors":
            self._pairs = [*itertools.combinations(range(len(adapters)), 2)]
            for i, k in self._pairs:
                points.append(crossed(adapters[i], adapters[k], base))
                names.append(f"{adapters[i].name} × {adapters[k].name}")
        super().__init__(points, names)
        self.dim = len(adapters)
        # all have the names and the config of the base
        self.files = [isinstance(base, FileState)] * len(points)
        self.configs = [config_of(source)] * len(points)

    def points(self, points: Points) -> np.ndarray:
        """Check weights [T, n]; a count of points is refused for more than one adapter.

        Raises:
            ModeconnError: a count, no values, values that are not finite, or of the wrong shape.
        """
        if self.dim > 1 and is_count(points):
            raise ModeconnError(
                f"points is {points}: expected weights [T, {self.dim}], one for each adapter"
            )
        return super().points(points)

    def _basis(self, t: np.ndarray) -> np.ndarray:
        w = t.reshape(len(t), -1)
        columns = w
        if self._pairs is not None:
            products = [w[:, i] * w[:, k] for i, k in self._pairs]
            columns = np.column_stack([w**2, *products])
        return np.column_stack([1.0 - columns.sum(1), columns])


@overload
def lora(
    base: Any, adapters: _Folder, *, space: str = "deltas", any_base: bool = False
) -> State: ...


@overload
def lora(
    base: Any, adapters: Sequence[_Folder], *, space: str = "deltas", any_base: bool = False
) -> Adapters: ...


def lora(
    base: Any,
    adapters: _Folder | Sequence[_Folder],
    *,
    space: str = "deltas",
    any_base: bool = False,
) -> State | Adapters:
    """Return the network that a PEFT adapter makes of its base, or the path of several adapters.

    LoRA and rsLoRA are understood, with patterns of ranks and alphas, on linear layers,
    convolutions and embeddings, with biases and whole modules that were trained beside them.

    Args:
        base: a module, a state dict, or the name of a file or folder; it is left as it was.
        adapters: the name of a folder that PEFT's `save_pretrained` wrote, or a list of them.
        space: what a path of several blends: "deltas", so that θ(w) = base + Σ_i w_i Δ_i is linear
            in the weights, or "factors", quadratic in them: base + (Σ_i w_i s_i B_i)(Σ_i w_i A_i).
        any_base: take adapters that note another base by name, where all shapes fit.

    Returns:
        of one folder a state dict, base + Δ in float32 (or in float64, if the base is), to be an
        end of any path; tensors that the adapter leaves alone are the base's own. Of a list a path
        whose t are the n weights.

    Raises:
        ModeconnError: an adapter of another kind or of another base; a file is missing or damaged.
    """
    one = isinstance(adapters, (str, os.PathLike))
    if space not in SPACES or (one and space != SPACES[0]):
        expected = '"deltas" of one adapter' if one else '"deltas" or "factors"'
        raise ModeconnError(f"space is {space!r}: expected {expected}")
    folders: list[_Folder] = [adapters] if one else list(adapters)  # type: ignore[list-item,arg-type]
    if not folders:
        raise ModeconnError("adapters is empty: expected at least one folder of a PEFT adapter")
    state, _ = states.load_with_prefix(base)
    state = states.widened(state)
    if isinstance(base, (str, os.PathLike)):
        state = FileState(state, config_of(base))
    found = [read_adapter(FilePath(folder).expanduser()) for folder in folders]
    if not any_base:
        _check_base(found, base)
    fitted = [_fitted(each, state, base) for each in found]
    if not one:
        return Adapters(state, fitted, space, _title(base), base)
    merged = fitted[0].merged(state)
    return FileState(merged, config_of(base)) if isinstance(state, FileState) else merged


def _title(base: Any) -> str:
    return str(base) if isinstance(base, (str, os.PathLike)) else "the base"


# -- whether an adapter is one of this base --------------------------------------------------------


def _check_base(adapters: Sequence[Adapter], base: Any) -> None:
    """Raise where adapters note another base than the one that is given, or than each other."""
    known = _names_of(base)
    for each in adapters:
        noted = {each.base, each.base.rstrip("/").rpartition("/")[2], each.base.replace("/", "--")}
        others = {other.base for other in adapters if other.base} - {each.base}
        if not each.base or (not others and (not known or noted & known)):
            continue
        of = f"{sorted(others)[0]!r} that another notes" if others else f"{_title(base)!r}"
        raise ModeconnError(
            f"{each.name}: is an adapter of {each.base!r}, and not of {of}: expected its own base, "
            "or any_base=True where that is the same under another name"
        )


def _names_of(base: Any) -> set[str]:
    """All names under which an adapter may note a base; none where the base has no name."""
    config = config_of(base) or {}
    found = {str(config.get("_name_or_path") or "")}
    if isinstance(base, nn.Module):
        found.add(str(getattr(base, "name_or_path", "") or ""))
    if isinstance(base, (str, os.PathLike)):
        path = FilePath(base).expanduser().resolve()
        found |= {str(base), str(path), path.name}
        # as the hub's cache names a repository: models--owner--name/snapshots/…
        found |= {part.removeprefix("models--") for part in path.parts if "--" in part}
    found |= {name.rstrip("/").rpartition("/")[2] for name in found}
    return found - {""}


def _fitted(adapter: Adapter, base: State, source: Any) -> Adapter:
    """Return an adapter under the base's names.

    Raises:
        ModeconnError: the base lacks weights that it changes, or they have other shapes.
    """
    names = [*adapter.factors, *adapter.replaced]
    renamed = _renaming(names, base)
    missing = [f"'{name}'" for name in names if renamed[name] not in base]
    if missing:
        hint = ""
        if isinstance(source, (str, os.PathLike)):
            hint = "; a name that the base ties and its file leaves out is in the module: pass that"
        raise ModeconnError(
            f"{adapter.name}: is an adapter of another base: it changes {listed(missing)} "
            f"({len(missing)} of {len(names)}), which {_title(source)} does not have{hint}"
        )
    found = adapter.renamed(renamed)
    wrong = []
    for key, factors in found.factors.items():
        # its shape follows from those of its factors
        shape = [len(factors.b), *factors.a.shape[1:]]
        if factors.transposed:
            shape = [shape[1], shape[0]]
        wrong += _mismatch(key, shape, list(base[key].shape))
    for key, value in found.replaced.items():
        wrong += _mismatch(key, list(value.shape), list(base[key].shape))
    if wrong:
        raise ModeconnError(
            f"{adapter.name}: is an adapter of another base: {listed(wrong, of=len(names))}"
        )
    _check_ties(found, source)
    return found


def _mismatch(key: str, found: list[int], expected: list[int]) -> list[str]:
    return [] if found == expected else [f"'{key}' is {expected}, and its change {found}"]


def _after(prefix: str, names: Sequence[str]) -> list[str]:
    return [prefix + name for name in names]


def _renaming(names: Sequence[str], base: Collection[str]) -> Mapping[str, str]:
    """Names of an adapter under a base whose own begin with a prefix more or less."""
    prefixes = {name.partition(".")[0] + "." for name in base if "." in name}
    tries = [[*names], [name.partition(".")[2] for name in names]]
    tries += [_after(prefix, names) for prefix in sorted(prefixes)]
    best = max(tries, key=lambda each: sum(name in base for name in each))
    return dict(zip(names, best))


def _check_ties(adapter: Adapter, source: Any) -> None:
    """Raise where an adapter changes an embedding whose file may have left out what is tied to it.

    The adapter changes the embedding alone, and filling the other name in would change both.
    """
    config = config_of(source) if isinstance(source, (str, os.PathLike)) else None
    if config is None or config.get("tie_word_embeddings") is False:
        return
    embeddings = [
        key for key in (*adapter.factors, *adapter.replaced) if "embed" in key or "wte" in key
    ]
    if embeddings:
        raise ModeconnError(
            f"{adapter.name}: changes '{embeddings[0]}', which the model may tie to a tensor that "
            f"{_title(source)} leaves out: expected the module as base, which has both names"
        )
