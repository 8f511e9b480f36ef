"""Users' networks, unchanged: several inputs and outputs, tied weights, tokens, half precision."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.evaluation.outputs import forward
from modeconn.models import build
from naive import pass_per_point
from policy import assert_within_policy

TOKENS = torch.randint(0, 11, (7, 6), generator=torch.Generator().manual_seed(0))


def two(make: Any, **options: Any) -> list[nn.Module]:
    """Make two networks with every tensor drawn anew: nothing is zero by initialisation."""
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(make(**options))
        for parameter in nets[-1].parameters():
            nn.init.normal_(parameter, std=0.3)
    return nets


def outputs_at(
    model: nn.Module,
    path: Any,
    t: float,
    *args: Any,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> Any:
    network = copy.deepcopy(model).to(dtype).eval()
    state = {
        key: sum(
            c * point[key].to(dtype)
            for c, point in zip(path.coefficients([t])[0].tolist(), path.control_points)
        )
        if value.is_floating_point()
        else value
        for key, value in path.control_points[0].items()
    }
    network.load_state_dict(state)
    with torch.no_grad():
        return network(*args, **kwargs)


# -- tokens ----------------------------------------------------------------------------------------


def gpt(**changes: Any) -> nn.Module:
    options = {"vocab": 11, "context": 8, "width": 8, "layers": 2, "heads": 2, **changes}
    return build("gpt:" + ",".join(f"{key}={value}" for key, value in options.items()))


def test_a_language_model_counts_tokens():
    a, b = two(gpt)
    path = mc.Line(a, b)
    labels = TOKENS.roll(-1, 1).masked_fill(
        torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100
    )
    metrics = ("loss", "error", "perplexity")
    for batch_size in (None, 2):
        got = mc.evaluate(
            a,
            path,
            (TOKENS, labels),
            21,
            metrics=metrics,
            precision="float64",
            batch_size=batch_size,
        )
        for i in (0, 7, 20):
            logits = outputs_at(a, path, got.t[i], TOKENS)
            expected = F.cross_entropy(logits.reshape(-1, 11), labels.reshape(-1)).item()
            assert got.loss[i] == pytest.approx(expected, rel=1e-10)
            wrong = (logits.argmax(-1) != labels)[labels != -100].double().mean().item()
            assert got.error[i] == pytest.approx(wrong)
            assert got.values["perplexity"][i] == pytest.approx(np.exp(expected))
        assert got.samples == 7 and not got.info["fallback"]


def test_texts_that_are_their_own_labels():
    a, b = two(gpt)
    path = mc.Line(a, b)
    texts = TOKENS.masked_fill(torch.arange(6) > 4, -100)
    got = mc.evaluate(a, path, (TOKENS, texts), 3, loss="next_token", precision="float64")
    for t, loss in zip(got.t, got.loss):
        logits = outputs_at(a, path, t, TOKENS)[:, :-1]
        assert loss == pytest.approx(
            F.cross_entropy(logits.reshape(-1, 11), texts[:, 1:].reshape(-1)).item(), rel=1e-10
        )


def test_tied_weights():
    a, b = two(gpt)
    assert torch.equal(a.state_dict()["lm_head.weight"], a.state_dict()["transformer.wte.weight"])
    path = mc.Line(a, b)
    got = forward(a, path, [0.3], TOKENS, precision="float64")[0]
    torch.testing.assert_close(got, outputs_at(a, path, 0.3, TOKENS), rtol=1e-10, atol=1e-12)


def test_an_embedding_alone_that_moves_is_a_combination():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 5), nn.Linear(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).mean(1))

    a = Bag()
    b = copy.deepcopy(a)
    nn.init.normal_(b.table.weight)
    for net in (a, b):
        net.head.weight.data[:, 3:] = 0
    path = mc.Line(a, b)
    y = torch.arange(7) % 3
    plan = mc.explain(a, path, TOKENS, 101)
    (segment,) = plan.program.segments
    assert [row["class"] for row in plan.nodes(segment)] == ["combination"] * 3
    assert [row["units"] for row in plan.nodes(segment)] == ["3/5", "3/5", "all"]
    got = mc.evaluate(a, path, (TOKENS, y), 5)
    plain, exact = (
        pass_per_point(a, path, TOKENS, y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)


def test_pixels_have_labels():
    a, b = two(lambda: nn.Conv2d(2, 4, 3, padding=1))
    path = mc.Line(a, b)
    x, labels = torch.randn(5, 2, 6, 6), torch.randint(0, 4, (5, 6, 6))
    labels[0, 0] = -100
    got = mc.evaluate(a, path, (x, labels), 3, precision="float64")
    for t, loss in zip(got.t, got.loss):
        logits = outputs_at(a, path, t, x.double())
        assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-10)


@pytest.mark.parametrize(
    "says, labels, options",
    [
        ("no token of the data has a label", torch.full((7, 6), -100), {}),
        (r"label 11 is out of range: the model has 11 classes, 0 to 10, and -100", TOKENS + 1, {}),
        (r"outputs have shape \['N', 6, 11\] and targets \[7\]", TOKENS[:, 0], {}),
        (r"outputs have shape \['N', 6, 11\] and targets \[7, 5\]", TOKENS[:, 1:], {}),
        (
            r'loss="next_token" needs \[N, length, vocabulary\]',
            TOKENS[:, 1:],
            {"loss": "next_token"},
        ),
        (
            '"perplexity" is that of class labels',
            TOKENS,
            {"loss": "mse", "metrics": ("perplexity",)},
        ),
    ],
)
def test_labels_that_do_not_fit(says, labels, options):
    a, b = two(gpt)
    with pytest.raises(mc.ModeconnError, match=says) as caught:
        mc.evaluate(a, mc.Line(a, b), (TOKENS.clamp(max=10), labels), 3, **options)
    assert "\n" not in str(caught.value)


# -- inputs and outputs ----------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """Two inputs, and a dict of outputs; the arguments' order is not that of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.left(a)) * torch.tanh(self.right(b))
        return {"hidden": hidden, "scores": self.head(hidden)}


