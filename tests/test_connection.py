"""Connections: saved bit for bit, small on disk, refused where damaged; evaluated and drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from modeconn.connection.connection import BREAKPOINTS, CONTENT, Connection
from modeconn.connection.storage import bitwise_equal, pack, unpack
from modeconn.connection.verification import certify, verify
from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate
from modeconn.parameters import state as states
from modeconn.parameters.paths import Line, PolyChain
from naive import mlp, pass_per_point
from walk import KINDS, Walk, conv_net, walk


@pytest.fixture(scope="module")
def made() -> tuple[Walk, Connection]:
    torch.manual_seed(0)
    w = walk(conv_net(), (2, 8, 8))
    certificate = certify(w.model, w.chain, w.path, w.data)
    test = certify(w.model, w.chain, w.path, (w.x[:20] * 2, w.y[:20]))
    details = {
        "subnetworks": [{"entry": 0, "kept": np.arange(3), "loss": math.inf}],
        "seconds": 1.5,
    }
    return w, Connection(w.path, KINDS, certificate, test, "mine:net", details)


@pytest.fixture
def saved(made, tmp_path: Path) -> Path:
    made[1].save(tmp_path / "connection")
    return tmp_path / "connection"


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


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


# ---------------------------------------------------------------- damaged folders


def content_of(folder: Path) -> dict:
    return json.loads((folder / CONTENT).read_text())


def rewrite(folder: Path, **changes) -> None:
    content = content_of(folder) | changes
    (folder / CONTENT).write_text(
        json.dumps({key: value for key, value in content.items() if value != "REMOVED"})
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "modeconn.Connection/9"},
            "format is 'modeconn.Connection/9', expected 'modeconn.Connection/1'",
        ),
        ({"format": "REMOVED"}, "format is None"),
        ({"breakpoints": "REMOVED"}, "connection.json has no 'breakpoints'"),
        ({"breakpoints": 1}, "breakpoints is 1"),
        ({"breakpoints": "7"}, "breakpoints is '7'"),
        ({"breakpoints": 5, "kinds": ["swing"] * 4}, "is no part of a path of 5 breakpoints"),
        ({"kinds": ["swing"]}, "kinds is not a list of 6 words"),
        ({"kinds": ["swing"] * 5 + ["jump"]}, "'jump'"),
        ({"certificate": {}}, "not a certificate: KeyError: 'format'"),
        ({"test_certificate": 3}, "not a certificate"),
        ({"model": 3}, "model is no text"),
        ({"details": []}, "details are no table"),
        (
            {"sha256": "0"},
            "breakpoints.safetensors is not the file that connection.json was written with",
        ),
    ],
)
def test_a_changed_connection_json(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ModeconnError, match=message.replace(".", r"\.").replace("[", r"\[")):
        Connection.load(saved)


def test_truncated_and_missing_files(saved, tmp_path):
    text, weights = (saved / CONTENT).read_bytes(), (saved / BREAKPOINTS).read_bytes()
    for name, content, message in [
        (CONTENT, text[:-20], "connection.json: truncated or damaged"),
        (CONTENT, b"\xff\xfe", "connection.json: truncated or damaged"),
        (CONTENT, b"[1]", "holds a list, expected a table"),
        (BREAKPOINTS, weights[:-4], "breakpoints.safetensors: truncated or damaged"),
        (BREAKPOINTS, b"", "breakpoints.safetensors: is empty"),
    ]:
        (saved / CONTENT).write_bytes(text)
        (saved / BREAKPOINTS).write_bytes(weights)
        (saved / name).write_bytes(content)
        with pytest.raises(ModeconnError, match=message):
            Connection.load(saved)
    for name in (BREAKPOINTS, CONTENT):
        (saved / name).unlink()
        with pytest.raises(ModeconnError, match=f"has no {name}"):
            Connection.load(saved)
    for folder, problem in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "is a file"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(ModeconnError, match=problem):
            Connection.load(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / BREAKPOINTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


ROWS, COLUMNS, VALUES = (f"1/{part}/4.weight" for part in ("rows", "columns", "values"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {ROWS: p[ROWS] + 100}, "rows go from 103 to 105, expected 0 to 6"),
        (lambda p: {ROWS: -p[ROWS]}, "rows go from -5 to -3"),
        (lambda p: {COLUMNS: p[COLUMNS] + 4}, "columns go from"),
        (lambda p: {ROWS: p[ROWS].float()}, r"rows are torch.float32"),
        (lambda p: {ROWS: p[ROWS][:2]}, "values have shape"),
        (
            lambda p: {VALUES: p[VALUES].double()},
            "values are torch.float64, expected torch.float32",
        ),
        (lambda p: {COLUMNS: None}, "has rows, which do not fit 4 dimensions"),
        (lambda p: {VALUES: None}, "the values are missing"),
        (
            lambda p: {"1/values/new": torch.zeros(2)},
            "changes 'new', which the first breakpoint does not have",
        ),
        (lambda p: {"1/power/4.weight": torch.zeros(2)}, "is no part of a path"),
        (lambda p: {"x/values/4.weight": torch.zeros(2)}, "is no part of a path"),
        (
            lambda p: {name: None for name in p if name.startswith("0/")},
            "the first breakpoint is missing",
        ),
        (lambda p: {VALUES: p[VALUES] * math.nan}, "breakpoint 1: weights must be finite"),
    ],
)
def test_breakpoints_that_do_not_fit_together(saved, change, message):
    from modeconn.connection.connection import _sha256

    packed = tensors_of(saved)
    assert packed[ROWS].tolist() == [3, 4, 5]
    packed = {name: value for name, value in (packed | change(packed)).items() if value is not None}
    states.save(packed, saved / BREAKPOINTS)
    rewrite(saved, sha256=_sha256(saved / BREAKPOINTS))
    with pytest.raises(ModeconnError, match=message):
        Connection.load(saved)


def test_where_a_connection_is_not_written(made, tmp_path):
    _, connection = made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for target, message in [
        ("full", "holds something else than a connection"),
        ("file", "holds something else than a connection"),
        ("no/where", "there is no folder"),
    ]:
        with pytest.raises(ModeconnError, match=message):
            connection.save(tmp_path / target)
    assert sorted(names_in(tmp_path)) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    connection.save(tmp_path / "empty")
    assert Connection.load(tmp_path / "empty").kinds == KINDS


@pytest.mark.parametrize(
    "broken", ["modeconn.parameters.state.save", "modeconn.connection.connection.atomic_write"]
)
@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_save_leaves_what_was_there(made, tmp_path, monkeypatch, broken, before):
    _, connection = made
    target = tmp_path / "c"
    if before:
        connection.save(target)
    changed = dataclasses.replace(connection, model="other")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        changed.save(target)
    monkeypatch.undo()
    assert names_in(tmp_path) == (["c"] if before else [])
    if before:
        assert Connection.load(target).model == "mine:net"


def test_a_replacement_that_fails_puts_the_old_one_back(made, tmp_path, monkeypatch):
    _, connection = made
    connection.save(tmp_path / "c")
    real = Path.rename

    def rename(self, target):
        if self.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ModeconnError, match="cannot be written: No space left on device"):
        dataclasses.replace(connection, model="other").save(tmp_path / "c")
    monkeypatch.undo()
    assert names_in(tmp_path) == ["c"]
    assert Connection.load(tmp_path / "c").model == "mine:net"


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
