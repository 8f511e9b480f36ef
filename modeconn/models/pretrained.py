"""Models of transformers, built from the config.json in a local folder.

Nothing is fetched, and code that lies in a folder runs only where the user says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeconn.errors import ModeconnError, first_line, listed, out_of_memory
from modeconn.parameters.folders import CONFIG, read_config
from modeconn.parameters.quantised import refuse_quantised_config

PREFIX = "hf:"


def build_pretrained(spec: str, trust_remote_code: bool = False) -> nn.Module:
    """Build the model that the config.json of a folder describes, with random weights in float32.

    Args:
        spec: ``"hf:FOLDER"``, where `save_pretrained` wrote FOLDER.
        trust_remote_code: run the code in the folder that its `auto_map` names, where transformers
            has no such model.

    Raises:
        ModeconnError: no such folder, or none with a config; transformers is not installed, or does
            not know the model; its code would have to run.
    """
    kind, config = _kind_and_config(spec, trust_remote_code)
    with _building(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _ready(kind(config))


def load_pretrained(folder: Path) -> nn.Module:
    """Load a folder's own network as transformers does, in float32; no code in it runs.

    Raises:
        ModeconnError: see `build_pretrained`; transformers cannot load it, or leaves weights new.
    """
    spec = f"{PREFIX}{folder}"
    kind, _ = _kind_and_config(spec)
    bars = _transformers(spec).utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, about = kind.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModeconnError(
            f"{folder}: transformers does not load it: {first_line(error)}"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    missing = sorted(about["missing_keys"])
    if missing:
        raise ModeconnError(f"{folder}: lacks {listed([repr(key) for key in missing])}")
    return _ready(model)


def _kind_and_config(spec: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return the class of a folder's model and its config, see `build_pretrained`."""
    folder = Path(spec.removeprefix(PREFIX)).expanduser()
    raw = _config_in(folder, spec)
    name = _architecture(raw, spec)
    transformers = _transformers(spec)
    refuse_quantised_config(raw, str(folder))
    known = getattr(transformers, name, None)
    is_known = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    if not is_known and not trust_remote_code:
        own = "--trust-remote-code runs its code, in the folder" if "auto_map" in raw else ""
        raise ModeconnError(
            f"model {spec!r} is a {name}, which transformers {transformers.__version__} does not "
            f"have; {own or 'expected the name of one of its models as architectures'}"
        )
    with _building(spec):
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=not is_known
        )
        return known if is_known else _class_in(folder, raw, name, spec), config


@contextlib.contextmanager
def _building(spec: str) -> Iterator[None]:
    """Within, what transformers raises becomes an error that names the model."""
    try:
        yield
    except ModeconnError:
        raise
    except Exception as error:  # a config can make a constructor raise anything
        if out_of_memory(error):
            raise
        reason = f"cannot be built from its {CONFIG}: {first_line(error)}"
        raise ModeconnError(f"model {spec!r} {reason}") from error


def _config_in(folder: Path, spec: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModeconnError(
            f"model {spec!r}: {folder} is no folder; expected hf:FOLDER, one of save_pretrained "
            "(nothing is fetched)"
        )
    found = read_config(folder)
    if found is None:
        raise ModeconnError(
            f"model {spec!r}: {folder} has no {CONFIG}; expected a folder of save_pretrained, or "
            "another --model"
        )
    return found


def _architecture(config: dict[str, Any], spec: str) -> str:
    found = config.get("architectures")
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str):
        return found[0]
    raise ModeconnError(
        f"model {spec!r}: architectures in its {CONFIG} is {found!r}: expected the name of one "
        "class of transformers"
    )


def _transformers(spec: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModeconnError(
            f"model {spec!r} needs transformers, which cannot be imported ({error}): "
            "pip install 'modeconn[hf]'"
        ) from None
    return transformers


def _class_in(folder: Path, config: dict[str, Any], name: str, spec: str) -> Any:
    """Import the class of a model from code in its folder."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = [v for v in (config.get("auto_map") or {}).values() if isinstance(v, str)]
    named = [place for place in places if place.rpartition(".")[2] == name and "--" not in place]
    if not named:
        raise ModeconnError(
            f"model {spec!r} is a {name}, of which neither transformers nor auto_map in its "
            f"{CONFIG} has code in the folder"
        )
    return get_class_from_dynamic_module(named[0], str(folder), local_files_only=True)


def _ready(model: Any) -> nn.Module:
    # a cache is of use in generating alone, and is no output that a loss reads
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    found: nn.Module = model.float()
    return found
