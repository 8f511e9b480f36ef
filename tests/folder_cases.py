"""Folders as `save_pretrained` and PEFT write them, made by hand, and a network for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

IDS = torch.randint(0, 9, (12, 5), generator=torch.Generator().manual_seed(7))
CONFIG = {"architectures": ["TinyForCausalLM"], "model_type": "tiny", "norm_eps": 1e-5}


class Tiny(nn.Module):
    """A language model whose output layer is its embedding, as GPT-2's is."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 9, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(ids))))


def tiny(seed: int, tied: bool = True) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(tied)


def state_of(seed: int, tied: bool = True) -> dict[str, Tensor]:
    """What save_pretrained writes: of tied names one alone."""
    state = {key: value.clone() for key, value in tiny(seed, tied).state_dict().items()}
    if tied:
        del state["out.weight"]
    return state


def loss_of(state: Mapping[str, Tensor]) -> float:
    """The loss in float64 of next tokens, with the names of an untied network."""
    model = Tiny(tied=False).double()
    model.load_state_dict({key: value.double() for key, value in state.items()})
    outputs = model(IDS)[:, :-1].reshape(-1, 9)
    return F.cross_entropy(outputs, IDS[:, 1:].reshape(-1)).item()


def completed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"out.weight": state["embed.weight"], **state}


def blended(a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    return {key: (1 - t) * a[key].double() + t * b[key].double() for key in a}


def folder(
    path: Path, state: Mapping[str, Tensor], form: str = "safetensors", **config: Any
) -> Path:
    """Write a folder in one of the forms "safetensors", "bin", "shards" and "bin shards"."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write = torch.save if form.startswith("bin") else save_file
    name = "pytorch_model" if form.startswith("bin") else "model"
    suffix = "bin" if form.startswith("bin") else "safetensors"
    if "shards" not in form:
        write(dict(state), path / f"{name}.{suffix}")
        return path
    place = {}
    for i, key in enumerate(state):
        file = f"{name}-{i + 1:05}-of-{len(state):05}.{suffix}"
        write({key: state[key]}, path / file)
        place[key] = file
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (path / f"{name}.{suffix}.index.json").write_text(json.dumps(index))
    return path


def adapter(
    path: Path, tensors: Mapping[str, Tensor], form: str = "safetensors", **config: Any
) -> Path:
    """Write the folder of a PEFT adapter; names stand without its prefix."""
    path.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["inner"], **config}
    (path / "adapter_config.json").write_text(json.dumps(about))
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    if form == "bin":
        torch.save(named, path / "adapter_model.bin")
    else:
        save_file(named, path / "adapter_model.safetensors")
    return path
