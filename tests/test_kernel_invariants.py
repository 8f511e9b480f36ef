"""Invariants of the kernels, whatever the shapes: drawn by hypothesis, run interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")
pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import given, settings

from kernel_cases import KINDS, blended, copied, samples
from modeconn.kernels.arguments import PathLayer
from modeconn.kernels.blended import Blended
from modeconn.kernels.path_cross_entropy import path_cross_entropy
from modeconn.kernels.path_linear import path_linear, path_linear_reference
from modeconn.kernels.path_mlp import path_mlp
from policy import assert_within_policy

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = st.integers(1, 70)
FEW = settings(max_examples=12)
# path_cross_entropy and path_mlp of one layer, as one function.
HEADS = {
    "path_cross_entropy": lambda x, w, b, y: path_cross_entropy(x, w, b, y, top5=True),
    "path_mlp": lambda x, w, b, y: path_mlp(x, [PathLayer(w, b, "identity", 0.01)], y, top5=True),
}


@FEW
@given(
    st.sampled_from(KINDS),
    st.integers(1, 3),
    SIZES,
    SIZES,
    SIZES,
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_path_linear_is_its_reference(kind, points, rows, depth, units, terms, seed):
    torch.manual_seed(seed)
    x, weight, bias = (
        samples(kind, points, rows, depth),
        blended(terms, points, units, depth),
        blended(2, points, units),
    )
    wide = copied([x, weight, bias])
    out, plain, exact = (
        path_linear(x, weight, bias),
        path_linear_reference(x, weight, bias),
        path_linear_reference(*wide),
    )
    assert_within_policy("y", out, plain, exact, torch.float32)


@FEW
@given(st.integers(1, 4), SIZES, SIZES, SIZES, st.integers(0, 1000))
def test_points_are_apart(points, rows, depth, units, seed):
    """A point's bits do not depend on other points; a control point's are those of its weights."""
    torch.manual_seed(seed)
    x, tensors = torch.randn(rows, depth), torch.randn(2, units, depth)
    coefficients = torch.rand(points, 2)
    coefficients[0] = torch.tensor([0.0, 1.0])
    out = path_linear(x, Blended(tensors, coefficients))
    order = torch.randperm(points)
    assert torch.equal(path_linear(x, Blended(tensors, coefficients[order])), out[order])
    assert torch.equal(path_linear(x, Blended(tensors[1:], torch.ones(1, 1)))[0], out[0])


@FEW
@given(
    st.sampled_from(sorted(HEADS)),
    st.integers(2, 140),
    SIZES,
    st.integers(1, 40),
    st.integers(0, 1000),
)
def test_sums_are_sums_over_the_rows(name, rows, depth, classes, seed):
    torch.manual_seed(seed)
    x, weight, bias = (
        torch.randn(rows, depth),
        blended(2, 2, classes, depth),
        blended(2, 2, classes),
    )
    labels = torch.randint(0, classes, (rows,))

    def sums(part: slice) -> Tensor:
        found: Tensor = HEADS[name](x[part], weight, bias, labels[part])
        return found.detach()

    whole, first = sums(slice(None)), rows // 2
    torch.testing.assert_close(
        sums(slice(0, first)) + sums(slice(first, rows)), whole, rtol=1e-6, atol=1e-6
    )
    # who is not among five is not the first
    assert (whole[:, 1] >= whole[:, 2]).all() and (whole[:, 1] <= rows).all()
