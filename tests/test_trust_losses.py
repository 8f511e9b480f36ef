"""PyTorch's own losses, the class axis, and errors beside callables, by PyTorch's conventions."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from loss_cases import CLASSES, LABELS, NUMBERS, OUTPUTS, PIXELS, TARGETS, WEIGHT, G
from modeconn.metrics import Head
from modeconn.metrics.torch_losses import understood
from refused import refused


def squares(outputs, targets):
    """A loss of the user's."""
    return outputs.square().flatten(1).mean(1)


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
        Head(squares, ("error",)).fit(PIXELS, LABELS)
    with refused("expects a tensor", "as metric"):
        Head(squares, ("error",)).fit((OUTPUTS, OUTPUTS), LABELS)


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
@pytest.mark.parametrize(
    "loss", ["cross_entropy", "bce", nn.CrossEntropyLoss(weight=WEIGHT), squares]
)
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
