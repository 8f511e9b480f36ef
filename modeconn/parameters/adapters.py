"""Adapters of PEFT as networks: low-rank changes of a base's weights (LoRA, Hu et al. 2021).

An adapter is Δ = s B A for some weights of its base, with s = alpha / r, or alpha / √r where it
says rsLoRA (Kalajdzievski 2023); `base + Δ` is the network that PEFT's `merge_and_unload` gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError, listed
from modeconn.parameters.folders import ADAPTER, read_json
from modeconn.parameters.reading import read
from modeconn.parameters.state import State

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# What adapter_config.json may say without changing what is computed here. Whatever else it sets is
# refused by name: another kind of adapter, or one that changes the base as well.
_KNOWN = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout megatron_core modules_to_save "
    "peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type "
    "use_rslora".split()
)
# Ways to begin that put a part of the base's weights into the adapter: the base is another one.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")


@dataclass(frozen=True)
class Factors:
    """Δ of one weight: s B A, and how the weight lies in memory.

    Attributes:
        a: [r, in, …]; b: [out, r].
        scaling: s.
        transposed: whether the weight is [in, out], as embeddings and GPT-2's layers have it.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool

    def delta(self) -> Tensor:
        """Return Δ in the shape of the weight."""
        return self.scaling * _product(self.b, self.a, self.transposed)


@dataclass(frozen=True)
class Adapter:
    """An adapter, read from its folder.

    Attributes:
        name: of the folder.
        base: the name of its base that it notes; "" for none.
        factors: by name of the weight in the base.
        replaced: whole tensors that were trained with it (modules_to_save, biases), by name.
    """

    name: str
    base: str
    factors: dict[str, Factors]
    replaced: State

    def renamed(self, names: Mapping[str, str]) -> Adapter:
        """Return the adapter with other names of entries."""
        factors = {names[key]: value for key, value in self.factors.items()}
        replaced = {names[key]: value for key, value in self.replaced.items()}
        return Adapter(self.name, self.base, factors, replaced)

    def merged(self, base: State) -> State:
        """Return base + Δ; entries that the adapter leaves alone are the base's own tensors."""
        changed = {key: base[key] + f.delta().to(base[key]) for key, f in self.factors.items()}
        taken = {key: value.to(base[key]) for key, value in self.replaced.items()}
        return {**base, **changed, **taken}


def _product(b: Tensor, a: Tensor, transposed: bool) -> Tensor:
    product: Tensor = torch.tensordot(b.float(), a.float(), dims=1)
    return product.transpose(0, 1) if transposed else product


