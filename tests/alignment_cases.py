"""Networks whose permutations are counted by hand, for the tests of alignment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignment_networks import (
    Autoencoder,
    Bert,
    ConvNeXt,
    DenseNet,
    Encoder,
    Flat,
    HandGRU,
    LastState,
    Llama,
    Mixer,
    Mobile,
    Normed,
    Packed,
    Padded,
    Recurrent,
    ResNeXt,
    Shared,
    Shuffle,
    UNet,
)
from alignment_pretrained import GPT2, ClassToken, Phi
from modeconn import models


def lg(n: int) -> float:
    """The decimal logarithm of n!."""
    return math.lgamma(n + 1) / math.log(10)


def heads(width: int, count: int, layers: int, hidden: int) -> float:
    """A transformer: the stream, and in each layer its heads, units in them twice, and hidden."""
    return lg(width) + layers * (lg(count) + 2 * count * lg(width // count) + lg(hidden))


@dataclass
class Case:
    """A network, inputs for it, and the decimal logarithm of the number of its permutations."""

    make: Callable[[], nn.Module]
    x: Tensor
    log10: float
    quick: bool = False


def randomized(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with all parameters and statistics drawn at random, in float64."""
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn_like(value))
    return model


def _rnn(kind: str, both: bool) -> Case:
    log10 = lg(7) * (4 if both else 2)
    return Case(lambda: Recurrent(kind, both=both), SEQUENCE, log10, quick=both and kind == "LSTM")


_G = torch.Generator().manual_seed(0)
ROW = torch.randn(64, 10, generator=_G)
SEQUENCE = torch.randn(48, 5, 10, generator=_G)
IMAGE = torch.randn(32, 3, 8, 8, generator=_G)
LARGE = torch.randn(16, 3, 32, 32, generator=_G)
TOKENS = torch.randint(0, 11, (48, 6), generator=_G)
CASES: dict[str, Case] = {
    "mlp": Case(lambda: models.build("mlp:10-8-7-5"), ROW, lg(8) + lg(7), quick=True),
    "vgg": Case(
        lambda: models.build("vgg11:width=4"),
        LARGE,
        lg(4) + lg(8) + 2 * lg(16) + 4 * lg(32) + 2 * lg(32),
    ),
    "vgg_bn": Case(
        lambda: models.build("vgg11_bn:width=4"),
        LARGE,
        lg(4) + lg(8) + 2 * lg(16) + 4 * lg(32) + 2 * lg(32),
    ),
    "resnet20": Case(lambda: models.build("resnet20:width=4"), LARGE, 4 * (lg(4) + lg(8) + lg(16))),
    "vit": Case(lambda: models.build("vit:layers=2,width=24,heads=3"), LARGE, heads(24, 3, 2, 96)),
    "gpt": Case(lambda: models.build("gpt:layers=2,width=24,heads=3"), TOKENS, heads(24, 3, 2, 96)),
    "encoder": Case(Encoder, torch.randn(32, 5, 12, generator=_G), heads(16, 4, 1, 20), quick=True),
    "packed": Case(Packed, SEQUENCE, heads(12, 3, 1, 1), quick=True),
    "bert": Case(Bert, TOKENS, heads(16, 4, 2, 20)),
    "llama": Case(Llama, TOKENS, lg(32) + lg(2) + 2 * lg(2) + 2 * lg(8) + lg(24), quick=True),
    "gpt2": Case(GPT2, TOKENS, heads(16, 4, 1, 32), quick=True),
    "phi": Case(Phi, TOKENS, lg(32) + lg(2) + 2 * lg(2) + 2 * lg(8) + lg(24), quick=True),
    "class_token": Case(ClassToken, IMAGE, heads(16, 4, 1, 20)),
    **{f"{kind.lower()}": _rnn(kind, False) for kind in ("RNN", "GRU", "LSTM")},
    **{f"{kind.lower()}_both": _rnn(kind, True) for kind in ("RNN", "GRU", "LSTM")},
    "last_state": Case(LastState, SEQUENCE, 2 * lg(7)),
    "hand_gru": Case(HandGRU, SEQUENCE, lg(8)),
    "mobile": Case(Mobile, IMAGE, lg(6) + lg(12) + lg(5)),
    "resnext": Case(ResNeXt, IMAGE, lg(8) + lg(3) + 2 * 3 * lg(4), quick=True),
    "convnext": Case(ConvNeXt, IMAGE, lg(6) + 2 * lg(12)),
    "mixer": Case(Mixer, IMAGE, lg(6) + 2 * (lg(5) + lg(7))),
    "groupnorm": Case(lambda: Normed(nn.GroupNorm(4, 8)), IMAGE, lg(4) + 4 * lg(2)),
    "layernorm": Case(lambda: Normed(nn.LayerNorm([8, 8, 8])), IMAGE, lg(8)),
    "flat": Case(Flat, IMAGE, lg(6) + lg(9)),
    "unet": Case(UNet, IMAGE, lg(8) + lg(9) + lg(7) + lg(6), quick=True),
    "densenet": Case(DenseNet, IMAGE, lg(8) + 3 * lg(4)),
    "shuffle": Case(Shuffle, IMAGE, 2 * 3 * lg(4)),
    "padded": Case(Padded, IMAGE, lg(6) + lg(10) + lg(2) + lg(2)),
    "shared": Case(Shared, ROW, lg(8)),
    "autoencoder": Case(Autoencoder, ROW, lg(8), quick=True),
}
