"""Vision transformers (Dosovitskiy et al. 2021), with torchvision's names for the parameters."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from modeconn.errors import ModeconnError


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``, batch first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, tokens, width] of inputs of that shape."""
        n, tokens, width = x.shape
        joint = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (
            part.view(n, tokens, self.heads, -1).transpose(1, 2) for part in joint.chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        out: Tensor = self.out_proj(y)
        return out


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, ratio * width),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(ratio * width, width),
            nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, tokens, width] of inputs of that shape."""
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Positions added, the blocks, and a norm."""

    def __init__(self, tokens: int, width: int, layers: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, width))
        blocks = [(f"encoder_layer_{i}", EncoderBlock(width, heads, ratio)) for i in range(layers)]
        self.layers = nn.Sequential(OrderedDict(blocks))
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, tokens, width] of inputs of that shape."""
        out: Tensor = self.ln(self.layers(x + self.pos_embedding))
        return out


class ViT(nn.Module):
    """A vision transformer without dropout.

    Args:
        image, patch: sides of an image and of a patch, in pixels; the first is a multiple of the
            second.
        width: of a token; a multiple of `heads`.
        layers, heads: encoder blocks, and heads of attention in each.
        ratio: hidden units of a block's perceptron, as a multiple of the width.
        classes: outputs.
        channels: of the images.
    """

    def __init__(
        self,
        image: int = 32,
        patch: int = 4,
        width: int = 192,
        layers: int = 6,
        heads: int = 3,
        ratio: int = 4,
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ModeconnError(
                f"image is {image} and patch is {patch}: expected a patch that divides the image"
            )
        if width % heads:
            raise ModeconnError(
                f"width is {width} and heads is {heads}: "
                "expected a width that is a multiple of heads"
            )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(channels, width, patch, patch)
        self.encoder = Encoder((image // patch) ** 2 + 1, width, layers, heads, ratio)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, classes)))
        self.initialise(None)

    def initialise(self, generator: Generator | None) -> None:
        """Draw new weights as torchvision does, but for the head: as a perceptron's layer."""
        with torch.no_grad():
            self.class_token.zero_()
            nn.init.normal_(self.encoder.pos_embedding, std=0.02, generator=generator)
            fan_in = math.prod(self.conv_proj.weight.shape[1:])
            nn.init.trunc_normal_(
                self.conv_proj.weight, std=1 / math.sqrt(fan_in), generator=generator
            )
            nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, Attention):
                    nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
                    nn.init.zeros_(module.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, channels, image, image]."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        logits: Tensor = self.heads(self.encoder(tokens)[:, 0])
        return logits