def own_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["scores"], targets, reduction="none") + 0.1 * outputs[
        "hidden"
    ].square().mean(1)


LEFT, RIGHT, LABELS = torch.randn(30, 4), torch.randn(30, 3), torch.arange(30) % 5


@pytest.mark.parametrize(
    "data",
    [
        ((RIGHT, LEFT), LABELS),
        ({"a": LEFT, "b": RIGHT}, LABELS),
        {"a": LEFT.numpy(), "b": RIGHT.numpy(), "labels": LABELS.numpy()},
        [
            ({"a": LEFT[:9], "b": RIGHT[:9]}, LABELS[:9]),
            ({"a": LEFT[9:], "b": RIGHT[9:]}, LABELS[9:]),
        ],
        [
            {"b": RIGHT[i : i + 4], "a": LEFT[i : i + 4], "labels": LABELS[i : i + 4]}
            for i in range(0, 30, 4)
        ],
        torch.utils.data.DataLoader(
            [((r, x), y) for r, x, y in zip(RIGHT, LEFT, LABELS)], batch_size=7
        ),
    ],
    ids=["tuple", "dict", "one dict", "batches", "batches of one dict", "loader"],
)
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "fallback"])
def test_several_inputs_and_outputs(data, captured):
    class DataDependent(TwoTowers):
        def forward(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
            return super().forward(b, a) if bool(a.isfinite().all()) else {}

    first, second = two(TwoTowers if captured else DataDependent)
    path = mc.Line(first, second)
    if captured:
        got = mc.evaluate(
            first, path, data, [0.3, 1.0], loss=own_loss, precision="float64", batch_size=8
        )
    else:
        with pytest.warns(UserWarning, match="could not be captured"):
            got = mc.evaluate(
                first, path, data, [0.3, 1.0], loss=own_loss, precision="float64", batch_size=8
            )
    for t, loss in zip(got.t, got.loss):
        outputs = outputs_at(first, path, t, RIGHT.double(), LEFT.double())
        assert loss == pytest.approx(own_loss(outputs, LABELS).mean().item(), rel=1e-7)
    assert got.samples == 30


def test_forward_and_explain_take_several_inputs():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, b: Tensor, a: Tensor) -> Tensor:
            return self.left(a) + self.right(b)

    first, second = two(Sum)
    path = mc.Line(first, second)
    expected = outputs_at(first, path, 0.4, RIGHT, LEFT, dtype=torch.float32)
    torch.testing.assert_close(forward(first, path, [0.4], (RIGHT, LEFT))[0], expected)
    torch.testing.assert_close(forward(first, path, [0.4], {"a": LEFT, "b": RIGHT})[0], expected)
    assert mc.explain(first, path, (RIGHT, LEFT), 9).point_flops < 9 * 60, "a combination"
    with pytest.raises(mc.ModeconnError, match=r"as many of each input"):
        forward(first, path, [0.4], (RIGHT, LEFT[1:]))
    with pytest.raises(mc.ModeconnError, match=r"inputs of shape a: .*'N', 3.*; b: .*'N', 4"):
        forward(first, path, [0.4], {"a": RIGHT, "b": LEFT})


class Masked(nn.Module):
    """A buffer outside the state dict, an output in half precision's range, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(6, 4), nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 2.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    first, second = (net.to(dtype) for net in two(Masked))
    path = mc.Line(first, second)
    x, y = torch.randn(20, 6), torch.arange(20) % 4
    got = mc.evaluate(first, path, (x, y), [0.0, 0.37, 1.0])
    plain, exact = (
        pass_per_point(first, path, x, y, got.t, d) for d in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)
    assert first.layer.weight.dtype == dtype and first.mask.dtype == dtype
