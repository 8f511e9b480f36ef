"""Properties of paths and of their evaluation, for random networks, besides comparisons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.backends.native import extension as native
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy

ROWS = torch.randn(37, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(21, 2, 6, 6, generator=torch.Generator().manual_seed(1))
BACKENDS = ["reference", *(["native"] if native.available() else [])]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
pytestmark = pytest.mark.filterwarnings("ignore:batch norms .* have interpolated")


class Block(nn.Module):
    """A residual block with norms, which the engine and the planner both know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last((x + torch.tanh(self.second(x))).mean((2, 3)))


MODELS = {"rows": mlp(6, 9, 7, 3), "images": Block()}
INPUTS = {"rows": ROWS, "images": IMAGES}


def labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 3


def network(name: str, seed: int) -> dict[str, Tensor]:
    """Weights of one of the models, some of them zero or tiny, so that units die and bits count."""
    generator = torch.Generator().manual_seed(seed)
    state = clone(MODELS[name])
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
            continue
        value.normal_(0.0, 0.5, generator=generator)
        value.view(-1)[:: 3 + seed % 3] = [0.0, -0.0, 1e-42][seed % 3]
    return state


def evaluated(
    name: str, path: object, points: object, data: object = None, **options
) -> np.ndarray:
    x = INPUTS[name]
    return mc.evaluate(MODELS[name], path, data or (x, labels(x)), points, **options).loss


def close(name: str, path: object, got: np.ndarray, t: object, dtype: str = "float32") -> None:
    """Compare with what the path gives at t, by the policy."""
    x, t = INPUTS[name], path.points(t)
    plain, exact = (
        pass_per_point(MODELS[name], path, x, labels(x), t, kind)["loss"]
        for kind in (DTYPES[dtype], torch.float64)
    )
    assert_within_policy(name, got, plain, exact, DTYPES[dtype])


names = st.sampled_from(sorted(MODELS))
seeds = st.integers(0, 10_000)
few = settings(max_examples=6)


def curves(name: str, seed: int) -> list[tuple[object, object]]:
    """Paths, each with the same one from the other end."""
    a, b, c = (network(name, seed + i) for i in range(3))
    return [
        (mc.Line(a, b), mc.Line(b, a)),
        (mc.PolyChain([a, b, c]), mc.PolyChain([c, b, a])),
        (mc.Bezier([a, b, c]), mc.Bezier([c, b, a])),
    ]


@few
@given(name=names, seed=seeds)
def test_ends_are_the_given_networks_bit_for_bit(name: str, seed: int):
    """Signs of zeros and subnormals included; the loss there is that of the network alone."""
    for path, _ in curves(name, seed):
        for t, point in ((0.0, path.control_points[0]), (1.0, path.control_points[-1])):
            for key, value in path.at(t).items():
                expected = point if value.is_floating_point() else path.control_points[0]
                assert value.numpy().tobytes() == expected[key].numpy().tobytes(), key
            for backend in BACKENDS:
                alone = evaluated(name, mc.Mixture([point]), [[1.0]], backend=backend)
                assert evaluated(name, path, [t], backend=backend)[0] == alone[0]


@few
@given(name=names, seed=seeds, t=st.lists(st.floats(0, 1), min_size=1, max_size=4))
@pytest.mark.parametrize("precision", DTYPES)
def test_a_reversed_path_gives_the_reversed_curve(precision: str, name, seed, t):
    for forth, back in curves(name, seed):
        got = evaluated(name, back, 1 - np.array(t), precision=precision)
        if (
            forth.segment_of(np.array(t)).tolist()
            == forth.segment_of(1 - (1 - np.array(t))).tolist()
        ):
            close(name, forth, got, t, precision)


@few
@given(name=names, seed=seeds, t=st.lists(st.floats(-0.2, 1.2), min_size=2, max_size=6))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_alone_is_that_point_among_others(backend: str, name, seed, t):
    """By the policy: a plan for more points may combine what one for few points does not.

    To the bit where the plan is one: the same points, whatever their order and repetitions.
    """
    path = mc.Line(network(name, seed), network(name, seed + 1))
    together = evaluated(name, path, t, backend=backend)
    alone = np.concatenate([evaluated(name, path, [each], backend=backend) for each in t])
    close(name, path, together, t)
    close(name, path, alone, t)
    again = evaluated(name, path, [*t[::-1], *t], backend=backend)
    np.testing.assert_array_equal(again, [*together[::-1], *together])


