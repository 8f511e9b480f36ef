"""Folders that transformers itself writes, against its own models in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.models import build
from modeconn.parameters.conversions import saved_names

IDS = torch.randint(0, 60, (6, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
IMAGE = {**TEXT, "image_size": 8, "patch_size": 4}
del IMAGE["vocab_size"], IMAGE["max_position_embeddings"]
T = [0.0, 0.3, 1.0]
# class, its config's class, entries of the config, inputs, loss
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Any, str]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        IDS,
        "next_token",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, IDS, "next_token"),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, IDS, "tokens"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)},
        "tokens",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, PIXELS, "classes"),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**TEXT, "eos_token_id": 63, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": IMAGE,
            "projection_dim": 8,
        },
        {"input_ids": IDS, "pixel_values": PIXELS},
        "embeddings",
    ),
}


def embeddings(outputs: Any, _: Tensor) -> Tensor:
    return outputs.image_embeds.square().mul(torch.arange(8)).sum(1) + outputs.text_embeds[:, 0]


def network(family: str, seed: int, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    kind, config, entries, _, _ = FAMILIES[family]
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**entries, **more)
    return getattr(transformers, kind)(made).eval()


def targets_of(loss: str) -> tuple[Tensor, str | Callable[..., Tensor]]:
    if loss == "classes":
        return torch.arange(6) % 2, "cross_entropy"
    if loss == "embeddings":
        return torch.zeros(6), embeddings
    return IDS, "next_token" if loss == "next_token" else "cross_entropy"


def right(model: Any, inputs: Any, y: Tensor, loss: str) -> float:
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if loss == "embeddings":
        return embeddings(outputs, y).mean().item()
    logits = outputs.logits
    if loss == "classes":
        return F.cross_entropy(logits, y).item()
    if loss == "next_token":
        logits, y = logits[:, :-1], y[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()


def in_float64(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: in_float64(value) for name, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


def check_line(family: str, folders: list[Path], mixture: bool) -> None:
    """A line, and a mixture, equal transformers' own models; ends are the given ones."""
    _, _, _, inputs, kind = FAMILIES[family]
    y, loss = targets_of(kind)
    model = build(f"hf:{folders[0]}")
    path = mc.Mixture(folders) if mixture else mc.Line(*folders)
    points: Any = [[1 - t, t] for t in T] if mixture else T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mc.evaluate(model, path, (inputs, y), points, loss=loss, metrics=["loss"])
    own = [type(model).from_pretrained(folder, dtype=torch.float32) for folder in folders]
    states = [each.state_dict() for each in own]
    expected = []
    for point, t in zip(points, T):
        middle = type(model)(own[0].config).double().eval()
        state = {k: (1 - t) * v.double() + t * states[1][k].double() for k, v in states[0].items()}
        middle.load_state_dict(
            {k: v if states[0][k].is_floating_point() else states[0][k] for k, v in state.items()}
        )
        expected.append(right(middle, in_float64(inputs), y, kind))
        for end in (0, 1):
            if t == end:
                given = path.at(point)
                assert all(torch.equal(given[k], v) for k, v in states[end].items())
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_folders_of_real_models(family: str, dtype: torch.dtype, tmp_path: Path):
    shard = "5KB" if dtype == torch.bfloat16 else "5GB"
    ties = [True, False] if family in ("gpt2", "llama", "bert", "t5") else [None]
    for tie in ties:
        more = {} if tie is None else {"tie_word_embeddings": tie}
        folders = [tmp_path / f"{tie}-{seed}" for seed in (1, 2)]
        for seed, folder in enumerate(folders):
            made = network(family, seed, **more).to(dtype)
            made.save_pretrained(folder, max_shard_size=shard)
        check_line(family, folders, mixture=bool(tie))


def test_names_that_transformers_converts(tmp_path: Path):
    a, b = network("vit", 1), network("vit", 2)
    names = saved_names(a)
    for seed, made in enumerate((a, b)):
        made.save_pretrained(tmp_path / str(seed))
    saved = mc.load(tmp_path / "0")
    if not names:
        assert saved.keys() == a.state_dict().keys()
        pytest.skip("this version of transformers saves a ViT under the names of its modules")
    assert saved.keys() - a.state_dict().keys() == names.keys()
    path = mc.Line(tmp_path / "0", tmp_path / "1")
    mc.explain(a, path, PIXELS[:2], 3)
    for end, made in enumerate((a, b)):
        state = path.at(float(end))
        assert all(torch.equal(state[k], v) for k, v in made.state_dict().items())


def test_modules_of_others_have_their_names():
    assert saved_names(nn.Linear(2, 2)) == {}
