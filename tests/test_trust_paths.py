"""Paths are what they say: directions, ties, points, control points, and values far out."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.parameters import state as states
from modeconn.parameters.blending import blend


class Attention(nn.Module):
    """Words, attention that a float mask makes causal, and a readout that is tied to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 8), nn.Linear(8, 24)
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("mask", torch.full((5, 5), -1e4).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens)
        q, k, v = self.mix(h).chunk(3, -1)
        h = h + (q @ k.transpose(1, 2) / 8**0.5 + self.mask).softmax(-1) @ v
        return self.out(self.norm(h.flatten(0, 1)).view_as(h))


def made(kind: type[nn.Module] = Attention, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def saved(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def linear(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return saved(nn.Linear(3, 2))


# -- random directions -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["filter", "layer", None])
@pytest.mark.parametrize("given", ["module", "state dict and module", "file and module"])
def test_a_direction_moves_parameters_alone_and_keeps_ties(given, norm, tmp_path):
    model = made()
    source, module = model, None
    if given != "module":
        source, module = saved(model), model
        source["out.weight"] = source["out.weight"].clone()
    if given == "file and module":
        states.save(source, tmp_path / "a.safetensors")
        source = tmp_path / "a.safetensors"
    plane = mc.Plane.random(source, seed=3, norm=norm, biases=True, module=module)
    u, v = plane.control_points[1:]
    for key in ("mask", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert not u[key].any() and not v[key].any()
    for key, value in model.named_parameters():
        if norm is not None and not value.any():  # scaled to a length of zero
            continue
        assert u[key].any() and not torch.equal(u[key], v[key])
    point = plane.at([0.3, -0.2])
    assert torch.equal(point["words.weight"], point["out.weight"])
    if norm is not None:
        return
    tokens = torch.arange(10).view(2, 5) % 9
    network = copy.deepcopy(model)
    network.load_state_dict(point)
    got = mc.forward(model, plane, [(0.3, -0.2)], tokens)[0]
    torch.testing.assert_close(got, network(tokens).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", [False, True])
def test_names_of_a_state_dict_that_share_memory_have_one_draw(file, tmp_path):
    state = {"a": torch.randn(6, 4), "c": torch.randn(3, 3)}
    state |= {"b": state["a"], "t": state["a"].t(), "part": state["a"][2:5]}
    source = state
    if file:
        source = tmp_path / "a.pt"
        torch.save(state, source)
    point = mc.Plane.random(source).at([0.5, 0.25])
    assert torch.equal(point["a"], point["b"])
    if not file:  # a file's tensors are copies, of which only equal ones stay one
        assert torch.equal(point["a"].t(), point["t"])
        assert torch.equal(point["a"][2:5], point["part"])
    assert not torch.equal(point["c"], state["c"])


def test_tensors_side_by_side_in_one_memory_have_draws_of_their_own():
    flat = torch.randn(24)
    u = mc.Plane.random({"a": flat[:12].view(3, 4), "b": flat[12:].view(3, 4)}).control_points[1]
    assert not torch.equal(u["a"], u["b"]) and u["a"].all() and u["b"].all()


# -- ties ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


TIED = {Attention: ("words.weight", "out.weight"), Pair: ("first.weight", "again.weight")}
TOLD = {
    Attention: "all are evaluated with tensors of their own",
    Pair: "one module under two names: all are evaluated with the second of each",
}


def ends_of(model: nn.Module) -> list[dict[str, Tensor]]:
    moved = {k: v + 1 if v.is_floating_point() else v for k, v in saved(model).items()}
    return [saved(model), moved]


def inputs_of(kind: type[nn.Module]) -> Tensor:
    return torch.arange(10).view(2, 5) % 9 if kind is Attention else torch.randn(2, 4)


@pytest.mark.filterwarnings("ignore:batch norms")
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", TIED)
def test_two_values_of_one_tensor(kind, where):
    """Ends may come apart, said so: each is then what PyTorch makes of its state, untied."""
    model = made(kind)
    ends, (one, other) = ends_of(model), TIED[kind]
    ends[where][other] = torch.randn_like(ends[0][other])
    x, path = inputs_of(kind), mc.Line(*ends)
    exact = copy.deepcopy(model).double()
    wide = x.double() if x.is_floating_point() else x

    def right(state: dict[str, Tensor]) -> Tensor:
        state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
        call = torch.func.functional_call
        return call(exact, state, (wide,), tie_weights=False).detach()

    with pytest.warns(UserWarning, match=f"'{one}'.*'{other}'.*{TOLD[kind]}"):
        got = mc.forward(model, path, 3, x)
    data, loss = ((x, x), "next_token") if kind is Attention else ((x, 0 * x), "mse")
    with pytest.warns(UserWarning, match=TOLD[kind]):
        found = mc.evaluate(model, path, data, 3, loss=loss)
    for k, state in ((0, ends[0]), (-1, ends[1])):
        expected = right(state)
        size = float(expected.abs().max())
        assert float((got[k].double() - expected).abs().max()) <= 2e-6 * size
        if kind is Attention:
            logits, words = expected[:, :-1].flatten(0, 1), x[:, 1:].flatten()
            measured = float(F.cross_entropy(logits, words))
        else:
            measured = float(expected.square().mean())
        np.testing.assert_allclose(found.loss[k], measured, rtol=1e-5)
    tied = right({**ends[where], other: ends[where][one]})  # what one tensor would have given
    assert float((got[-where].double() - tied).abs().max()) > 1e-2
    assert torch.equal(model.get_parameter(one), model.get_parameter(other))


@pytest.mark.parametrize("kind", TIED)
def test_directions_do_not_pull_one_tensor_apart(kind):
    model, x = made(kind), inputs_of(kind)
    one, other = TIED[kind]
    a, b = ends_of(model)
    path = mc.Plane(a, {one: torch.randn_like(a[one])}, b)
    with pytest.raises(mc.ModeconnError, match=f"'{one}'.*'{other}'"):
        mc.forward(model, path, 1, x)
    with pytest.raises(mc.ModeconnError, match=f"'{one}'.*'{other}'"):
        mc.evaluate(model, path, (x, torch.zeros(2)), 2, progress=False)


def test_what_keeps_the_module_as_it_is_refuses_two_values():
    """A fit trains, repair changes and map calls the module itself, which has one tensor."""
    model = made(Pair)
    ends, x = ends_of(model), torch.randn(8, 4)
    ends[1]["again.weight"] = torch.randn(4, 4)
    line, labels = mc.Line(*ends), torch.arange(8) % 4
    for call in (
        lambda: mc.fit_curve(model, *ends, (x, labels), steps=1, align=False, progress=False),
        lambda: mc.repair(model, line, (x, labels)),
        lambda: mc.map(lambda network: 0.0, model, line, 2),
        lambda: mc.certify(model, mc.PolyChain(ends), (x, labels)),
    ):
        with pytest.raises(mc.ModeconnError, match=r"'first\.weight' and 'again\.weight', which"):
            call()


def test_equal_values_of_one_tensor_need_not_share_memory():
    model = made(Pair)
    ends = [{k: v.clone() for k, v in made(Pair, seed).state_dict().items()} for seed in (0, 1)]
    x = torch.randn(3, 4)
    got = mc.forward(model, mc.Line(*ends), [1.0], x)[0]
    torch.testing.assert_close(got, made(Pair, 1)(x).detach())


# -- points ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points", [101.0, np.float64(3.0), np.array(2.0), torch.tensor(0.5), "101", "1e2", b"3", True]
)
def test_one_number_is_neither_a_count_nor_points(points):
    model = nn.Linear(3, 2)
    data = (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    line, plane = mc.Line(linear(0), linear(1)), mc.Plane.random(model)
    for path in (line, plane):
        with pytest.raises(mc.ModeconnError, match="points=101"):
            mc.evaluate(model, path, data, points, progress=False)
    with pytest.raises(mc.ModeconnError, match="points=101"):
        mc.forward(model, line, points, data[0])
    assert len(line.points(101)) == 101 and line.points([101.0]).tolist() == [101.0]


# -- control points --------------------------------------------------------------------------------


def test_control_points_that_share_memory_are_told():
    model = nn.Linear(3, 2)
    before = model.state_dict()
    with pytest.warns(UserWarning, match="control point 0 and control point 1 share memory"):
        mc.Line(before, model)
    a, b = linear(0), linear(1)
    with pytest.warns(UserWarning, match="control point 1 and control point 2 share memory"):
        mc.Plane.through(a, b, b)
    with pytest.warns(UserWarning, match="control point 0 and control point 2 share memory"):
        mc.Mixture([a, b, a])


def test_equal_control_points_are_told(tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    states.save(linear(0), file)
    states.save(linear(1), other)
    with pytest.warns(UserWarning, match=r"a\.safetensors and .*a\.safetensors are equal"):
        mc.Line(file, file)
    with pytest.warns(UserWarning, match="control point 0 and control point 1 are equal"):
        mc.Bezier([linear(0), linear(0), linear(1)])
    mc.PolyChain([file, other, file])  # a closed path: no warning, which would be an error here


def test_directions_that_are_zero_are_told():
    a, zero = linear(0), {k: torch.zeros_like(v) for k, v in linear(0).items()}
    with pytest.warns(UserWarning, match="direction 1 is zero in every tensor"):
        mc.Subspace(a, [linear(1), zero])
    with pytest.warns(UserWarning, match="is zero in every tensor"):
        mc.Plane(a, linear(1), zero)
    zero["bias"][0] = 1e-9
    mc.Subspace(a, [zero])


def test_no_points_are_none():
    with pytest.raises(mc.ModeconnError, match=r"points must be a count .* got None"):
        mc.Line(linear(0), linear(1)).points(None)


def test_a_path_of_networks_that_differ_in_one_number_is_no_point():
    a, b = linear(0), linear(0)
    b["bias"][1] += 1
    mc.Line(a, b)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_masks_that_differ_are_told(dtype):
    a, b = linear(0), linear(1)
    a |= {"mask": torch.tensor([0, 1, 1]).to(dtype), "calls": torch.tensor(3)}
    b |= {"mask": torch.tensor([1, 1, 0]).to(dtype), "calls": torch.tensor(9)}
    for make in (mc.Line, lambda *p: mc.PolyChain(p), lambda *p: mc.Mixture(p)):
        with pytest.warns(UserWarning, match="control point 1 has other values .*'mask'") as told:
            make(a, b)
        assert len(told) == 1 and "calls" not in str(told[0].message)


def test_counters_and_equal_masks_are_not_told():
    a, b = linear(0), linear(1)
    for k, state in enumerate((a, b)):
        state |= {"mask": torch.tensor([0, 1, 1]), "num_batches_tracked": torch.tensor(k)}
    mc.Line(a, b)
    mc.Plane.random(a)


# -- far out ---------------------------------------------------------------------------------------


def near(seed: int, base: nn.Module) -> nn.Module:
    torch.manual_seed(seed)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-3 * torch.randn_like(parameter) * parameter.std()
    return other


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_error_does_not_grow_with_t(depth, backend):
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32, bias=depth > 1) for _ in range(depth)]
    a = nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 4)).eval()
    b, c, x = near(1, a), near(2, a), torch.randn(50, 32)
    y = torch.arange(50) % 4
    cases = [
        (mc.Line(a, b), [0.0, 0.4, 1.0, 10.0, 1000.0, -1000.0]),
        (mc.PolyChain([a, b, c]), [0.25, 0.75, 300.0, -300.0]),
        (mc.Plane.through(a, b, c), [(0.2, 0.2), (-700.0, 300.0), (500.0, 500.0)]),
        (mc.Mixture([a, b, c]), [(0.5, 0.5, 0.5), (0.0, 800.0, -799.0)]),
        (mc.Bezier([a, b, c]), [0.5, 20.0]),
    ]
    for path, t in cases:
        exact = []
        for row in path.coefficients(t).tolist():
            network = copy.deepcopy(a).double()
            pairs = zip(row, path.control_points)
            terms = [{k: w * v.double() for k, v in point.items()} for w, point in pairs]
            network.load_state_dict({k: sum(term[k] for term in terms) for k in terms[0]})
            exact.append(network(x.double()).detach())
        got = mc.forward(a, path, t, x, backend=backend)
        for each, right in zip(got, exact):
            assert float((each.double() - right).abs().max()) <= 2e-6 * float(right.abs().max())
        result = mc.evaluate(a, path, (x, y), t, backend=backend, progress=False)
        losses = [float(F.cross_entropy(each, y)) for each in exact]
        np.testing.assert_allclose(result.loss, losses, rtol=2e-6)


def test_gradients_far_out_are_those_of_autograd():
    torch.manual_seed(0)
    a = nn.Linear(8, 3)
    b, x = near(1, a), torch.randn(5, 8)
    path = mc.Line(saved(a), saved(b))
    for point in path.control_points:
        for value in point.values():
            value.requires_grad_()
    mc.forward(a, path, [1000.0], x).sum().backward()
    expected = 1000.0 * x.sum(0).expand(3, 8)
    torch.testing.assert_close(path.control_points[1]["weight"].grad, expected)
    torch.testing.assert_close(path.control_points[0]["weight"].grad, -0.999 * expected)


def test_points_inside_keep_their_bits_beside_points_far_out():
    a = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    b, x = near(1, a), torch.randn(5, 8)
    path, inside = mc.Line(a, b), [0.0, 0.3, 1.0, 1.5]
    alone = mc.forward(a, path, inside, x)
    assert torch.equal(mc.forward(a, path, [*inside, 50.0, -50.0], x)[:4], alone)


@pytest.mark.parametrize("row", [(-999.0, 1000.0), (-999.5, 1000.0, 0.5), (3.0, -1.0, -1.0)])
def test_states_far_out_keep_their_digits(row):
    torch.manual_seed(0)
    base = torch.randn(1000)
    tensors = [base + 1e-3 * torch.randn(1000) for _ in row]
    exact = sum(c * tensor.double() for c, tensor in zip(row, tensors))
    assert float((blend(tensors, row).double() - exact).abs().max()) <= 2e-6


def test_no_warning_for_ordinary_paths():
    points = [linear(k) for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.Plane.through(*points)
        mc.Plane.random(points[0])
        mc.Plane.trajectory(points)
        mc.Mixture(points)
        mc.PolyChain([*points, points[0]])
