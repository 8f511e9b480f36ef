"""Networks of all kinds whose units can be permuted: attention, recurrent, convolutions, ties."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(12, 16)
        self.enc = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True, dropout=0.0)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.enc(self.emb(x)).mean(1))


class Bert(nn.Module):
    """Post-norm attention written out, with position and type embeddings and biases of scores."""

    def __init__(self, width=16, count=4, hidden=20, layers=2):
        super().__init__()
        self.count = count
        self.words, self.places = nn.Embedding(11, width), nn.Embedding(9, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{k: nn.Linear(width, width) for k in "qkvo"},
                    "n1": nn.LayerNorm(width),
                    "up": nn.Linear(width, hidden),
                    "down": nn.Linear(hidden, width),
                    "n2": nn.LayerNorm(width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 11)

    def forward(self, tokens):
        n, t = tokens.shape
        x = self.norm(self.words(tokens) + self.places(torch.arange(t)))
        for b in self.layers:
            q, k, v = (b[i](x).view(n, t, self.count, -1).transpose(1, 2) for i in "qkv")
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1)
            x = b["n1"](x + b["o"](y))
            x = b["n2"](x + b["down"](F.gelu(b["up"](x))))
        return self.head(x)


class Llama(nn.Module):
    """Rotary positions, queries that share heads of keys, RMS norm, gated hidden units."""

    def __init__(self, w=32, h=4, kv=2):
        super().__init__()
        self.h, self.kv, self.d = h, kv, w // h
        self.emb = nn.Embedding(11, w)
        self.q, self.o = nn.Linear(w, w, bias=False), nn.Linear(w, w, bias=False)
        self.k, self.v = (nn.Linear(w, kv * self.d, bias=False) for _ in range(2))
        self.n1, self.n2 = nn.RMSNorm(w), nn.RMSNorm(w)
        self.g, self.u = nn.Linear(w, 24, bias=False), nn.Linear(w, 24, bias=False)
        self.dn, self.head = nn.Linear(24, w, bias=False), nn.Linear(w, 11)
        angle = torch.arange(9.0)[:, None] * 10.0 ** -torch.arange(0, self.d, 2)[None]
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1), persistent=False)

    def turned(self, x, t):
        a, b = x.chunk(2, -1)
        return x * self.cos[:t] + torch.cat([-b, a], -1) * self.sin[:t]

    def forward(self, tokens):
        n, t = tokens.shape
        x = self.emb(tokens)
        y = self.n1(x)
        q = self.turned(self.q(y).view(n, t, self.h, self.d).transpose(1, 2), t)
        k = self.turned(self.k(y).view(n, t, self.kv, self.d).transpose(1, 2), t)
        v = self.v(y).view(n, t, self.kv, self.d).transpose(1, 2)
        size = (n, self.kv, self.h // self.kv, t, self.d)
        k, v = (z[:, :, None].expand(size).reshape(n, self.h, t, self.d) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, -1))
        y = self.n2(x)
        return self.head(x + self.dn(F.silu(self.g(y)) * self.u(y)))


class Recurrent(nn.Module):
    def __init__(self, kind, layers=2, h=7, both=False):
        super().__init__()
        self.r = getattr(nn, kind)(10, h, layers, batch_first=True, bidirectional=both)
        self.o = nn.Linear(2 * h if both else h, 5)

    def forward(self, x):
        return self.o(self.r(x)[0].mean(1))


class LastState(nn.Module):
    """Reads the last hidden state of the last layer, by its index."""

    def __init__(self):
        super().__init__()
        self.r, self.o = nn.LSTM(10, 7, 2, batch_first=True), nn.Linear(7, 5)

    def forward(self, x):
        return self.o(self.r(x)[1][0][-1])


class HandGRU(nn.Module):
    def __init__(self, h=8):
        super().__init__()
        self.h = h
        self.i, self.u, self.o = nn.Linear(10, 3 * h), nn.Linear(h, 3 * h), nn.Linear(h, 5)

    def forward(self, x):
        h = torch.zeros(x.shape[0], self.h, dtype=x.dtype)
        for k in range(3):
            a, b, c = self.i(x[:, k]).chunk(3, -1)
            d, e, f = self.u(h).chunk(3, -1)
            r, z = torch.sigmoid(a + d), torch.sigmoid(b + e)
            h = (1 - z) * torch.tanh(c + r * f) + z * h
        return self.o(h)


class Mobile(nn.Module):
    """Inverted residual with a depthwise convolution and gates of channels."""

    def __init__(self):
        super().__init__()
        self.st, self.b0 = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.e, self.b1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.d = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
        self.b2 = nn.BatchNorm2d(12)
        self.s1, self.s2 = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.p, self.b3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu6(self.b0(self.st(x)))
        h = F.relu6(self.b2(self.d(F.relu6(self.b1(self.e(x))))))
        h = h * torch.sigmoid(self.s2(F.relu(self.s1(F.adaptive_avg_pool2d(h, 1)))))
        x = x + self.b3(self.p(h))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ResNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.st, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.g, self.n = nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.BatchNorm2d(12)
        self.b, self.fc = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.st(x))
        return self.fc((x + self.b(F.relu(self.n(self.g(F.relu(self.a(x))))))).mean((2, 3)))


class ConvNeXt(nn.Module):
    """Depthwise convolutions, layer norm of channels last, hidden units, scales of branches."""

    def __init__(self, width=6, layers=2):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, width, 2, 2), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Conv2d(width, width, 3, padding=1, groups=width),
                    nn.LayerNorm(width),
                    nn.Linear(width, 2 * width),
                    nn.Linear(2 * width, width),
                ]
            )
            for _ in range(layers)
        )
        self.scales = nn.ParameterList(torch.ones(width) for _ in range(layers))

    def forward(self, x):
        x = self.stem(x)
        for (conv, norm, up, down), scale in zip(self.blocks, self.scales):
            y = down(F.gelu(up(norm(conv(x).permute(0, 2, 3, 1)))))
            x = x + (scale * y).permute(0, 3, 1, 2)
        return self.fc(x.mean((2, 3)))


class Mixer(nn.Module):
    def __init__(self, width=6, layers=2):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    *(nn.LayerNorm(width), nn.Linear(4, 5), nn.Linear(5, 4)),
                    *(nn.LayerNorm(width), nn.Linear(width, 7), nn.Linear(7, width)),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for n1, t1, t2, n2, c1, c2 in self.blocks:
            x = x + t2(F.gelu(t1(n1(x).transpose(1, 2)))).transpose(1, 2)
            x = x + c2(F.gelu(c1(n2(x))))
        return self.fc(x.mean(1))


class Normed(nn.Module):
    """A convolution with some norm behind it."""

    def __init__(self, norm):
        super().__init__()
        self.c, self.n, self.fc = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(F.relu(self.n(self.c(x))).mean((2, 3)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 64, 9)
        self.o = nn.Linear(9, 5)

    def forward(self, x):
        return self.o(F.relu(self.f(F.relu(self.c(x)).flatten(1))))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.m = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 9, 3, padding=1)
        self.u, self.o = nn.ConvTranspose2d(9, 7, 2, 2), nn.Conv2d(15, 6, 3, padding=1)
        self.l = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        a = F.relu(self.d(x))
        b = F.relu(self.m(F.max_pool2d(a, 2)))
        return self.l(F.relu(self.o(torch.cat([a, self.u(b)], 1))))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c0 = nn.Conv2d(3, 8, 3, padding=1)
        self.bs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.ns = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        h = self.c0(x)
        for n, c in zip(self.ns, self.bs):
            h = torch.cat([h, c(F.relu(n(h)))], 1)
        return self.fc(F.relu(h).mean((2, 3)))


class Shuffle(nn.Module):
    """Channels are shuffled between groups, so that groups keep their places."""

    def __init__(self):
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3)
        self.h, self.fc = nn.Conv2d(12, 12, 1, groups=3), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.g(F.relu(self.a(x))))
        n, c, h, w = x.shape
        x = x.view(n, 3, 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.relu(self.h(x)).mean((2, 3)))


class Padded(nn.Module):
    """A shortcut that skips pixels and pads channels with zeros, as ResNets for CIFAR have it."""

    def __init__(self):
        super().__init__()
        self.st, self.a = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, 2, 1)
        self.b, self.p = nn.Conv2d(10, 10, 3, padding=1), nn.PReLU(10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.st(x))
        y = self.b(self.p(self.a(x)))
        return self.fc(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.i(x))
        return self.o(F.relu(self.h(F.relu(self.h(x)))))


class Autoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self):
        super().__init__()
        self.i, self.b = nn.Linear(10, 8), nn.Parameter(torch.zeros(10))

    def forward(self, x):
        return F.linear(F.relu(self.i(x)), self.i.weight.t(), self.b)


class Packed(nn.Module):
    """Queries, keys and values of one projection, unflattened to three and taken by their index."""

    def __init__(self, width=12, count=3):
        super().__init__()
        self.count = count
        self.emb, self.qkv = nn.Linear(10, width), nn.Linear(width, 3 * width)
        self.o, self.fc = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.emb(x)
        n, t, w = x.shape
        parts = self.qkv(x).reshape(n, t, 3, self.count, w // self.count).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.fc((x + self.o(y.transpose(1, 2).reshape(n, t, w))).mean(1))
