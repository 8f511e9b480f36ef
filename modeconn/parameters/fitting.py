"""Names in checkpoint files, fitted to those of the module that they are for.

Files have names with prefixes (of wrappers, of the attribute under which a LightningModule keeps a
network, of the model around a base model), leave out all but one of the names that a module ties,
and hold buffers that later versions of a library no longer save. A file's names become the
module's only where that is one to one; all else is an error that lists what is left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from modeconn.parameters import state as states
from modeconn.parameters.comparison import tied
from modeconn.parameters.configs import FileState, config_of, is_from_file
from modeconn.parameters.conversions import saved_names
from modeconn.parameters.paths import Path
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import unwrapped

# Parts of names that wrappers put anywhere between those of the modules themselves.
_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
# Buffers that transformers used to save, and computes by itself.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.masked_bias$")

_Rename = Callable[[str], str]


class Names:
    """The names of a module's entries, to which those of files are fitted.

    Args:
        model: the architecture.
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrapped(model)
        self._model = model
        self._title = f"the model {type(model).__name__}"
        self._own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        self._ties: dict[str, set[str]] = {}
        self._tie(tied(self._own))
        self._declared = _declared_ties(model, self._own)
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        is_pretrained = hasattr(model, "_keys_to_ignore_on_load_unexpected")
        self._ignored = [*map(re.compile, [*(patterns or ()), *_COMPUTED])] if is_pretrained else []

    def _tie(self, pairs: Iterator[tuple[str, str]]) -> None:
        for first, other in pairs:
            group = self._ties.setdefault(first, {first})
            group.add(other)
            self._ties[other] = group

    def fitted(
        self,
        state: State,
        name: str,
        removed: str = "",
        config: Mapping[str, Any] | None = None,
        renames: bool = True,
    ) -> tuple[State, _Rename]:
        """Return a state under the module's names, in their order, and how its own became these.

        Args:
            state: of a file.
            name: what messages call it.
            removed: the prefix that was removed from its names when it was read.
            config: of the folder that it was read from; it may say that names are tied which the
                module does not tie.
            renames: whether names may change; if not, those that are left out are filled in alone.

        Raises:
            ModeconnError: the names do not fit, or shapes differ; the message lists which.
        """
        if state.keys() == self._own.keys():
            return state, _same
        ties = self._with_declared(config)
        for rename in self._renamings(state, removed) if renames else [_same]:
            found = self._complete({rename(key): value for key, value in state.items()}, ties)
            if found is not None and len({*map(rename, state)}) == len(state):
                return found, rename
        self._refuse(state, name, ties, renames)
        raise AssertionError("names that match are found before")

    def _with_declared(self, config: Mapping[str, Any] | None) -> dict[str, set[str]]:
        if not self._declared or config is None or config.get("tie_word_embeddings") is not True:
            return self._ties
        groups = {key: set(value) for key, value in self._ties.items()}
        for other, first in self._declared.items():
            joined = groups.get(first, {first}) | groups.get(other, {other})
            groups.update(dict.fromkeys(joined, joined))
        return groups

    def _renamings(self, state: Collection[str], removed: str) -> Iterator[_Rename]:
        yield _same
        parts = removed.split(".")[:-1]
        for i in range(len(parts)):
            yield _adding(".".join([*parts[i:], ""]))
        for before in (_same, _unwrapped):
            names = [before(key) for key in state]
            yield before
            counted = [key for key in names if not self._is_ignored(key)] or names
            for prefix in _common(counted):
                yield _chained(before, _removing(prefix))
            first = counted[0]
            for own in self._own:
                if own.endswith(f".{first}"):
                    yield _chained(before, _adding(own.removesuffix(first)))
        converted = saved_names(self._model)
        if converted:
            yield lambda key: converted.get(key, key)

    def _is_ignored(self, key: str) -> bool:
        return any(pattern.search(key) for pattern in self._ignored)

    def _complete(self, state: State, ties: Mapping[str, set[str]]) -> State | None:
        """Return a state with all of the module's names; None where some are left over."""
        if any(key not in self._own and not self._is_ignored(key) for key in state):
            return None
        found: State = {}
        for key in self._own:
            partners = [key, *sorted(ties.get(key, ()))]
            there = [each for each in partners if each in state]
            if not there:
                return None
            found[key] = state[there[0]]
        return found

    def _refuse(self, state: State, name: str, ties: Mapping[str, set[str]], renames: bool) -> None:
        """Raise the error for names that do not fit, in the form in which most do."""

        def left(rename: _Rename) -> int:
            renamed = {rename(key) for key in state}
            return len(renamed ^ self._own.keys())

        prefixes = {key.partition(".")[0] + "." for key in state if "." in key}
        nearest = min([_same, *map(_removing, sorted(prefixes))], key=left) if renames else _same
        removed = [key for key in state if nearest(key) != key]
        renamed = {nearest(key): value for key, value in state.items()}
        renamed = {key: value for key, value in renamed.items() if not self._is_ignored(key)}
        for key in self._own:
            there = [each for each in sorted(ties.get(key, ())) if each in renamed]
            if key not in renamed and there:
                renamed[key] = renamed[there[0]]
        if removed:
            prefix = removed[0].removesuffix(nearest(removed[0]))
            name = f"{name} (without {prefix!r}, with which its names begin)"
        states.match([self._own, renamed], [self._title, name], devices=False, dtypes=False)


