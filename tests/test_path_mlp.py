"""path_mlp, interpreted, against its reference: sums and gradients of chains, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from kernel_cases import KINDS, blended, compare, samples
from modeconn.errors import ModeconnError
from modeconn.kernels.path_mlp import PathLayer, path_mlp, path_mlp_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def chain(points: int, *widths: int, activations: tuple[str, ...] = ()) -> list[PathLayer]:
    """Layers of random weights, the last without a bias."""
    pairs = list(itertools.pairwise(widths))
    names = activations or ("relu",) * (len(pairs) - 1) + ("identity",)
    return [
        PathLayer(
            blended(2, points, b, a), blended(2, points, b) if i + 1 < len(pairs) else None, name
        )
        for i, ((a, b), name) in enumerate(zip(pairs, names))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points, rows, widths", [(1, 1, (1, 1)), (2, 7, (5, 3, 6, 7))])
def test_sums_and_gradients(kind, points, rows, widths):
    options = {"input_activation": "relu"} if kind == "combined" else {}
    arguments = (
        samples(kind, points, rows, widths[0]),
        chain(points, *widths),
        torch.randint(widths[-1], (rows,)),
    )
    compare(path_mlp, path_mlp_reference, arguments, top5=True, **options)


def test_several_parts(monkeypatch):
    monkeypatch.setattr("modeconn.kernels.path_mlp.MATERIALIZED_BYTES", 1)  # a chunk per point
    x, layers, y = samples("shared", 2, 65, 33), chain(2, 33, 130, 70, 66), torch.randint(66, (65,))
    with torch.no_grad():
        got, exact = path_mlp(x, layers, y, top5=True), path_mlp_reference(x, layers, y, top5=True)
    torch.testing.assert_close(got, exact.double(), rtol=1e-5, atol=0)


def test_activations_that_differ():
    layers = chain(2, 3, 4, 5, 6, activations=("tanh", "gelu", "identity"))
    compare(
        path_mlp, path_mlp_reference, (samples("shared", 2, 5, 3), layers, torch.randint(6, (5,)))
    )


def test_an_infinite_value_stays_in_its_units():
    x, layers, y = torch.tensor([[1.0, float("inf")]]), chain(1, 2, 3, 2), torch.tensor([0])
    layers[0].weight.tensors[:, :, 1] = -layers[0].weight.tensors[:, :, 1].abs()
    layers[0].weight.coefficients.fill_(1)
    got, exact = path_mlp(x, layers, y), path_mlp_reference(x, layers, y)
    assert exact.isfinite().all()
    torch.testing.assert_close(got, exact.double(), rtol=1e-5, atol=1e-6)


def test_nothing():
    assert not path_mlp(torch.randn(0, 3), chain(2, 3, 4), torch.zeros(0, dtype=torch.long)).any()


def test_bad_input():
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ModeconnError, match=r"widths are \[3, 257\]: expected 1 to 256"):
        path_mlp(x, chain(1, 3, 257), y)
    with pytest.raises(ModeconnError, match="layers is empty"):
        path_mlp(x, [], y)
    with pytest.raises(
        ModeconnError, match=r"layer 1's weight has shape \[2, 6\] at one point: expected .* in = 5"
    ):
        path_mlp(x, [*chain(1, 3, 5), *chain(1, 6, 2)], y)
    with pytest.raises(ModeconnError, match="layer 1's weight has 3 points: expected 1"):
        path_mlp(x, [*chain(1, 3, 5), *chain(3, 5, 2)], y)
