"""Connections: saved bit for bit and small on disk; evaluated, drawn and printed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import connection_cases
from connection_cases import names_in
from modeconn.connection.connection import BREAKPOINTS, CONTENT, Connection
from modeconn.connection.storage import bitwise_equal, pack, unpack
from modeconn.connection.verification import certify, verify
from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate
from modeconn.parameters import state as states
from modeconn.parameters.paths import Line, PolyChain
from naive import mlp, pass_per_point
from walk import KINDS, walk

# Fixtures.
made = connection_cases.made
saved = connection_cases.saved


def assert_same_points(
    got: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]
) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert set(one) == set(other)
        assert all(
            v.dtype == other[key].dtype and v.shape == other[key].shape for key, v in one.items()
        )
        assert all(bitwise_equal(v, other[key]) for key, v in one.items())


def test_a_connection_comes_back_bit_for_bit(made, saved):
    w, connection = made
    again = Connection.load(saved)
    assert_same_points(again.path.control_points, w.points)
    assert again.kinds == KINDS
    assert again.certificate == connection.certificate
    assert again.test_certificate == connection.test_certificate
    assert again.model == "mine:net"
    assert again.details == {
        "subnetworks": [{"entry": 0, "kept": [0, 1, 2], "loss": "inf"}],
        "seconds": 1.5,
    }
    assert verify(w.model, again, w.data, a=w.points[0], b=w.points[-1]).same_data
    assert sorted(names_in(saved)) == [BREAKPOINTS, CONTENT]
    assert names_in(saved.parent) == ["connection"]
    bare = dataclasses.replace(connection, test_certificate=None, model=None, details={})
    bare.save(saved)  # in place of the other
    assert Connection.load(saved).test_certificate is None
    assert names_in(saved.parent) == ["connection"]


@st.composite
def random_points(draw):
    """Draw states that each change some numbers of the one before, signs of zeros among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = {"w": (5, 4), "b": (5,), "c": (3, 2, 2, 2), "s": ()}
    points = [{key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}]
    points[0] |= {
        "n": torch.tensor(3),
        "m": torch.arange(6).view(2, 3),
        "d": torch.zeros(3, 3, dtype=torch.float64),
    }
    for _ in range(draw(st.integers(1, 4))):
        point = dict(points[-1])
        for key in draw(st.lists(st.sampled_from(list(point)), unique=True)):
            value = point[key].clone()
            flat = value.view(-1)
            for index in draw(st.lists(st.integers(0, flat.numel() - 1), max_size=4)):
                new = draw(st.sampled_from([0.0, -0.0, 1.0, 1e-42]))
                flat[index] = new if value.is_floating_point() else int(new)
            point[key] = value
        points.append(point)
    return points


@given(random_points())
def test_differences_give_the_points_back(points):
    packed = pack(points)
    assert_same_points(unpack(packed, len(points)), points)
    size = sum(v.numel() * v.element_size() for v in packed.values())
    assert size <= sum(v.numel() * v.element_size() for point in points for v in point.values())


def test_forty_breakpoints_cost_a_small_multiple_of_one(tmp_path):
    """On a wide chain, with rewrites of a few rows in every layer and swings in turn."""
    generator = torch.Generator().manual_seed(0)
    points = [states.load(mlp(64, 256, 256, 256, 256, 10))]
    for k in range(40):
        point = {key: value.clone() for key, value in points[-1].items()}
        if k % 2:
            point["8.weight"] = torch.randn(10, 256, generator=generator)
            point["8.bias"] = torch.randn(10, generator=generator)
        else:
            for key in ("0", "2", "4", "6"):
                rows = torch.randperm(256, generator=generator)[:20]
                point[f"{key}.weight"][rows] = torch.randn(
                    20, point[f"{key}.weight"].shape[1], generator=generator
                )
                point[f"{key}.bias"][rows] = 0.5
        points.append(point)
    states.save(points[0], tmp_path / "one.safetensors")
    states.save(pack(points), tmp_path / "all.safetensors")
    one, everything = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("one", "all"))
    assert everything < 4 * one  # 41 checkpoints would be 41
    loaded = unpack(states.load(tmp_path / "all.safetensors"), 41)
    assert_same_points(loaded, points)
    shared = sum(loaded[k][key] is loaded[k - 1][key] for k in range(1, 41) for key in loaded[0])
    assert shared == 20 * 8 + 20 * 2  # what a segment does not touch is the same tensor


