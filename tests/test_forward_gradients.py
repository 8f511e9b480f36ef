"""Gradients of mc.forward: those of autograd, also by the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import modeconn as mc
from forward_cases import KINDS, chain, conv
from modeconn.evaluation.outputs import PlannedForward, forward
from modeconn.parameters.paths import Path
from naive import clone, mlp

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# -- gradients -------------------------------------------------------------------------------------


def by_autograd(model: nn.Module, path: Path, t: np.ndarray, x: Tensor) -> Tensor:
    """The same outputs by functional_call, differentiable in x and the control points."""
    outputs = []
    for row in path.coefficients(t):
        points = path.control_points
        state = {
            key: sum(c * point[key] for c, point in zip(row.tolist(), points))
            if value.is_floating_point()
            else value
            for key, value in points[0].items()
        }
        outputs.append(functional_call(model, state, (x,)))
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", ["mlp", "conv", "chain", "head"])
def test_gradients_are_those_of_autograd(kind):
    if kind == "chain":  # with weights that are zero, whose gradients are not
        model, path = chain()
        model, path = (
            model.double(),
            mc.PolyChain(
                [{k: v.double() for k, v in point.items()} for point in path.control_points]
            ),
        )
    elif kind == "conv":
        model = conv(0).double().eval()
        path = mc.Bezier([conv(k).double() for k in range(3)])
    else:
        model = mlp(7, 6, 4, seed=0).double()
        path = mc.Line(model, clone(mlp(7, 6, 4, seed=1).double()))
    x = torch.randn(
        5, *([3, 8, 8] if kind == "conv" else [7]), dtype=torch.float64, requires_grad=True
    )
    moving = [
        value
        for point in path.control_points
        for key, value in point.items()
        if key.endswith(("weight", "bias"))
    ]
    if kind == "head":
        moving = [point["2.weight"] for point in path.control_points]
    for value in moving:
        value.requires_grad_()
    t = np.array([0.0, 0.3, 1.0, 0.3, 0.8])
    expected = by_autograd(model, path, t, x)
    engine = PlannedForward(model, path, t, x.detach(), precision="float64")
    got = engine(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    for _ in range(2):  # the plan serves again
        ours, theirs = (
            torch.autograd.grad(
                (out * weights).sum(), [x, *moving], allow_unused=True, materialize_grads=True
            )
            for out in (engine(x), by_autograd(model, path, t, x))
        )
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for value in moving:
                value.add_(0.1)
    with torch.no_grad():
        assert not engine(x).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_the_kernels(kind):
    pytest.importorskip("triton")
    model, path, x = KINDS[kind]()
    model.eval()
    x.requires_grad_()
    moving = [
        value
        for point in path.control_points
        for key, value in point.items()
        if key.endswith(("weight", "bias"))
    ]
    for value in moving:
        value.requires_grad_()
    t = np.array([0.0, 0.3, 1.0])
    engine = PlannedForward(model, path, t, x.detach(), backend="triton")
    for _ in range(2):  # weights that have changed are read anew
        outputs = engine(x)
        weights = torch.randn_like(outputs)
        ours, plain = (
            torch.autograd.grad(
                (out * weights).sum(), [x, *moving], allow_unused=True, materialize_grads=True
            )
            for out in (outputs, by_autograd(model, path, t, x))
        )
        for key in ("x", "weights"):
            pick = slice(1) if key == "x" else slice(1, None)
            a, b = (torch.cat([g.flatten() for g in grads[pick]]) for grads in (ours, plain))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.abs().max()))
        with torch.no_grad():
            for value in moving:
                value.mul_(0.9)
    with torch.no_grad():
        assert not engine(x).requires_grad


def test_gradients_of_inputs_alone():
    a, b = mlp(7, 6, 4, seed=0), mlp(7, 6, 4, seed=1)
    x = torch.randn(300, 7, requires_grad=True)
    forward(a, mc.Line(a, b), 3, x).sum().backward()
    (expected,) = torch.autograd.grad(
        by_autograd(a, mc.Line(a, b), np.array([0.0, 0.5, 1.0]), x).sum(), [x]
    )
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert not forward(a, mc.Line(a, b), 3, x.detach()).requires_grad
