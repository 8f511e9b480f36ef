"""Losses, metrics and labels by PyTorch's conventions, and callables that are no sums over rows."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.metrics import Head
from modeconn.metrics.torch_losses import understood
from refused import refused

G = torch.Generator().manual_seed(0)
OUTPUTS, LABELS = torch.randn(23, 7, generator=G), torch.randint(0, 7, (23,), generator=G)
PIXELS, CLASSES = torch.randn(6, 4, 5, 3, generator=G), torch.randint(0, 4, (6, 5, 3), generator=G)
NUMBERS, TARGETS = torch.randn(9, 2, 3, generator=G), torch.rand(9, 2, 3, generator=G)
WEIGHT = torch.rand(7, generator=G) + 0.1


def mean(head: Head, outputs, targets, size: int = 5) -> dict[str, float]:
    """The results of a head, from blocks of some rows."""
    targets = head.fit(outputs[:2], targets)
    sums, counts = 0.0, 0.0
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        sums = sums + head.sums(outputs[rows], targets[rows])
        counts = counts + head.counts(targets[rows])
    values = head.finish((sums / counts)[None].numpy())
    return {name: float(column[0]) for name, column in values.items()}


# -- callables that are no sums over rows --------------------------------------------------------


def calibration(outputs, targets):
    """The expected calibration error of the batch, expanded to its rows."""
    confidence, guess = outputs.softmax(1).max(1)
    gap = (confidence.mean() - (guess == targets).float().mean()).abs()
    return gap.expand(len(targets))


def cox(outputs, targets):
    """A sample's loss among those that are left, in the order of the batch."""
    risk = outputs[:, 0]
    return torch.logcumsumexp(risk, 0) - risk


def contrastive(outputs, targets):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


def pairs(outputs, targets):
    """Each row against the other one of its pair."""
    other = outputs.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return (outputs - other).square().mean(1)


def standardised(outputs, targets):
    return F.cross_entropy(outputs - outputs.mean(0), targets, reduction="none")


def broadcast(outputs, targets):
    return ((outputs[:, :1] - targets) ** 2).mean(1)


ROWS_THAT_DEPEND = [calibration, cox, contrastive, standardised, broadcast]


@pytest.mark.parametrize("function", ROWS_THAT_DEPEND)
@pytest.mark.parametrize("as_metric", [False, True])
def test_a_callable_that_looks_at_other_rows_is_refused(function, as_metric):
    head = Head("cross_entropy", (function,)) if as_metric else Head(function, None)
    name = function.__name__ if as_metric else "loss"
    with refused(f"{name} gives row", "depends on other rows", "mc.forward"):
        head.sums(OUTPUTS, LABELS)


def test_pairs_are_torn():
    with refused("loss fails for the first or last", "of that row alone"):
        Head(pairs, None).sums(OUTPUTS[:20], LABELS[:20])


@pytest.mark.parametrize("wrap", [tuple, dict, SimpleNamespace])
def test_rows_of_what_a_network_returns_are_told_apart(wrap):
    if wrap is tuple:
        outputs, first = (OUTPUTS, torch.tensor(2.0)), lambda o: o[0]
    elif wrap is dict:
        outputs, first = {"y": OUTPUTS, "scale": torch.tensor(2.0)}, lambda o: o["y"]
    else:
        outputs, first = SimpleNamespace(y=OUTPUTS, more=[OUTPUTS], name="n"), lambda o: o.y
    own = Head(lambda o, t: F.cross_entropy(first(o), t, reduction="none"), None)
    right = F.cross_entropy(OUTPUTS, LABELS, reduction="sum")
    assert float(own.sums(outputs, LABELS)) == pytest.approx(float(right))
    with refused("depends on other rows"):
        Head(lambda o, t: cox(first(o), t), None).sums(outputs, LABELS)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("rows", [1, 2, 3, 23])
def test_callables_of_single_rows_are_taken(scale, rows):
    matrix = torch.randn(7, 500, generator=G)
    functions = [
        lambda o, t: F.cross_entropy(o * scale, t, reduction="none"),
        lambda o, t: (o @ matrix).square().sum(1) * scale,
        lambda o, t: o.argmax(1) != t,
        lambda o, t: torch.where(o[:, 0] > 0, o[:, 0] / 0, o[:, 1]),
        lambda o, t: torch.full((len(o),), torch.nan),
    ]
    for function in functions:
        for dtype in (torch.float32, torch.float64):
            matrix = matrix.to(dtype)
            Head(function, None).sums(OUTPUTS[:rows].to(dtype), LABELS[:rows])


def test_states_by_layer_have_their_rows_on_axis_1():
    outputs = (OUTPUTS, torch.randn(2, 23, 5, generator=G))
    Head(lambda o, t: o[1][-1].square().sum(1), None).sums(outputs, LABELS)
    with refused("depends on other rows"):
        Head(lambda o, t: o[1].sum(1).sum() + o[0][:, 0], None).sums(outputs, LABELS)