# ---------------------------------------------------------------- use


def test_evaluate_shows_swings_at_more_points(made):
    w, connection = made
    result = connection.evaluate(w.model, w.data, points_per_segment=4, progress=False)
    assert len(result.t) == 7 + 2 * 3
    assert set(connection.breakpoints) <= set(result.t)
    at = np.isin(result.t, connection.breakpoints)
    np.testing.assert_allclose(result.loss[at], connection.certificate.losses, rtol=1e-5)
    np.testing.assert_array_equal(result.error[at], connection.certificate.errors)
    assert result.loss.max() <= connection.certificate.bound * (1 + 1e-5)
    expected = pass_per_point(w.model, w.path, *w.data, result.t, torch.float64)
    np.testing.assert_allclose(result.loss, expected["loss"], rtol=1e-4)
    with pytest.raises(ModeconnError, match="points_per_segment is 0"):
        connection.points(0)


def test_a_connection_prints_its_bounds(made):
    _, connection = made
    text = str(connection)
    assert "path of 6 segments (3 rewrites, 2 swings, 1 shift) for mine:net" in text
    assert f"loss at most {connection.certificate.bound:.4g}" in text
    assert "other data: loss at most" in text
    assert connection.certificate.advice in text
    assert repr(connection).startswith("Connection(6 segments, bound=")


def test_kinds_must_fit_the_path(made):
    w, connection = made
    with pytest.raises(ModeconnError, match="expected one for each of the 6 segments"):
        Connection(w.path, KINDS[1:], connection.certificate)
    with pytest.raises(ModeconnError, match="'jump'"):
        Connection(w.path, ("jump", *KINDS[1:]), connection.certificate)


def axes():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


# of the straight line, whose statistics are interpolated
@pytest.mark.filterwarnings("ignore:batch norms")
@pytest.mark.parametrize("curves", [False, True])
def test_the_plot_has_bound_line_and_kinds(made, curves):
    w, connection = made
    line = result = None
    if curves:
        line = evaluate(w.model, Line(w.points[0], w.points[-1]), w.data, points=9, progress=False)
        result = connection.evaluate(w.model, w.data, progress=False)
    ax = connection.plot(axes(), line, result)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    bound = f"{connection.certificate.bound:.3g}"
    assert f"certified bound: loss ≤ {bound}" in labels
    assert {"rewrite: function constant", "shift: function constant", "swing: loss convex"} <= set(
        labels
    )
    assert any(label.startswith("straight line: loss") for label in labels) == curves
    heights = [
        float(drawn.get_ydata()[0]) for drawn in ax.lines if len(set(drawn.get_ydata())) == 1
    ]
    assert connection.certificate.bound in heights
    ax.figure.canvas.draw()


def test_a_plot_of_losses_that_are_not_finite(made):
    _, connection = made
    c = connection.certificate
    segments = [dataclasses.replace(s, losses=(math.nan, math.inf)) for s in c.segments]
    odd = dataclasses.replace(
        connection, certificate=type(c).of(segments, c.labels, c.samples, c.digest)
    )
    ax = odd.plot(axes())
    assert not any("bound" in text.get_text() for text in ax.get_legend().get_texts())
    ax.figure.canvas.draw()


def test_a_loss_over_decades_is_drawn_on_a_log_scale():
    w = walk(mlp(5, 8, 9, 4), (5,))
    connection = Connection(PolyChain(w.points), KINDS, certify(w.model, w.chain, w.path, w.data))
    assert connection.plot(axes()).get_yscale() == "linear"
    c = connection.certificate
    segments = [
        dataclasses.replace(s, losses=(10.0**-k, 10.0 ** -(k + 1)))
        for k, s in enumerate(c.segments)
    ]
    steep = dataclasses.replace(
        connection, certificate=type(c).of(segments, c.labels, c.samples, c.digest)
    )
    assert steep.plot(axes()).get_yscale() == "log"
