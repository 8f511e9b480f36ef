"""Networks written as those of transformers are: one projection, grouped heads, class tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignment_networks import Llama


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


class GPT2(nn.Module):
    """Queries, keys and values of one Conv1D, and the output layer tied to the embedding."""

    def __init__(self, w: int = 16, h: int = 4, layers: int = 1):
        super().__init__()
        self.w, self.h = w, h
        self.wte, self.wpe = nn.Embedding(11, w), nn.Embedding(9, w)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(w),
                    "c_attn": Conv1D(w, 3 * w),
                    "c_proj": Conv1D(w, w),
                    "ln_2": nn.LayerNorm(w),
                    "c_fc": Conv1D(w, 2 * w),
                    "down": Conv1D(2 * w, w),
                }
            )
            for _ in range(layers)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(w), nn.Linear(w, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.wte(tokens) + self.wpe(torch.arange(t))
        for b in self.blocks:
            parts = b["c_attn"](b["ln_1"](x)).split(self.w, dim=2)
            q, k, v = (part.view(n, t, self.h, -1).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["c_proj"](y.transpose(1, 2).contiguous().view(n, t, self.w))
            x = x + b["down"](F.gelu(b["c_fc"](b["ln_2"](x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))


class Phi(Llama):
    """A Llama with queries, keys and values in one layer, and gates and hidden units in another."""

    def __init__(self, w: int = 32, h: int = 4, kv: int = 2):
        super().__init__(w, h, kv)
        del self.q, self.k, self.v, self.g, self.u
        self.qkv = nn.Linear(w, (h + 2 * kv) * self.d, bias=False)
        self.gate_up = nn.Linear(w, 48, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.emb(tokens)
        qkv, h, kv, d = self.qkv(self.n1(x)), self.h, self.kv, self.d
        at = h * d, (h + kv) * d
        q = self.turned(qkv[..., : at[0]].view(n, t, h, d).transpose(1, 2), t)
        k = self.turned(qkv[..., at[0] : at[1]].view(n, t, kv, d).transpose(1, 2), t)
        v = qkv[..., at[1] :].view(n, t, kv, d).transpose(1, 2)
        size = (n, kv, h // kv, t, d)
        k, v = (z[:, :, None].expand(size).reshape(n, h, t, d) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, -1))
        gate, up = self.gate_up(self.n2(x)).chunk(2, dim=-1)
        return self.head(x + self.dn(up * F.silu(gate)))


class ClassToken(nn.Module):
    """A vision transformer that reads its class token: patches by a convolution, positions."""

    def __init__(self, w: int = 16, h: int = 4, hidden: int = 20):
        super().__init__()
        self.h, self.patches = h, nn.Conv2d(3, w, 4, 4)
        self.cls, self.places = (nn.Parameter(torch.randn(1, k, w)) for k in (1, 5))
        self.q, self.k, self.v, self.o = (nn.Linear(w, w) for _ in range(4))
        self.n1, self.n2, self.n3 = (nn.LayerNorm(w) for _ in range(3))
        self.up, self.down, self.fc = nn.Linear(w, hidden), nn.Linear(hidden, w), nn.Linear(w, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places
        y = self.n1(x)
        q, k, v = (
            each(y).view(*y.shape[:2], self.h, -1).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.o(y.reshape(x.shape))
        return self.fc(self.n3(x + self.down(F.gelu(self.up(self.n2(x)))))[:, 0])
