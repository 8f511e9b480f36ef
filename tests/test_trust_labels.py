"""Labels: of any integers, left out, or of padding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn.metrics import Head
from refused import refused

G = torch.Generator().manual_seed(0)
OUTPUTS, LABELS = torch.randn(23, 7, generator=G), torch.randint(0, 7, (23,), generator=G)
PIXELS, CLASSES = torch.randn(6, 4, 5, 3, generator=G), torch.randint(0, 4, (6, 5, 3), generator=G)
NUMBERS, TARGETS = torch.randn(9, 2, 3, generator=G), torch.rand(9, 2, 3, generator=G)
WEIGHT = torch.rand(7, generator=G) + 0.1


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64"])
def test_labels_of_any_integers(dtype):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x, y = np.random.default_rng(0).normal(size=(10, 6)).astype("float32"), np.arange(10) % 3
    right = mc.evaluate(model, mc.Line(model, model), (x, y), 2).loss
    for data in ((x, y.astype(dtype)), (torch.tensor(x), torch.tensor(y.astype(dtype)))):
        got = mc.evaluate(model, mc.Line(model, model), data, 2, batch_size=4).loss
        np.testing.assert_allclose(got, right, rtol=1e-6)


def test_tokens_of_two_bytes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    texts = np.arange(24).reshape(4, 6) % 11
    path = mc.Line(model, model)
    results = []
    for dtype in ("int64", "uint16"):
        data = (texts.astype(dtype),) * 2
        results.append(mc.evaluate(model, path, data, 2, loss="next_token").loss)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_samples_without_a_label_are_left_out(backend, loss):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2)]
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    kept = torch.arange(40) % 4 != 1
    given = torch.where(kept, y, -100)
    path = mc.Line(*nets)
    metrics = ("loss", "error")
    right = mc.evaluate(nets[0], path, (x[kept], y[kept]), 3, loss=loss, metrics=metrics)
    for size in (1, 7, 40):
        options = {"backend": backend, "batch_size": size, "metrics": metrics}
        got = mc.evaluate(nets[0], path, (x, given), 3, loss=loss, **options)
        np.testing.assert_allclose(got.loss, right.loss, rtol=1e-5)
        np.testing.assert_allclose(got.error, right.error)
    with refused("no token of the data has a label"):
        mc.evaluate(nets[0], path, (x, torch.full_like(y, -100)), 3, loss=loss)


def test_labels_that_are_no_integers_are_refused_with_the_remedy():
    for targets in (LABELS.float(), LABELS.bool()):
        with refused("class labels are integers", "targets.long()"):
            Head("cross_entropy", None).fit(OUTPUTS, targets)


class Masked(nn.Module):
    """A model of texts in which padding changes nothing: means over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(12, 9)

    def forward(self, input_ids, attention_mask):
        tokens = self.embed(input_ids)
        weights = attention_mask[..., None].to(tokens.dtype)
        context = (tokens * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return self.out(torch.cat([tokens, context.expand_as(tokens)], -1))


def padded(side: str, loss: str):
    """Texts of several lengths, with padding on one side: inputs and labels."""
    generator = torch.Generator().manual_seed(5)
    ids, mask = torch.zeros(19, 12, dtype=torch.long), torch.zeros(19, 12, dtype=torch.long)
    labels = torch.full((19, 12), -100)
    for row in range(19):
        length = 3 + row % 9
        start = 0 if side == "right" else 12 - length
        text = torch.randint(0, 9, (length,), generator=generator)
        ids[row, start : start + length], mask[row, start : start + length] = text, 1
        labels[row, start : start + length] = text
        if loss == "next_token":
            labels[row, start] = -100  # nothing tells the first token
    return {"input_ids": ids, "attention_mask": mask}, labels


@pytest.mark.parametrize("loss", ["cross_entropy", "next_token", nn.CrossEntropyLoss()])
def test_padding_and_batch_size_change_nothing(loss):
    torch.manual_seed(0)
    nets = [Masked() for _ in range(2)]
    results = []
    for side in ("right", "left"):
        data = padded(side, loss)
        for size in (1, 8, 16):
            result = mc.evaluate(nets[0], mc.Line(*nets), data, 3, loss=loss, batch_size=size)
            results.append([result.loss, result.error])
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_padding_are_warned_of(side):
    inputs, labels = padded(side, "cross_entropy")
    head = Head("cross_entropy", None)
    outputs = torch.zeros(2, 12, 9)
    assert not head.labels_padding(inputs, head.fit(outputs, labels))
    texts = torch.where(labels == -100, inputs["input_ids"], labels)
    assert head.labels_padding(inputs, head.fit(outputs, texts))
    assert not head.labels_padding(inputs["input_ids"], head.fit(outputs, texts))
    model = Masked()
    with pytest.warns(UserWarning, match="padding has labels that count"):
        mc.evaluate(model, mc.Line(model, model), (inputs, texts), 2, batch_size=4)


def token_losses(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[float]:
    """The loss of each token that follows another one of its text, one text at a time."""
    losses: list[float] = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        text = ids[mask == 1][None]
        with torch.no_grad():
            logits = model.double()(text, torch.ones_like(text))[0]
        losses += nn.functional.cross_entropy(logits[:-1], text[0, 1:], reduction="none").tolist()
    return losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_texts_does_not_count(side):
    torch.manual_seed(0)
    model = Masked()
    inputs, _ = padded(side, "next_token")
    expected = np.mean(token_losses(copy.deepcopy(model), inputs))
    texts = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 99)  # no token
    for size in (1, 7, 19):
        got = mc.evaluate(
            model,
            mc.States([model.state_dict()]),
            (inputs, texts),
            loss="next_token",
            metrics=("loss", "perplexity"),
            batch_size=size,
            precision="float64",
        )
        assert got.loss[0] == pytest.approx(expected, rel=1e-12)
        assert got.perplexity[0] == pytest.approx(np.exp(expected), rel=1e-12)
    whole = mc.loss_function(model, (inputs, texts), loss="next_token", batch_size=5)
    assert float(whole(dict(model.state_dict()))) == pytest.approx(expected, rel=1e-6)