def crossed(one: Adapter, other: Adapter, base: State) -> State:
    """Return base + B_1 A_2 + B_2 A_1 with the scalings in B: the mixed term of blended factors.

    Raises:
        ModeconnError: the adapters have different ranks at a weight, or replace whole tensors.
    """
    for each in (one, other):
        if each.replaced:
            names = [f"'{key}'" for key in each.replaced]
            raise ModeconnError(
                f'{each.name} replaces whole tensors ({listed(names)}), which space="factors" '
                'cannot blend: expected factors alone, or space="deltas"'
            )
    state = dict(base)
    for key in one.factors.keys() & other.factors.keys():
        f, g = one.factors[key], other.factors[key]
        if f.a.shape != g.a.shape:
            raise ModeconnError(
                f"{one.name} and {other.name} have ranks {len(f.a)} and {len(g.a)} at '{key}': "
                'space="factors" needs equal ones, and space="deltas" does not'
            )
        mixed = f.scaling * _product(f.b, g.a, f.transposed)
        mixed = mixed + g.scaling * _product(g.b, f.a, g.transposed)
        state[key] = base[key] + mixed.to(base[key])
    return state


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that PEFT's `save_pretrained` wrote.

    Raises:
        ModeconnError: a file is missing or damaged; the adapter is no LoRA, or one with parts that
            are not understood, which are named.
    """
    if not folder.is_dir():
        raise ModeconnError(f"{folder}: no such folder; expected one of a PEFT adapter")
    config = read_json(folder / ADAPTER)
    _check_kind(config, folder)
    files = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ModeconnError(f"{folder}: has neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}")
    found = read(files[0])
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModeconnError(f"{files[0]}: holds more than tensors; expected those of an adapter")
    pairs: dict[str, dict[str, Tensor]] = {}
    replaced: State = {}
    for key, tensor in found.items():
        name = str(key).removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            side = f"{match['embedding'] or ''}{match['side']}"
            pairs.setdefault(match["module"], {})[side] = tensor.detach().clone()
        else:
            replaced[name] = tensor.detach().clone()
    factors = {
        f"{module}.weight": _factors(pair, module, config, files[0])
        for module, pair in pairs.items()
    }
    _check_rest(replaced, config, files[0])
    replaced = {_own_name(name): value for name, value in replaced.items()}
    base = str(config.get("base_model_name_or_path") or "")
    return Adapter(str(folder), base, factors, replaced)


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModeconnError(
            f"{folder}: is an adapter of peft_type {kind!r}: expected LORA; merge another one by "
            "PEFT's merge_and_unload, and take the network that it gives"
        )
    more = {k: v for k, v in config.items() if k not in _KNOWN and v not in (None, False, "")}
    more = {key: value for key, value in more.items() if value not in ([], {})}
    first = config.get("init_lora_weights")
    if isinstance(first, str) and first.lower().startswith(_OTHER_BASE):
        more["init_lora_weights"] = first
    if more:
        texts = [f"{key} is {value!r:.40}" for key, value in more.items()]
        raise ModeconnError(
            f"{folder}: its {ADAPTER} has {listed(texts)}, which is not understood: expected plain "
            "LoRA or rsLoRA (no DoRA); merge it by PEFT's merge_and_unload, and take the network "
            "that it gives"
        )


def _factors(
    pair: Mapping[str, Tensor], module: str, config: Mapping[str, Any], file: Path
) -> Factors:
    is_embedding = "embedding_A" in pair
    sides = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    if set(pair) != set(sides):
        raise ModeconnError(
            f"{file}: '{module}' has the factors {sorted(pair)}: expected {[*sides]}"
        )
    a, b = (pair[side] for side in sides)
    b = b.flatten(1) if b.dim() > 1 else b
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    fits = a.dim() > 1 and b.dim() == 2 and b.shape[1] == len(a) == rank
    if not fits or not isinstance(alpha, (int, float)):
        raise ModeconnError(
            f"{file}: '{module}' has factors {list(a.shape)} and {list(pair[sides[1]].shape)}, and "
            f"{ADAPTER} rank {rank!r} and alpha {alpha!r}: expected [r, in] and [out, r]"
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    return Factors(a, b, scaling, transposed and a.dim() == 2)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that is, or ends, a module's name, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _own_name(name: str) -> str:
    """The name that a whole tensor of an adapter has in the base."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("modules_to_save", "base_layer"))


def _check_rest(replaced: Iterable[str], config: Mapping[str, Any], file: Path) -> None:
    """Raise for tensors that are neither factors nor whole ones that the config speaks of."""
    whole = config.get("modules_to_save") or []
    biases = config.get("bias") in ("all", "lora_only")

    def is_known(name: str) -> bool:
        own = _own_name(name)
        parts = own.split(".")
        saved = any(module in parts or f".{module}." in f".{own}" for module in whole)
        return saved or (biases and parts[-1] == "bias")

    unknown = [f"'{name}'" for name in replaced if "lora_" in name or not is_known(name)]
    if unknown:
        raise ModeconnError(
            f"{file}: holds {listed(unknown)}, which is not understood: expected factors lora_A "
            "and lora_B, and tensors of modules_to_save (no DoRA)"
        )