@few
@given(name=names, seed=seeds, low=st.floats(-0.2, 0.5), high=st.floats(0.5, 1.2))
def test_a_part_of_a_line_is_that_line(name: str, seed: int, low: float, high: float):
    """The line between two of its points is the line, in an affine function of t."""
    line = mc.Line(*(network(name, seed + i) for i in range(2)))
    ends = [{k: v.double() for k, v in line.at(t).items()} for t in (low, high)]
    model = MODELS[name]
    part = mc.Line(*({k: v.to(model.state_dict()[k].dtype) for k, v in e.items()} for e in ends))
    u = np.linspace(0, 1, 4)
    got, want = evaluated(name, part, u), evaluated(name, line, low + u * (high - low))
    # the ends were rounded to float32, which moves a loss as a float32 pass does
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-6)


@few
@given(name=names, seed=seeds)
def test_the_order_of_samples_does_not_matter(name: str, seed: int):
    path, x = mc.Line(network(name, seed), network(name, seed + 1)), INPUTS[name]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for size in (None, 8):
        got = evaluated(name, path, 4, (x[order], labels(x)[order]), batch_size=size)
        close(name, path, got, 4)


@few
@given(name=names, seed=seeds)
def test_a_control_point_of_coefficient_0_changes_no_bit(name: str, seed: int):
    a, b, c = (network(name, seed + i) for i in range(3))
    rows = np.array([[0.5, 0.5], [0.75, 0.5], [0.0, 1.0]])
    none = np.zeros((3, 1))
    two = evaluated(name, mc.Mixture([a, b]), rows)
    for points, coefficients in (
        ([a, b, c], np.hstack([rows, none])),
        ([c, a, b], np.hstack([none, rows])),
    ):
        np.testing.assert_array_equal(evaluated(name, mc.Mixture(points), coefficients), two)


class Spectral(nn.Module):
    """Gives the largest singular value of what its layers multiply by, as two logits."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.first, self.second = norm(nn.Linear(6, 5)), norm(nn.Linear(5, 4), n_power_iterations=3)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [torch.linalg.matrix_norm(m.weight, 2) for m in (self.first, self.second)]
        return torch.stack(sizes).expand(len(x), 2)


@settings(max_examples=4)
@given(seed=seeds)
def test_spectral_norms_are_1_at_every_t(seed: int):
    ends = []
    for each in (seed, seed + 1):
        torch.manual_seed(each)
        model = Spectral().train()
        for _ in range(30):  # u and v of a trained network are those of its weights
            model(torch.randn(2, 6))
        ends.append(model.eval())
    with pytest.warns(UserWarning, match="spectral norms"):
        sizes = mc.forward(ends[0], mc.Line(*ends), [0.0, 0.2, 0.5, 0.9, 1.0], ROWS[:2])
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=2e-2, atol=0)
    between = sizes[1:-1]  # there u and v are computed to the last digit
    torch.testing.assert_close(between, torch.ones_like(between), rtol=1e-5, atol=0)


class Reader(nn.Module):
    """A causal model of words that leaves padding out, on whichever side it is."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.qkv = nn.Linear(8, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.words(input_ids)).chunk(3, -1)
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        seen = causal[None] & attention_mask[:, None, :].bool()
        seen = seen | torch.eye(length, dtype=torch.bool, device=q.device)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def texts(side: str, more: int) -> tuple[dict[str, Tensor], Tensor]:
    """Texts of 2 to 6 words, padded on one side, with labels of -100 there."""
    generator = torch.Generator().manual_seed(5)
    width = 6 + more
    words = torch.zeros(17, width, dtype=torch.long)
    mask, targets = torch.zeros_like(words), torch.full_like(words, -100)
    for i in range(len(words)):
        length = 2 + i % 5
        place = slice(0, length) if side == "right" else slice(width - length, width)
        words[i, place] = torch.randint(1, 11, (length,), generator=generator)
        targets[i, place] = torch.randint(0, 11, (length,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": words, "attention_mask": mask}, targets


def test_padding_counts_nowhere():
    """Equal at batches of 1, 8 and 16, with padding on either side, and with more of it."""
    torch.manual_seed(0)
    a, b = Reader(), Reader()
    path, losses = mc.Line(a, b), []
    for side, more in (("right", 0), ("left", 0), ("left", 3)):
        for size in (1, 8, 16):
            result = mc.evaluate(a, path, texts(side, more), 3, batch_size=size)
            losses.append(result.loss)
    x, y = texts("right", 0)
    exact = [_at(path, t)(**x)[y != -100] for t in (0.0, 0.5, 1.0)]
    expected = [F.cross_entropy(outputs, y[y != -100]).item() for outputs in exact]
    for loss in losses:
        np.testing.assert_allclose(loss, expected, rtol=2e-6)


def _at(path: object, t: float) -> nn.Module:
    made = Reader().double()
    made.load_state_dict({k: v.double() for k, v in path.at(t).items()})
    return made.requires_grad_(False)
