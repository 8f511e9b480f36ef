"""Groups of parameters with a t of their own, and spherical paths, against plain PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from naive import clone, mlp

State = dict[str, Tensor]
X, Y = torch.randn(33, 12, generator=torch.Generator().manual_seed(0)), torch.arange(33) % 5
GROUPS = ["0", r"2\.(weight|bias)"]


def pair() -> tuple[nn.Module, State, State]:
    return mlp(12, 9, 8, 5), clone(mlp(12, 9, 8, 5, seed=1)), clone(mlp(12, 9, 8, 5, seed=2))


def loss_of(model: nn.Module, state: State) -> float:
    network = copy.deepcopy(model).double()
    network.load_state_dict({name: value.double() for name, value in state.items()})
    with torch.no_grad():
        return F.cross_entropy(network(X.double()), Y).item()


def blended(a: State, b: State, t_of: dict[str, float]) -> State:
    """Each tensor at the t of its module; those of other modules stay."""
    state = {}
    for name, value in a.items():
        t = t_of.get(name.partition(".")[0], 0.0)
        state[name] = (1 - t) * value.double() + t * b[name].double()
    return state


def test_each_group_of_a_line_has_its_t():
    model, a, b = pair()
    path = mc.Line(a, b, groups=GROUPS)
    points = [[0.0, 0.0], [0.25, 0.0], [0.25, 1.0], [0.7, 0.2], [1.5, -2.5], [1.0, 1.0]]
    got = mc.evaluate(model, path, (X, Y), points, precision="float64")
    expected = [loss_of(model, blended(a, b, {"0": s, "2": t})) for s, t in points]
    np.testing.assert_allclose(got.loss, expected, rtol=1e-12)
    assert got.t.shape == (6, 2)


def test_states_of_grouped_points_are_bitwise_at_the_ends():
    _, a, b = pair()
    path = mc.Line(a, b, groups={"first": "0", "rest": "*"})
    there = path.at([[1.0, 0.0]])
    for name, value in there.items():
        assert torch.equal(value, (b if name.startswith("0.") else a)[name])
    assert all(torch.equal(path.at([[1.0, 1.0]])[name], b[name]) for name in b)


def test_a_count_moves_all_groups_together():
    model, a, b = pair()
    path = mc.Line(a, b, groups=["0", "*"])
    got = mc.evaluate(model, path, (X, Y), 5, precision="float64")
    whole = mc.evaluate(model, mc.Line(a, b), (X, Y), 5, precision="float64")
    np.testing.assert_allclose(got.loss, whole.loss, rtol=1e-12)


@pytest.mark.parametrize("kind", [mc.PolyChain, mc.Bezier])
def test_curves_have_groups(kind: type):
    model, a, b = pair()
    c = clone(mlp(12, 9, 8, 5, seed=3))
    path = kind([a, c, b], groups=["2", "0"])
    points = np.array([[0.1, 0.9], [0.6, 0.2], [0.6, 0.9], [0.0, 1.0]])
    got = mc.evaluate(model, path, (X, Y), points, precision="float64")
    whole = kind([a, c, b])
    expected = []
    for second, first in points:
        state = dict(a)
        for module, t in (("0", first), ("2", second)):
            row = whole.coefficients([t])[0].tolist()
            for name in (f"{module}.weight", f"{module}.bias"):
                state[name] = sum(r * p[name].double() for r, p in zip(row, (a, c, b)))
        expected.append(loss_of(model, state))
    np.testing.assert_allclose(got.loss, expected, rtol=1e-12)


def test_a_mixture_has_a_row_of_coefficients_for_each_group():
    model, a, b = pair()
    points = np.random.default_rng(0).normal(size=(4, 2, 2))
    path = mc.Mixture([a, b], groups=["0", "*"])
    got = mc.evaluate(model, path, (X, Y), points, precision="float64")
    expected = []
    for first, rest in points:
        state = {}
        for name in a:
            row = first if name.startswith("0.") else rest
            state[name] = row[0] * a[name].double() + row[1] * b[name].double()
        expected.append(loss_of(model, state))
    np.testing.assert_allclose(got.loss, expected, rtol=1e-12)
    assert got.t.shape == (4, 4)


def test_weights_and_biases_of_a_layer_may_move_apart():
    model, a, b = pair()
    path = mc.Line(a, b, groups={"weights": r".*\.weight", "biases": r".*\.bias"})
    points = [[0.3, 0.3], [0.3, 0.8], [0.0, 0.8]]
    got = mc.evaluate(model, path, (X, Y), points, precision="float64")
    expected = []
    for weights, biases in points:
        state = {}
        for name in a:
            t = weights if name.endswith("weight") else biases
            state[name] = (1 - t) * a[name].double() + t * b[name].double()
        expected.append(loss_of(model, state))
    np.testing.assert_allclose(got.loss, expected, rtol=1e-12)


def test_grouped_points_have_gradients():
    model, a, b = pair()
    for state in (a, b):
        for value in state.values():
            value.requires_grad_()
    path = mc.Line(a, b, groups=["0", "*"])
    forward = mc.Forward(model, path, X, backend="reference")
    forward([[0.25, 0.5]], X).square().sum().backward()
    state = {}
    for name in a:
        t = 0.25 if name.startswith("0.") else 0.5
        state[name] = (1 - t) * a[name].detach() + t * b[name].detach()
        state[name].requires_grad_()
    torch.func.functional_call(model, state, X).square().sum().backward()
    for name, value in state.items():
        t = 0.25 if name.startswith("0.") else 0.5
        torch.testing.assert_close(b[name].grad, t * value.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "groups, words",
    [
        (["0", "nowhere", "9"], ["'nowhere' matches no entry", "'9' matches no entry"]),
        (["0", r".*weight"], ["'0.weight' is in groups '0'; '.*weight'"]),
        (["0", "2", "4", "*"], ["which is nothing"]),
        ([], ["expected a list of patterns"]),
        (["0", "0"], ["'0' twice"]),
        (["("], ["no regular expression"]),
        ({"none": []}, ["without a pattern"]),
        ([3], ["expected a pattern"]),
    ],
)
def test_patterns_that_do_not_fit_are_listed(groups: object, words: list[str]):
    _, a, b = pair()
    with pytest.raises(mc.ModeconnError) as error:
        mc.Line(a, b, groups=groups)
    for word in words:
        assert word in str(error.value)


def test_tied_entries_move_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.tanh(self.one(x)))

    model, x, y = Tied(), X[:, :6], Y
    path = mc.Line(Tied().state_dict(), Tied().state_dict(), groups=["one", "other"])
    with pytest.raises(mc.ModeconnError, match=r"'one.weight' and 'other.weight'.*apart"):
        mc.evaluate(model, path, (x, y), [[0.5, 0.0]])
    both = ["one", r"other\.weight"]
    path = mc.Line(Tied().state_dict(), Tied().state_dict(), groups=[both, r"other\.bias"])
    assert np.isfinite(mc.evaluate(model, path, (x, y), [[0.5, 0.0]]).loss).all()


def spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    a, b = a.double(), b.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    if cosine.abs() > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def test_slerp_goes_along_the_circle_of_each_tensor():
    model, a, b = pair()
    b["4.bias"] = 2 * a["4.bias"]  # parallel
    path = mc.Slerp(a, b)
    t = [0.0, 0.3, 0.5, 1.0, 1.2]
    got = mc.evaluate(model, path, (X, Y), t, precision="float64")
    expected = [loss_of(model, {n: spherical(a[n], b[n], each) for n in a}) for each in t]
    np.testing.assert_allclose(got.loss, expected, rtol=1e-12)
    assert all(torch.equal(path.at(1)[name], b[name]) for name in b)
    middle = path.at(0.3)
    for name in a:
        torch.testing.assert_close(middle[name], spherical(a[name], b[name], 0.3).float())


def test_slerp_has_groups():
    model, a, b = pair()
    path = mc.Slerp(a, b, groups=["0", "4"])
    got = mc.evaluate(model, path, (X, Y), [[0.25, 0.75]], precision="float64")
    state = dict(a)
    for name in a:
        t = {"0": 0.25, "4": 0.75}.get(name[0])
        if t is not None:
            state[name] = spherical(a[name], b[name], t)
    np.testing.assert_allclose(got.loss, [loss_of(model, state)], rtol=1e-12)


def test_a_grouped_evaluation_resumes_only_with_its_groups(tmp_path):
    model, a, b = pair()
    file, points = tmp_path / "sums", [[0.2, 0.4]]
    first = mc.evaluate(model, mc.Line(a, b, groups=["0", "2"]), (X, Y), points, resume=file)
    again = mc.evaluate(model, mc.Line(a, b, groups=["0", "2"]), (X, Y), points, resume=file)
    assert first.loss.tobytes() == again.loss.tobytes()
    with pytest.raises(mc.ModeconnError):
        mc.evaluate(model, mc.Line(a, b, groups=["2", "0"]), (X, Y), points, resume=file)
