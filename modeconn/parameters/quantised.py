"""Quantised checkpoints, recognised by the names of their tensors and by their config, and refused.

Their tensors are codes and scales: sums of them are no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from modeconn.errors import ModeconnError, listed

# Endings that no layer of PyTorch or transformers gives to a weight of its own. `scales` and
# `qzeros` stand beside a `qweight` always, and alone they may be anyone's.
_METHODS = {
    "bitsandbytes": re.compile(
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|quant_state\..+)$"
    ),
    "GPTQ or AWQ": re.compile(r"(^|\.)(qweight|qzeros)$"),
    "compressed-tensors": re.compile(r"(^|\.)weight_(packed|scale|scale_inv|zero_point)$"),
}
_REMEDY = (
    "expected weights in floating point: the folder that it was made from, or "
    "model.dequantize().save_pretrained(…) of the model that transformers loads"
)


class Quantised(ModeconnError):
    """Weights are codes and scales, of which sums are no weights."""


def refuse_quantised(names: Iterable[str], source: str) -> None:
    """Raise a ModeconnError where names of tensors are those of quantised weights.

    Args:
        names: of all tensors of a checkpoint.
        source: what the message calls it.
    """
    names = list(names)
    for method, pattern in _METHODS.items():
        found = [f"'{name}'" for name in names if pattern.search(name)]
        if found:
            raise Quantised(
                f"{source}: holds weights quantised by {method} ({listed(found, of=len(names))}); "
                f"{_REMEDY}"
            )


def refuse_quantised_config(config: Mapping[str, Any], source: str) -> None:
    """Raise a ModeconnError where a config.json says that the weights beside it are quantised."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "") if isinstance(found, Mapping) else found
        raise Quantised(
            f"{source}: its config.json says that its weights are quantised "
            f"(quantization_config, {method or 'no method named'}); {_REMEDY}"
        )
