"""Names under which transformers saves a model, where they are not those of the module.

Since its fifth version the modules of some architectures have other names than their checkpoints
(of ViT, say), and transformers converts them when it reads and writes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def saved_names(model: nn.Module) -> dict[str, str]:
    """Return the module's name of each entry that transformers saves under another name.

    Only names are converted: entries that are cut up or joined when they are saved are left out,
    and so a file that has them fits no module.

    Args:
        model: any module; one that is none of transformers' has no such names.
    """
    library: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(library, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "_keys_to_ignore_on_load_unexpected"):
        return {}
    state = model.state_dict()
    # empty tensors tell where each one goes, and have nothing to copy
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    marks = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    try:
        saved = revert(model, dict(marks))
    except Exception:  # conversions of a library that goes on changing: then there are none
        return {}
    name_of = {id(mark): name for name, mark in marks.items()}
    found = {name: name_of.get(id(mark)) for name, mark in saved.items()}
    return {name: own for name, own in found.items() if own is not None and own != name}
