"""The engine's sums of losses and errors against PyTorch, ties and non-finite values included."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from native_cases import engine
from native_chain_cases import DTYPES, ISAS, PLAIN, known, make, outputs, reference, sums
from policy import assert_within_policy


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers,classes", [(0, 10), (0, 1), (2, 10), (1, 1025), (0, 7)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_sums(isa, dtype, layers, classes, loss):
    rows, points = 777, 5
    case, plain, exact = known(dtype, rows, (classes,) * (layers + 1), points, terms=3, pad=1)
    rng = np.random.default_rng(1)
    if loss == "mse":
        targets = rng.standard_normal((rows, classes)).astype(DTYPES[dtype])
        got = sums(case, targets, isa, loss="mse")
        per_row = lambda y: ((y - torch.from_numpy(targets).to(y.dtype)) ** 2).mean(2)
    else:
        targets = rng.integers(0, classes, rows)
        got = sums(case, targets, isa, top5=True)
        labels = torch.from_numpy(targets)
        per_row = lambda y: torch.stack([F.cross_entropy(z, labels, reduction="none") for z in y])
        assert_same_counts(got, exact, labels)
    plain_sums, exact_sums = (per_row(y).double().sum(1) for y in (plain, exact))
    assert_within_policy("sums", got[:, 0], plain_sums, exact_sums, PLAIN[dtype])


def assert_same_counts(got, exact, labels):
    errors = (exact.argmax(2) != labels).sum(1).numpy()
    label_logit = exact.gather(2, labels[None, :, None].expand(len(exact), -1, 1))
    errors5 = ((exact > label_logit).sum(2) >= 5).sum(1).numpy()
    np.testing.assert_allclose(got[:, 1], errors, atol=1)  # a rounded tie may fall either way
    np.testing.assert_allclose(got[:, 2], errors5, atol=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_losses_keep_their_digits(isa, dtype):
    logits = np.zeros((50, 3), DTYPES[dtype])
    logits[:, 1] = np.linspace(5, 80, 50)
    got = engine.chain_sums(
        [logits[i : i + 1] for i in range(50)], np.eye(50), [], np.array([1]), isa=isa
    )[:, 0]
    exact = F.cross_entropy(
        torch.from_numpy(logits).double(), torch.ones(50, dtype=torch.long), reduction="none"
    )
    exact = torch.log1p(2 * torch.exp(-torch.from_numpy(logits[:, 1]).double()))
    np.testing.assert_allclose(got, exact.numpy(), rtol=8 * np.finfo(DTYPES[dtype]).eps)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_non_finite_logits(isa, dtype):
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [1, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0],
            [nan, 1, nan, 0, 0, 0, 0],
            [1, inf, inf, 0, 0, 0, 0],
            [-inf, -inf, -inf, -inf, -inf, -inf, -inf],
            [0, -inf, 1, 2, 3, 4, 5],
            [0, 0, 0, 0, 0, 0, 0],
            [5, 4, 3, 2, 1, nan, inf],
        ],
        DTYPES[dtype],
    )
    for label in range(7):
        labels = torch.full((8,), label)
        plain = F.cross_entropy(torch.from_numpy(logits), labels, reduction="none").numpy()
        best = torch.from_numpy(logits).argmax(1).numpy()
        for row in range(8):
            got = engine.chain_sums(
                [logits[row : row + 1]], np.ones((1, 1)), [], np.array([label]), top5=True, isa=isa
            )[0]
            assert np.isnan(got[0]) == np.isnan(plain[row]) and np.isinf(got[0]) == np.isinf(
                plain[row]
            )
            assert got[1] == (best[row] != label)
            order = sorted(
                range(7),
                key=lambda c: (
                    -np.inf if np.isnan(logits[row, c]) else -logits[row, c],
                    not np.isnan(logits[row, c]),
                    c,
                ),
            )
            assert got[2] == (order.index(label) >= 5), (row, label)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_non_finite_weights_and_inputs_stay_in_their_place(isa, value):
    case = make(40, (9, 30, 4), 3, np.float32)
    # block 1 is not touched at point 2
    case["coefficients"][2], case["layers"][0]["coefficients"][2] = (1, 0), (1, 0)
    case["layers"][0]["weights"][1][17, 3] = value
    case["terms"][1][5] = value
    got = outputs(case, isa)
    want = reference(case, torch.float32).numpy()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    assert np.isfinite(got[2]).all()
    loss = sums(case, np.zeros(40, np.int64), isa)[:, 0]
    assert not np.isfinite(loss[1]) and np.isfinite(loss[2])


@pytest.mark.parametrize("isa", ISAS)
def test_end_points_keep_every_bit(isa):
    special = np.array([[-0.0, 1e-45, -1e-39, 3.0]], np.float32)
    other = np.full_like(special, 7)
    out = np.full((2, 1, 4), np.nan, np.float32)
    engine.chain_outputs([special, other], np.array([[1.0, 0.0], [0.0, 1.0]]), [], out, isa=isa)
    assert out[0].tobytes() == special.tobytes() and out[1].tobytes() == other.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layers", [0, 2])
def test_sums_do_not_depend_on_threads(isa, layers):
    case = make(3001, [11] * (layers + 1), 7, np.float32)
    labels = np.arange(3001) % 11
    one = sums(case, labels, isa, threads=1)
    for threads in (2, 5):
        assert sums(case, labels, isa, threads=threads).tobytes() == one.tobytes()