def test_a_random_callable_is_called_so():
    with refused("gives other numbers when it is called again"):
        Head(lambda o, t: o[:, 0] + torch.rand(len(o)), None).sums(OUTPUTS, LABELS)


# -- PyTorch's own losses ------------------------------------------------------------------------


def ignoring(targets, label):
    targets = targets.clone()
    targets.view(-1)[::3] = label
    return targets


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [None, -100, 255, 2])
@pytest.mark.parametrize("pixels", [False, True])
def test_means_over_labels_are_those_of_pytorch(loss, weighted, ignored, pixels):
    outputs, targets = (PIXELS, CLASSES) if pixels else (OUTPUTS, LABELS)
    options = {} if ignored is None else {"ignore_index": ignored}
    if weighted:
        options["weight"] = WEIGHT[: outputs.shape[1]].double()
    if ignored is not None:
        targets = ignoring(targets, ignored)
    smoothings = [{}] if loss is nn.NLLLoss else [{}, {"label_smoothing": 0.2}]
    for smoothing in smoothings:
        made = loss(**options, **smoothing)
        right = loss(**options, **smoothing).double()(outputs.double(), targets)
        for precision in (torch.float32, torch.float64):
            got = mean(Head(made, None), outputs.to(precision), targets)
            assert got["loss"] == pytest.approx(float(right), rel=1e-5)
            wrong = (outputs.argmax(1) != targets)[
                targets != (-100 if ignored is None else ignored)
            ]
            assert got["error"] == pytest.approx(float(wrong.float().mean()))
        if weighted:
            assert made.weight.dtype == torch.float64  # the user's own is as it was


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.SmoothL1Loss(beta=0.3),
        nn.HuberLoss(delta=0.2),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 3.0])),
        nn.BCEWithLogitsLoss(weight=torch.tensor([0.5, 2.0, 3.0]).double()),
        F.mse_loss,
        F.l1_loss,
        F.binary_cross_entropy_with_logits,
        functools.partial(F.smooth_l1_loss, beta=0.3),
    ],
)
def test_means_over_numbers_are_those_of_pytorch(loss):
    right = loss(NUMBERS, TARGETS)
    assert mean(Head(loss, None), NUMBERS, TARGETS)["loss"] == pytest.approx(float(right), rel=1e-5)
    assert mean(Head(loss, None), NUMBERS[:, :1], TARGETS[:, 0])["loss"] == pytest.approx(
        float(loss(NUMBERS[:, :1], TARGETS[:, :1])), rel=1e-5
    )


def test_functions_and_partials_are_understood():
    assert understood(F.cross_entropy) == understood(nn.CrossEntropyLoss()) == "cross_entropy"
    assert understood(nn.MSELoss()) == "mse" and understood(F.mse_loss) == "mse"
    assert understood(nn.BCEWithLogitsLoss()) == "bce"
    weighted = functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=1)
    right = weighted(OUTPUTS, LABELS)
    assert mean(Head(weighted, None), OUTPUTS, LABELS)["loss"] == pytest.approx(float(right))
    each = functools.partial(F.cross_entropy, weight=WEIGHT, reduction="none")
    got = mean(Head(each, ("loss", "error")), OUTPUTS.double(), LABELS)
    assert got["loss"] == pytest.approx(float(each(OUTPUTS, LABELS).mean()))


@pytest.mark.parametrize(
    ("words", "loss"),
    [
        (["nn.CrossEntropyLoss", "'sum'"], nn.CrossEntropyLoss(reduction="sum")),
        (["F.mse_loss", "'sum'"], functools.partial(F.mse_loss, reduction="sum")),
        (["nn.KLDivLoss", 'reduction="none"'], nn.KLDivLoss(reduction="batchmean")),
        (["nn.MultiMarginLoss", 'reduction="none"'], nn.MultiMarginLoss()),
        (["F.cross_entropy", "'size_average'"], functools.partial(F.cross_entropy, size_average=1)),
    ],
)
def test_other_reductions_are_refused_by_name(words, loss):
    with refused(*words):
        Head(loss, None)


def test_weights_that_do_not_fit_are_refused():
    with refused("a weight for each class"):
        Head(nn.CrossEntropyLoss(weight=torch.ones(3)), None).fit(OUTPUTS, LABELS)
    with refused("one for each row"):
        Head(nn.BCEWithLogitsLoss(weight=torch.ones(9, 2, 3)), None).fit(NUMBERS, TARGETS)
    with refused("probabilities of classes"):
        Head(nn.CrossEntropyLoss(), None).fit(OUTPUTS, OUTPUTS.softmax(1)[:, 0])
    with refused("probabilities of classes", 'reduction="none"'):
        Head(nn.CrossEntropyLoss(), None).fit(OUTPUTS, OUTPUTS.softmax(1))
    each = Head(nn.CrossEntropyLoss(reduction="none"), None)  # what the error says works
    right = F.cross_entropy(OUTPUTS, OUTPUTS.softmax(1))
    assert mean(each, OUTPUTS, OUTPUTS.softmax(1))["loss"] == pytest.approx(float(right))


