"""A GPT (Radford et al. 2019) of nanoGPT's shape and with its names for the parameters."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from modeconn.errors import ModeconnError


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, tokens, width] of inputs of that shape."""
        n, tokens, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (
            part.view(n, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(n, tokens, width))
        return out


class Perceptron(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, tokens, width] of inputs of that shape."""
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = CausalSelfAttention(width, heads, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = Perceptron(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, tokens, width] of inputs of that shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A language model without dropout; the output layer's weight is that of the token embedding.

    Args:
        vocab: the number of tokens.
        context: the longest text, in tokens.
        width: of a token; a multiple of `heads`.
        layers, heads: blocks, and heads of attention in each.
        bias: whether linear layers and norms have one.
    """

    def __init__(
        self,
        vocab: int = 65,
        context: int = 256,
        width: int = 384,
        layers: int = 6,
        heads: int = 6,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ModeconnError(
                f"width is {width} and heads is {heads}: "
                "expected a width that is a multiple of heads"
            )
        self.context = context
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(GPTBlock(width, heads, bias) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        self.initialise(None)

    def initialise(self, generator: Generator | None) -> None:
        """Draw new weights as nanoGPT does.

        They are normal, smaller for the projections into the residual stream; biases are zero.
        """
        layers = len(self.transformer["h"])  # type: ignore[arg-type]
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                small = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * layers) if small else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [N, length, vocab] of the tokens that follow those of int64 [N, length]."""
        length = tokens.shape[1]
        if length > self.context:
            raise ModeconnError(
                f"texts have {length} tokens: expected at most {self.context}, the model's context"
            )
        position = torch.arange(length, dtype=torch.int64, device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](position)
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return logits
