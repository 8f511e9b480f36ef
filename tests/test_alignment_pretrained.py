"""Models of transformers: their permutations counted by hand, and planted ones found from data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from alignment_cases import heads, lg, randomized

pytestmark = pytest.mark.slow

_G = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, 11, (48, 6), generator=_G)
IMAGES = torch.randn(32, 3, 8, 8, generator=_G, dtype=torch.float64)
WIDTH, HEADS, LAYERS, HIDDEN = 16, 4, 2, 20
BLOCKS = heads(WIDTH, HEADS, LAYERS, HIDDEN)
# Queries share two heads of keys and values; rotary positions keep the units of a query in place.
GROUPED = lg(WIDTH) + LAYERS * (lg(2) + 2 * lg(2) + 2 * lg(WIDTH // HEADS) + lg(HIDDEN))
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
}
GROUPS = BERT | {"num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 8}

# Class, its configuration, inputs, and the decimal logarithm of the number of permutations.
CASES: dict[str, tuple[str, dict[str, Any], Tensor, float]] = {
    "gpt2": (
        "GPT2LMHeadModel GPT2Config",
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": HIDDEN,
            "vocab_size": 11,
            "n_positions": 8,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        TOKENS,
        BLOCKS,
    ),
    # the pooler has hidden units of its own
    "bert": (
        "BertForSequenceClassification BertConfig",
        BERT | {"vocab_size": 11, "max_position_embeddings": 8, "num_labels": 3},
        TOKENS,
        BLOCKS + lg(WIDTH),
    ),
    "llama": ("LlamaForCausalLM LlamaConfig", GROUPS, TOKENS, GROUPED),
    "phi3": ("Phi3ForCausalLM Phi3Config", GROUPS | {"pad_token_id": 0}, TOKENS, GROUPED),
    "vit": (
        "ViTForImageClassification ViTConfig",
        BERT | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        IMAGES,
        BLOCKS,
    ),
}


def maker(classes: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    transformers = pytest.importorskip("transformers")
    model, config = (getattr(transformers, name) for name in classes.split())
    return lambda: model(config(**options))


@pytest.mark.parametrize("name", CASES)
def test_models_of_transformers(name: str):
    classes, options, x, log10 = CASES[name]
    make = maker(classes, options)
    model = randomized(make)
    groups = mc.symmetries(model, x)
    assert groups.log10 == pytest.approx(log10, abs=1e-9), str(groups)
    state = groups.permuted(model.state_dict(), groups.random(3))
    assert any(not torch.equal(state[key], value) for key, value in model.state_dict().items())
    other = randomized(make)
    other.load_state_dict(state)
    with torch.no_grad():
        expected, found = (net(x).logits for net in (model, other))
    # norms and angles of the others are computed in float32, whatever the weights are
    most = 1e-5 if name in ("llama", "phi3") else 1e-10
    assert (found - expected).abs().max() <= most * expected.abs().max()
    aligned = mc.align(model, model, state, (x, torch.zeros(len(x))), groups=groups).apply(state)
    for key, value in model.state_dict().items():
        assert torch.equal(aligned[key], value), key
