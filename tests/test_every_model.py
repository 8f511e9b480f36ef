"""Every kind of model of issues and papers: loss and error along paths, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.models import build
from naive import pass_per_point, re_estimated
from policy import assert_within_policy

IMAGES = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(65, 20, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (7, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor([6, 5, 4, 6, 2, 3, 6])[:, None]).long()


class Tied(nn.Module):
    """A layer back with the weight of the layer in, transposed; a last layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back, self.head = nn.Linear(20, 13), nn.Linear(13, 20), nn.Linear(20, 10)
        self.back.weight = nn.Parameter(self.into.weight.detach().t().clone())
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.into(x))
        return self.head(
            torch.tanh(F.linear(hidden, self.into.weight.t(), self.back.bias))
        ) + 0.5 * self.again(x)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=11,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
            num_labels=3,
        )
    )


def of_spec(spec: str) -> Callable[[], nn.Module]:
    return lambda: build(spec)


# What makes the model, its inputs, and its targets.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "mlp": (of_spec("mlp:20-33x2-10"), ROWS, torch.arange(65) % 10),
    "tied": (Tied, ROWS, torch.arange(65) % 10),
    "vgg11": (of_spec("vgg11:width=3"), IMAGES, torch.arange(9) % 10),
    "vgg11_bn": (of_spec("vgg11_bn:width=3"), IMAGES, torch.arange(9) % 10),
    "resnet20": (of_spec("resnet20:width=3"), IMAGES[:, :, :20, :20], torch.arange(9) % 10),
    "vit": (of_spec("vit:width=12,layers=2,image=32,patch=8"), IMAGES, torch.arange(9) % 10),
    "gpt": (
        of_spec("gpt:vocab=11,context=8,width=12,layers=2,heads=3"),
        TOKENS,
        TOKENS.roll(-1, 1),
    ),
    "gpt2": (gpt2, TOKENS, TOKENS.roll(-1, 1)),
    "bert": (bert, {"input_ids": TOKENS, "attention_mask": MASK}, torch.arange(7) % 3),
}
DTYPES = torch.float32, torch.float64
POINTS = 9  # the ends, the breakpoint of the chain, and some within each of its segments
NORMS = ("vgg11_bn", "resnet20")


def drawn(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    """Networks of one kind, with nothing that is zero or one by initialisation."""
    networks = []
    for seed in range(count):
        torch.manual_seed(seed)
        networks.append(make())
        transformer = any(
            isinstance(module, nn.Embedding | nn.LayerNorm) for module in networks[-1].modules()
        )
        for module in networks[-1].modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                module.running_mean.normal_(std=0.1)  # type: ignore[operator]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator]
        for parameter in networks[-1].parameters() if transformer else ():
            nn.init.normal_(parameter, std=0.3)
    return networks


PATHS: dict[str, Callable[[list[nn.Module]], mc.Line | mc.PolyChain]] = {
    "line": lambda networks: mc.Line(*networks[:2]),
    "chain": mc.PolyChain,
}


@pytest.mark.filterwarnings(
    "ignore:batch norms .* interpolated",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_error(name):
    make, x, y = CASES[name]
    networks = drawn(make, 3)
    for kind, make_path in PATHS.items():
        path = make_path(networks)
        plain = exact = None
        for backend in ("reference", "native") if native.available() else ("reference",):
            got = mc.evaluate(networks[0], path, (x, y), POINTS, backend=backend)
            assert (got.passes, got.samples, got.backend) == (1, len(y), backend) and not got.info[
                "fallback"
            ]
            if exact is None:
                plain, exact = (pass_per_point(networks[0], path, x, y, got.t, d) for d in DTYPES)
            for metric in ("loss", "error"):
                what = f"{metric} of {name} along a {kind} by {backend}"
                assert_within_policy(
                    what, got.values[metric], plain[metric], exact[metric], torch.float32
                )


@pytest.mark.parametrize("name", NORMS)
def test_loss_and_error_with_recomputed_statistics(name):
    """The numbers of resetting and re-estimating the statistics with PyTorch at each point."""
    make, _, _ = CASES[name]
    networks = [network.double() for network in drawn(make, 3)]
    size = 32 if name == "vgg11_bn" else 20
    x, y = (
        torch.randn(15, 3, size, size, generator=torch.Generator().manual_seed(1)).double(),
        torch.arange(15) % 10,
    )
    for kind, make_path in PATHS.items():
        path = make_path(networks)
        t = np.linspace(0, 1, POINTS)
        plain = {
            dtype: re_estimated(networks[0], path, x, y, t, dtype, batch_size=8) for dtype in DTYPES
        }
        for dtype, backend in (
            (torch.float64, "reference"),
            (torch.float64, "auto"),
            (torch.float32, "auto"),
        ):
            options = {
                "buffers": "recompute",
                "batch_size": 8,
                "precision": str(dtype)[6:],
                "backend": backend,
            }
            got = mc.evaluate(networks[0], path, (x, y), t, **options)
            assert (got.passes, got.samples) == (2, 15)
            for metric in ("loss", "error"):
                what = f"{metric} of {name} along a {kind} by {backend}"
                assert_within_policy(
                    what,
                    got.values[metric],
                    plain[dtype][metric],
                    plain[torch.float64][metric],
                    dtype,
                )
