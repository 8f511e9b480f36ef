"""path_cross_entropy, interpreted, against its reference: sums, gradients, ties, bad input."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from torch.nn import functional as F

from kernel_cases import KINDS, blended, compare, samples
from modeconn.errors import ModeconnError
from modeconn.kernels.path_cross_entropy import path_cross_entropy, path_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "points, rows, depth, classes", [(1, 1, 1, 1), (2, 7, 5, 8), (2, 5, 3, 140)]
)
def test_sums_and_gradients(kind, points, rows, depth, classes):
    options = {"input_activation": "relu"} if kind == "combined" else {}
    layer = (blended(2, points, classes, depth), blended(2, points, classes))
    arguments = (samples(kind, points, rows, depth), *layer, torch.randint(classes, (rows,)))
    compare(path_cross_entropy, path_cross_entropy_reference, arguments, top5=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, classes", [(6, 7), (3, 1030)])
def test_given_logits(kind, rows, classes):
    options = {"input_activation": "tanh"} if kind == "combined" else {}
    arguments = (samples(kind, 2, rows, classes), None, None, torch.randint(classes, (rows,)))
    compare(path_cross_entropy, path_cross_entropy_reference, arguments, top5=True, **options)


def test_the_reference_is_the_losses_of_pytorch():
    z, y = torch.randn(1, 50, 9, dtype=torch.float64), torch.randint(9, (50,))
    loss, errors, top5 = path_cross_entropy_reference(z, None, None, y, top5=True)[0]
    torch.testing.assert_close(loss, F.cross_entropy(z[0], y, reduction="sum"))
    assert errors == (z[0].argmax(1) != y).sum()
    assert top5 == (z[0].topk(5).indices != y[:, None]).all(1).sum()


def test_small_losses_keep_their_digits():
    z = torch.tensor([[[30.0, 0.0], [60.0, 0.0]]], requires_grad=True)
    sums = path_cross_entropy(z, None, None, torch.tensor([0, 0]))
    exact = path_cross_entropy_reference(z.detach().double(), None, None, torch.tensor([0, 0]))
    assert sums[0, 0].item() == pytest.approx(exact[0, 0].item(), rel=1e-5)
    sums[0, 0].backward()
    assert z.grad is not None
    assert z.grad[0, 1, 0].item() == pytest.approx(
        -torch.tensor(-60.0).double().exp().item(), rel=1e-4
    )


def test_ties_and_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    rows = [
        [1] * 7,
        [0, nan, 2, nan, 1, 1, 1],
        [inf, 0, 0, 0, 0, 0, 0],
        [-inf] * 7,
        [1, -inf, 2, 3, 4, 5, 6],
    ]
    z = torch.tensor(rows)
    for label in (0, 1, 3, 5, 6):
        y = torch.full((1,), label)
        for row in z:
            got, exact = (
                f(row[None], None, None, y, top5=True)[0]
                for f in (path_cross_entropy, path_cross_entropy_reference)
            )
            torch.testing.assert_close(got, exact.double(), rtol=1e-5, atol=0, equal_nan=True)
            plain = F.cross_entropy(row[None].double(), y)
            torch.testing.assert_close(got[0], plain, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_infinite_classes_before_a_finite_one():
    z = torch.full((1, 1, 1100), -float("inf"))
    z[0, 0, 1050:] = torch.randn(50)
    y = torch.tensor([1060])
    torch.testing.assert_close(
        path_cross_entropy(z, None, None, y)[0, 0],
        F.cross_entropy(z[0], y).double(),
        rtol=1e-5,
        atol=0,
    )


def test_a_label_that_is_no_class_gives_nan():
    assert path_cross_entropy(torch.randn(1, 2, 3), None, None, torch.tensor([0, 3]))[0, 0].isnan()


def test_the_same_bits_every_time_and_none_for_nothing():
    x, y = torch.randn(2, 300, 5), torch.randint(5, (300,))
    assert torch.equal(path_cross_entropy(x, None, None, y), path_cross_entropy(x, None, None, y))
    assert not path_cross_entropy(x[:, :0], None, None, y[:0]).any()


def test_bad_input():
    x, y = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(
        ModeconnError,
        match=r"targets have shape \[2\] and dtype torch.int64: expected integers \[3\]",
    ):
        path_cross_entropy(x, None, None, y[:2])
    with pytest.raises(ModeconnError, match="expected integers"):
        path_cross_entropy(x, None, None, y.float())
    with pytest.raises(ModeconnError, match="bias is given and weight is None"):
        path_cross_entropy(x, None, blended(1, 2, 4), y)
    with pytest.raises(ModeconnError, match="there are 0 classes"):
        path_cross_entropy(x[..., :0], None, None, y)
