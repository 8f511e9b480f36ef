"""The config.json of folders, compared: which entries make two networks different functions.

Weights that fit each other say nothing of the rest of a forward: the base of rotary positions, an
epsilon, an activation. What is not known to be harmless counts as a part of the forward.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modeconn.errors import ModeconnError, listed
from modeconn.parameters.folders import read_config

Config = dict[str, Any]


class FileState(dict[str, Tensor]):
    """A state that was read from a file: its names are the file's, and it may have a config."""

    def __init__(self, state: Mapping[str, Tensor], config: Config | None) -> None:
        super().__init__(state)
        self.config = config


def is_from_file(source: Any) -> bool:
    """Whether a network is given as a file or folder, or was read from one."""
    return isinstance(source, (str, os.PathLike, FileState))


# Entries that no forward in eval mode reads: where files came from and how they are stored, what
# generation and training do, names of classes, and what else is returned.
_HARMLESS = re.compile(
    r"_.*|architectures|auto_map|transformers_version|.*torch_?dtype|dtype|torchscript|model_name"
    r"|name_or_path|use_cache|gradient_checkpointing|use_return_dict|return_dict"
    r"|output_(attentions|hidden_states|(router_|auxiliary_)?logits|scores|past)"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|prefix"
    r"|.*dropout.*|.*_pdrop|.*drop_path.*|layerdrop|.*_layerdrop|initializer_.*|.*_init_.*|init_.*"
    r"|chunk_size_feed_forward|pretraining_tp|loss_.*"
    r"|.*_loss_coef|.*_loss_weight|aux_loss.*|router_.*_loss.*|use_mems_train|label_smoothing"
    r"|bos_token_id|eos_token_id|sep_token_id|cls_token_id|decoder_start_token_id|.*_bos_token_id"
    r"|forced_.*|suppress_tokens|begin_suppress_tokens|bad_words_ids|max_length|min_length"
    r"|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p"
    r"|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|num_return_sequences"
    r"|encoder_no_repeat_ngram_size|exponential_decay_length_penalty|remove_invalid_values"
    r"|tokenizer_class|unsloth_.*|wandb_.*|transformers\.js_config|attn_implementation"
    r"|pruned_heads|tf_legacy_loss|use_bfloat16|model_max_length"
)
# The number of the token that fills a batch up: heads that score a whole text look for it, and
# models that count positions from it; what predicts next tokens does neither.
_OF_TEXTS = re.compile(r".*(ForCausalLM|LMHeadModel)$")
_PADDING = "pad_token_id"
_ABSENT = object()


def config_of(source: Any) -> Config | None:
    """Return the config of a folder, or of a module that has one as transformers' do, else None."""
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source).expanduser()
        return read_config(folder) if folder.is_dir() else None
    if isinstance(source, FileState):
        return source.config
    if isinstance(source, nn.Module):
        to_dict = getattr(getattr(source, "config", None), "to_dict", None)
        found = to_dict() if callable(to_dict) else None
        return found if isinstance(found, dict) else None
    return None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries that differ and may change the forward, each with both values.

    Entries of nested configs (text_config, rope_scaling) have names with dots. An entry that one
    config leaves out has its default, which transformers knows where it is installed.
    """
    texts = all(_predicts_texts(config) for config in (a, b))
    found = _differing(a, b)
    if any(_ABSENT in pair for pair in found.values()):
        found = _differing(_with_defaults(a), _with_defaults(b))
    if texts:
        found.pop(_PADDING, None)
    return {key: (_shown(one), _shown(other)) for key, (one, other) in found.items()}


def _shown(value: Any) -> Any:
    return None if value is _ABSENT else value


def _differing(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*a, *b}):
        if _HARMLESS.fullmatch(key):
            continue
        pair = a.get(key, _ABSENT), b.get(key, _ABSENT)
        if all(isinstance(value, Mapping) for value in pair):
            found.update(_differing(*pair, prefix=f"{prefix}{key}."))
        elif not _equal(*pair):
            found[prefix + key] = pair
    return found


def _equal(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same: 1 and 1.0 are, True and 1 are not."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    return bool(one == other)


def _predicts_texts(config: Mapping[str, Any]) -> bool:
    return any(_OF_TEXTS.match(str(name)) for name in config.get("architectures") or ())


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in what a config leaves out, where transformers is installed and knows its model."""
    try:
        from transformers import AutoConfig

        kind = config["model_type"]
        made = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        return {**config, **made.to_dict()}
    except Exception:  # not installed, a model that it does not know, or values that it refuses
        return config


def check_ignore(ignore: Collection[str]) -> None:
    """Raise a ModeconnError for one name in place of several: parts of it would count, too."""
    if isinstance(ignore, str):
        raise ModeconnError(f"ignore is {ignore!r}: expected names of entries, ({ignore!r},)")


def is_ignored(key: str, ignore: Collection[str]) -> bool:
    """Whether an entry, or the nested config that it is in, is among those that may differ."""
    return key in ignore or key.partition(".")[0] in ignore


def refuse_different_forwards(
    configs: Sequence[Mapping[str, Any] | None],
    names: list[str],
    ignore: Collection[str],
) -> None:
    """Raise where folders' configs say that they are different functions of their weights.

    Args:
        configs: of the networks, None where one has none.
        names: what the message calls them.
        ignore: entries that may differ.
    """
    known = [(config, name) for config, name in zip(configs, names) if config is not None]
    for config, name in known[1:]:
        found = {
            key: pair
            for key, pair in differences(known[0][0], config).items()
            if not is_ignored(key, ignore)
        }
        if found:
            texts = [f"{key} is {pair[0]!r} and {pair[1]!r}" for key, pair in found.items()]
            raise ModeconnError(
                f"{known[0][1]} and {name} are different functions of their weights by their "
                f"configs: {listed(texts)}; a path has one forward: expected equal ones, or "
                f"ignore={tuple(found)!r} to evaluate all with the model's"
            )
