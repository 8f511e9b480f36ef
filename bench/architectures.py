"""Architectures as people have them, built small and with random weights, for the sweep.

Those of modeconn, bench/networks.py and torch.nn are always there; torchvision, timm and
transformers where they are installed. A case that cannot be built small says so when it is made.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.models import build

ROWS, TOKENS, VOCABULARY, CLASSES, PIXELS = 6, 12, 97, 5, 32
# Under whatever name a configuration of transformers has them: sizes that make a model tiny.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "emb_dim", "projection_dim", "hidden_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "d_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_hidden_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "d_head"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "image_size": PIXELS,
    "patch_size": 8,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        family: the package that it comes from.
        make: builds one with random weights.
        inputs: rows of input.
        kind: of the loss: "classes" of samples, or of "tokens".
        classes: how many there are.
    """

    family: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    kind: str = "classes"
    classes: int = CLASSES


def images(size: int = PIXELS) -> Tensor:
    """Images of three channels."""
    return torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(0))


def vectors(width: int = 24) -> Tensor:
    """Rows of numbers."""
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    """Texts of random tokens, none of which is the one for padding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)


def padded() -> dict[str, Tensor]:
    """Texts of several lengths, with their masks, as a tokenizer gives them."""
    ids = tokens()
    mask = torch.arange(TOKENS)[None] < torch.arange(TOKENS, TOKENS - ROWS, -1)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


# -- modeconn, bench/networks.py, torch.nn ---------------------------------------------------------


class Encoder(nn.Module):
    """torch.nn's transformer over tokens, with a linear layer on their mean."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=first)
        self.table = nn.Embedding(VOCABULARY, 32)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.table(x)).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent network over tokens, and a linear layer on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(24, CLASSES)
        self.body = kind(16, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.table(x))[0][:, -1])  # type: ignore[no-any-return]


def _deep(layers: int) -> nn.Module:
    pairs = [(nn.Linear(24, 24), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*itertools.chain.from_iterable(pairs), nn.Linear(24, CLASSES))


def _own() -> Iterator[Case]:
    for spec in ("vgg11:width=8", "resnet20"):
        yield Case("modeconn", spec, functools.partial(build, spec), images, classes=10)
    yield Case("modeconn", "mlp", lambda: build("mlp:24-32x3-5"), vectors)
    yield Case("modeconn", "vit", lambda: build("vit:width=48,layers=2"), images, classes=10)
    small = f"gpt:vocab={VOCABULARY},context=16,width=48,layers=2"
    yield Case("modeconn", "gpt", lambda: build(small), tokens, "tokens", VOCABULARY)
    for name in ("pre_resnet20", "se_resnet20", "densenet28"):
        make = getattr(importlib.import_module("networks"), name)
        yield Case("bench", name, make, images, classes=10)
    yield Case("torch.nn", "TransformerEncoder", lambda: Encoder(False), tokens)
    yield Case("torch.nn", "TransformerEncoder, norms first", lambda: Encoder(True), tokens)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        yield Case("torch.nn", kind.__name__, functools.partial(Recurrent, kind), tokens)
    yield Case("torch.nn", "201 layers", lambda: _deep(100), vectors)


# -- torchvision and timm --------------------------------------------------------------------------


def _torchvision() -> Iterator[Case]:
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        size = 299 if name.startswith("inception") else 224 if "vi" in name else 64

        def make(name: str = name) -> nn.Module:
            return models.get_model(name, weights=None, num_classes=CLASSES)

        yield Case("torchvision", name, make, functools.partial(images, size))


def _timm() -> Iterator[Case]:
    timm = importlib.import_module("timm")
    for name in timm.list_models(exclude_filters=["*large*", "*huge*", "*giant*"]):

        def make(name: str = name) -> nn.Module:
            return timm.create_model(name, pretrained=False, num_classes=CLASSES)

        size = timm.models.get_pretrained_cfg(name).input_size[-1]
        yield Case("timm", name, make, functools.partial(images, size))


# -- transformers ----------------------------------------------------------------------------------


def small_configuration(config_class: Any) -> Any:
    """A configuration of transformers with every size that it has made tiny."""
    usual = config_class()
    given = {name: value for name, value in _SMALL.items() if hasattr(usual, name)}
    for name in ("depths", "hidden_sizes", "num_heads", "embed_dims", "sr_ratios"):
        value = getattr(usual, name, None)
        if isinstance(value, (list, tuple)):
            small = {"depths": 1, "num_heads": 2}.get(name, 16)
            given[name] = [small] * len(value)
    return config_class(**given)


def _transformer(config_name: str, model_name: str) -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = small_configuration(getattr(transformers, config_name))
    made: nn.Module = getattr(transformers, model_name)(config)
    return made


_TASKS = (
    ("CAUSAL_LM", tokens, "tokens"),
    ("SEQUENCE_CLASSIFICATION", padded, "classes"),
    ("IMAGE_CLASSIFICATION", images, "classes"),
)


def _transformers() -> Iterator[Case]:
    auto = importlib.import_module("transformers.models.auto")
    configs = auto.configuration_auto.CONFIG_MAPPING_NAMES
    for task, inputs, kind in _TASKS:
        for key, model in getattr(auto.modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            name = model if isinstance(model, str) else model[0]
            make = functools.partial(_transformer, configs[key], name)
            classes = VOCABULARY if kind == "tokens" else CLASSES
            yield Case("transformers", name, make, inputs, kind, classes)


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "modeconn": _own,
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
# What `make sweep` takes of each package: a member of each kind. The others are in `--all`.
SAMPLE = {
    "torchvision": (
        "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2 "
        "mobilenet_v3_small regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 "
        "squeezenet1_1 swin_t vgg11_bn vit_b_16"
    ).split(),
    "timm": (
        "resnet10t convnext_atto vit_tiny_patch16_224 mixer_s32_224 mobileone_s0 repghostnet_050 "
        "mixnet_s regnetz_b16 efficientvit_b0 levit_128s"
    ).split(),
    "transformers": (
        "GPT2LMHeadModel LlamaForCausalLM Phi3ForCausalLM Qwen2ForCausalLM GemmaForCausalLM "
        "MistralForCausalLM BloomForCausalLM OPTForCausalLM GPTNeoXForCausalLM FalconForCausalLM "
        "XLNetLMHeadModel BertLMHeadModel MambaForCausalLM BertForSequenceClassification "
        "RobertaForSequenceClassification DistilBertForSequenceClassification "
        "DebertaV2ForSequenceClassification ElectraForSequenceClassification "
        "AlbertForSequenceClassification ViTForImageClassification "
        "ConvNextForImageClassification SwinForImageClassification ResNetForImageClassification "
        "MobileNetV2ForImageClassification"
    ).split(),
}


def cases(every: bool, only: str = "") -> tuple[list[Case], list[str]]:
    """The cases to try, and the packages that are not installed.

    Args:
        every: all that the packages list, or the sample.
        only: a part of the names to keep.
    """
    found, missing = [], []
    for family, listed in FAMILIES.items():
        if family != "modeconn" and importlib.util.find_spec(family) is None:
            missing.append(family)
            continue
        for case in listed():
            wanted = every or family not in SAMPLE or case.name in SAMPLE[family]
            if wanted and only in case.name:
                found.append(case)
    return found, missing