def fit_path(path: Path, model: nn.Module) -> None:
    """Give the control points of a path the module's names, where those of files differ.

    Args:
        path: it is changed: its control points, and what it says of them by name.
        model: the architecture.

    Raises:
        ModeconnError: names do not fit the model's.
    """
    own = Names(model)
    points: list[State] = []
    renamings: list[_Rename] = []
    described = zip(path.control_points, path.names, path.files, path.configs)
    removed = max(path.prefixes, key=len, default="")
    for point, name, is_file, config in described:
        found, rename = own.fitted(point, name, removed if is_file else "", config, is_file)
        points.append(found)
        renamings.append(rename)
    if all(new is old for new, old in zip(points, path.control_points)):
        return
    path.control_points = points
    path.prefixes = set()
    path.fixed = frozenset(map(renamings[0], path.fixed))
    if path.blocks is not None:
        path.blocks = path.blocks.renamed(renamings[0], points[0])
        path.fixed |= points[0].keys() - path.blocks.of.keys()
    if path.unmatched is not None:
        path.settle()


def load_for(model: nn.Module, source: Any) -> State:
    """Load a network as `mc.load` does, under the names of the module that it is for.

    Raises:
        ModeconnError: it cannot be read, or its names do not fit the model's.
    """
    state, removed = states.load_with_prefix(source)
    if not is_from_file(source):
        return state
    name = "the network" if isinstance(source, FileState) else str(source)
    return Names(model).fitted(state, name, removed, config_of(source))[0]


def _declared_ties(model: nn.Module, own: Collection[str]) -> dict[str, str]:
    """The ties that a model of transformers declares, whether its config makes them or not."""
    found = getattr(model, "_tied_weights_keys", None)
    if not isinstance(found, Mapping):
        return {}
    return {str(k): str(v) for k, v in found.items() if k in own and v in own}


def _common(names: Sequence[str]) -> list[str]:
    """The prefixes, of whole parts, that all names begin with; the shortest first."""
    split = [name.split(".")[:-1] for name in names]
    prefixes = []
    for i in range(min(map(len, split))):
        if any(parts[i] != split[0][i] for parts in split):
            break
        prefixes.append(".".join([*split[0][: i + 1], ""]))
    return prefixes


def _same(key: str) -> str:
    return key


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _PARTS)


def _adding(prefix: str) -> _Rename:
    return lambda key: prefix + key


def _removing(prefix: str) -> _Rename:
    return lambda key: key.removeprefix(prefix)


def _chained(first: _Rename, second: _Rename) -> _Rename:
    return lambda key: second(first(key))
