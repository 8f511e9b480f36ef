"""Requested parts of attention: heads, queries, keys, values and tokens, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from liveness_cases import HEADS, TOKENS, WIDTH, X, Y, nodes
from modeconn.models import build
from naive import clone, pass_per_point
from plan_cases import agrees, moved

SIZE = WIDTH // HEADS


def split(qkv: Tensor, n: int) -> list[Tensor]:
    return [part.view(n, TOKENS, HEADS, SIZE).transpose(1, 2) for part in qkv.split(WIDTH, dim=2)]


def chunked(qkv: Tensor, n: int) -> list[Tensor]:
    return [part.unflatten(-1, (HEADS, SIZE)).permute(0, 2, 1, 3) for part in qkv.chunk(3, dim=-1)]


def unbound(qkv: Tensor, n: int) -> list[Tensor]:
    return list(qkv.reshape(n, TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0))


def sliced(qkv: Tensor, n: int) -> list[Tensor]:
    parts = qkv[..., :WIDTH], qkv[..., WIDTH : 2 * WIDTH], qkv[..., 2 * WIDTH :]
    return [part.reshape(n, TOKENS, HEADS, SIZE).transpose(1, 2) for part in parts]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / SIZE**0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Attention in one of the usual ways of writing it, then the mean over the tokens."""

    def __init__(
        self, parts: Callable[..., list[Tensor]] = split, attend: Callable[..., Tensor] = fused
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.head = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 10),
        )
        self.parts, self.attend = parts, attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x), x.shape[0])
        y = self.attend(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head((x + self.out(y)).mean(1))


def rows_of(head: int) -> Tensor:
    """The rows of a fused projection that make a head's queries, keys and values."""
    return torch.cat([part * WIDTH + head * SIZE + torch.arange(SIZE) for part in range(3)])


def flops(model: nn.Module, path: mc.Line, x: Tensor) -> float:
    return mc.explain(model, path, x, 101).flops


@pytest.mark.parametrize(
    "parts, attend",
    [(split, causal), (chunked, fused), (unbound, by_hand), (sliced, fused)],
    ids=lambda f: f.__name__,
)
def test_dead_heads(parts, attend):
    """Heads whose output columns are zero are not computed; heads that are live in part are."""
    model = Attention(parts, attend)
    state = clone(model)
    state["out.weight"][:, SIZE : 2 * SIZE] = 0
    state["out.weight"][:, 1] = 0  # one unit of a head that is live
    dead = moved(state, "qkv.weight", rows=rows_of(1))
    assert nodes(model, mc.Line(state, dead), X, "qkv") == [f"constant {6 * SIZE}/{9 * SIZE}"]
    agrees(model, mc.Line(state, dead), X, Y)
    live = mc.Line(state, moved(state, "qkv.weight"))
    assert nodes(model, live, X, "qkv")[0].endswith(f"{6 * SIZE}/{9 * SIZE}")
    agrees(model, live, X, Y)
    other = clone(state)
    other["out.weight"][3, SIZE] = 1e-30  # live at one end: live
    assert nodes(model, mc.Line(other, moved(state, "qkv.weight")), X, "qkv")[0].endswith("all")
    assert flops(model, live, X) < 0.8 * flops(model, mc.Line(other, moved(state, "qkv.weight")), X)


def test_values_that_move_alone_are_a_combination():
    """Attention is linear in its values; not in its keys, and not where keys move as well."""
    model = Attention()
    state = clone(model)
    values, keys = (
        moved(state, "qkv.weight", rows=slice(part * WIDTH, (part + 1) * WIDTH)) for part in (2, 1)
    )
    plan = mc.explain(model, mc.Line(state, values), X, 101)
    assert {row["class"] for row in plan.nodes(plan.program.segments[0])} <= {
        "constant",
        "combination",
    }
    assert plan.point_flops == 101 * 2 * 2 * 10, "two logits a class to combine"
    for other in (values, keys, moved(state, "qkv.bias")):
        agrees(model, mc.Line(state, other), X, Y)
    plan = mc.explain(model, mc.Line(state, keys), X, 101)
    classes = {row["op"]: row["class"] for row in plan.nodes(plan.program.segments[0])}
    assert classes["scaled_dot_product_attention"] == "varying"


def test_a_product_of_values_is_linear_in_one_of_them():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = (
                nn.Linear(WIDTH, 8),
                nn.Linear(WIDTH, 8),
                nn.Linear(8, 10),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, 0]
            return self.down(torch.sigmoid(self.gate(x)) * self.up(x) / (1 + self.gate(x).square()))

    model = Gate()
    state = clone(model)
    state["down.weight"][:, 5:] = 0
    assert nodes(model, mc.Line(state, moved(state, "up.weight")), X, "down") == ["combination all"]
    assert nodes(model, mc.Line(state, moved(state, "gate.weight")), X, "down") == ["varying all"]
    both = moved(moved(state, "gate.weight"), "up.weight")
    assert nodes(model, mc.Line(state, both), X, "up") == ["combination 5/8"]
    for other in (moved(state, "up.weight"), moved(state, "gate.weight"), both):
        agrees(model, mc.Line(state, other), X, Y)


class Masked(nn.Module):
    """Masks of a head, and of a row and a head; fewer heads of keys than of queries."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, keys = kind, 8 if kind == "grouped" else 16
        self.q, self.k, self.v = (nn.Linear(WIDTH, width) for width in (16, keys, keys))
        self.out = nn.Linear(16, 10)
        self.bias = nn.Parameter(torch.randn(4, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.kind == "grouped":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.kind == "rows":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(x[:, :, 0] > -1)[:, None, None])
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.out(y.transpose(1, 2).flatten(2))[:, 2]


@pytest.mark.parametrize("kind", ["entry", "rows", "grouped"])
def test_masks(kind):
    model = Masked(kind)
    state = clone(model)
    state["out.weight"][:, 4:8] = 0
    path = mc.Line(state, moved(state, "q.weight"))
    queries = "combination 1/5 × 12/16" if kind != "grouped" else "combination 1/5"
    assert nodes(model, path, X, "q") == [queries], "of one token"
    assert nodes(model, path, X, "v") == ["constant all" if kind == "grouped" else "constant 12/16"]
    for key in ("q.weight", "k.weight", "v.weight", "bias"):
        agrees(model, mc.Line(state, moved(state, key)), X, Y)


def test_tokens_that_nobody_reads():
    """Behind the last attention a class token's network is computed for that token only."""
    torch.manual_seed(0)
    a, b = (build("vit:width=12,layers=2,image=16,patch=4") for _ in range(2))
    x = torch.randn(9, 3, 16, 16)
    path = mc.Line(a, b)
    first, last = (nodes(a, path, x, f"encoder.layers.encoder_layer_{i}.mlp.0") for i in (0, 1))
    assert (first, last) == (["varying all"], ["varying 1/17"])
    assert nodes(a, path, x, "encoder.layers.encoder_layer_1.ln_1") == ["varying all"], (
        "keys and values take all tokens"
    )
    agrees(a, path, x, torch.arange(9) % 10)


def test_heads_among_the_rows_are_not_told_apart():
    """PyTorch's attention folds heads into the batch: all are computed, of the tokens read."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 16, batch_first=True, activation="gelu", norm_first=True
    )
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), layer, nn.Flatten(), nn.Linear(TOKENS * WIDTH, 10)
    )
    state = clone(model)
    state["1.self_attn.out_proj.weight"][:, :SIZE] = 0
    state["3.weight"][:, WIDTH:] = 0  # the first token alone is read
    state["1.linear2.weight"][:, 9:] = 0
    path = mc.Line(state, moved(state, "0.weight"))
    assert nodes(model, path, X, "1.linear1") == ["varying 1/5 × 9/16"]
    agrees(model, path, X, Y)
    for key in ("1.self_attn.in_proj_weight", "1.linear1.weight", "1.norm2.bias"):
        agrees(model, mc.Line(state, moved(state, key)), X, Y)


def test_causal_attention_counts_from_the_first_query():
    class Last(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(self.qkv(x), x.shape[0])
            return self.head(self.attend(q, k, v).transpose(1, 2).reshape(x.shape)[:, -2])

    for attend in (causal, fused):
        model = Last(attend=attend)
        path = mc.Line(model, moved(model.state_dict(), "qkv.weight"))
        agrees(model, path, X, Y)
        plan = mc.explain(model, path, X, 11)
        (units,) = (
            row["units"] for row in plan.nodes(plan.program.segments[0]) if "attention" in row["op"]
        )
        assert units == ("all" if attend is causal else f"1/{TOKENS}")


def test_gradients_through_heads():
    """Where control points require gradients, weights that are zero count as any others."""
    model = Attention().double()
    state = clone(model)
    state["out.weight"][:, :SIZE] = 0
    path, x = mc.Line(state, moved(state, "qkv.weight")), X[:3].double()
    first, second = path.control_points
    for value in first.values():
        value.requires_grad_()
    got = mc.forward(model, path, [0.3], x, precision="float64")[0]
    expected = torch.func.functional_call(
        model, {key: 0.7 * first[key] + 0.3 * second[key] for key in first}, x
    )
    torch.testing.assert_close(got, expected)
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), list(first.values())) for out in (got, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_every_backend(backend):
    """Parts of values under every backend: heads, tokens, a sum over some units of its input."""
    if backend == "triton":
        pytest.importorskip("triton")
    model = Attention()
    state = clone(model)
    state["out.weight"][:, :SIZE] = 0
    state["head.weight"][:, 6:] = 0
    path = mc.Line(state, moved(moved(state, "qkv.weight"), "out.weight", rows=slice(0, 6)))
    path.control_points[1]["out.weight"][:, :SIZE] = 0
    try:
        got = mc.evaluate(model, path, (X, Y), 5, backend=backend)
    except mc.ModeconnError as error:
        pytest.skip(str(error))
    exact = pass_per_point(model, path, X, Y, got.t, torch.float64)
    np.testing.assert_allclose(got.loss, exact["loss"], rtol=2e-6)