# -- the class axis, and errors beside callables -------------------------------------------------


def test_errors_beside_a_callable_are_means_over_labels():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none").mean((1, 2))

    targets = ignoring(CLASSES, -100)
    wrong = (PIXELS.argmax(1) != targets)[targets != -100].float().mean()
    got = mean(Head(loss, ("loss", "error")), PIXELS, targets)
    assert got["error"] == pytest.approx(float(wrong))
    assert got["loss"] == pytest.approx(float(loss(PIXELS, targets).mean()))
    texts = PIXELS.movedim(1, -1).flatten(1, 2)  # [N, length, classes]
    flat = mean(Head(lambda o, t: o[:, 0, 0], ("error",)), texts, targets.flatten(1))
    assert flat["error"] == pytest.approx(float(wrong))


def test_errors_that_cannot_be_told_are_refused():
    with refused("class labels need", "as metric"):
        Head(cox, ("error",)).fit(PIXELS, LABELS)
    with refused("expects a tensor", "as metric"):
        Head(cox, ("error",)).fit((OUTPUTS, OUTPUTS), LABELS)


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(), F.cross_entropy])
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 5, 5, 5)])
def test_as_many_classes_as_places(loss, shape):
    outputs = torch.randn(shape, generator=G)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=G)
    head = Head(loss, None)
    right = F.cross_entropy(outputs, labels)
    assert mean(head, outputs, labels)["loss"] == pytest.approx(float(right))
    assert "axis 1" in str(head.ambiguity(outputs, labels))
    assert head.ambiguity(outputs[:, :4], labels) is None
    assert Head("next_token", None).ambiguity(outputs, labels) is None


def test_as_many_classes_as_places_is_said_once():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 8, 1)
    x, y = torch.randn(6, 2, 8), torch.randint(0, 8, (6, 8))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = mc.evaluate(model, mc.Line(model, nn.Conv1d(2, 8, 1)), (x, y), 2, batch_size=2)
    assert [("axis 1" in str(w.message), "movedim" in str(w.message)) for w in seen] == [
        (True,) * 2
    ]
    with torch.no_grad():
        assert result.loss[0] == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-5)


def test_next_token_keeps_its_last_axis():
    outputs = torch.randn(3, 8, 8, generator=G)
    texts = torch.randint(0, 8, (3, 8), generator=G)
    right = F.cross_entropy(outputs[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
    assert mean(Head("next_token", None), outputs, texts)["loss"] == pytest.approx(float(right))


# -- the user's names, and shapes of numbers -----------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "error", "top5_error", "perplexity"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", nn.CrossEntropyLoss(weight=WEIGHT), cox])
def test_the_users_metrics_go_before_ours(name, loss):
    def metric(outputs, targets):
        return torch.full((len(targets),), 3.0)

    metric.__name__ = name
    targets = OUTPUTS.sigmoid() if loss == "bce" else LABELS
    assert mean(Head(loss, (metric,)), OUTPUTS, targets) == {name: 3.0}


def test_targets_of_another_layout_are_refused():
    images = torch.randn(4, 3, 5, 6)
    for loss in ("mse", "bce", nn.L1Loss()):
        head = Head(loss, ("loss",))
        for targets in (images.movedim(1, -1), images.flatten(1), images[:, :, :5, :1]):
            with refused(str(list(targets.shape)), "['N', 3, 5, 6]"):
                head.fit(images, targets)
        for targets in (images[:, :, None], images[..., None], images[:, None]):
            assert torch.equal(head.fit(images, targets), images)


# -- labels --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("loss", ["cross_entropy", "next_token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_padding_are_warned_of(loss, side):
    inputs, labels = padded(side, loss)
    head = Head(loss, None)
    outputs = torch.zeros(2, 12, 9)
    assert not head.labels_padding(inputs, head.fit(outputs, labels))
    texts = torch.where(labels == -100, inputs["input_ids"], labels)
    assert head.labels_padding(inputs, head.fit(outputs, texts))
    assert not head.labels_padding(inputs["input_ids"], head.fit(outputs, texts))
    if loss == "next_token":
        model = Masked()
        with pytest.warns(UserWarning, match="padding has labels that count"):
            mc.evaluate(model, mc.Line(model, model), (inputs, texts), 2, loss=loss, batch_size=4)
