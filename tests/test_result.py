"""Results: barrier, attributes, saving and loading, tables, plots."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path

import hypothesis.strategies as st
import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given

from modeconn.errors import ModeconnError
from modeconn.evaluation.result import PathResult

mpl.use("Agg")

T = np.linspace(0, 1, 11)
HUMP = np.sin(np.pi * T) ** 2


def result_of(t=T, info=None, **values) -> PathResult:
    return PathResult(np.asarray(t), values, 1437, 1, "reference", 1.25, info or {})


# ---------------------------------------------------------------- values


def test_metrics_are_attributes_and_an_unknown_one_lists_them():
    result = result_of(loss=HUMP, top5_error=HUMP / 2)
    assert result.loss is result.values["loss"]
    assert result.top5_error.dtype == np.float64
    assert {"loss", "top5_error", "barrier"} <= set(dir(result))
    with pytest.raises(AttributeError, match=r"no 'accuracy'; its metrics are loss, top5_error"):
        _ = result.accuracy
    with pytest.raises(
        ModeconnError, match=r"'accuracy' is not in this result, which has loss, top5_error"
    ):
        result.barrier("accuracy")


def test_a_result_survives_pickling():
    # Unpickling looks attributes up before there are any values.
    again = pickle.loads(pickle.dumps(result_of(loss=HUMP)))
    np.testing.assert_array_equal(again.loss, HUMP)


@pytest.mark.parametrize(
    ("t", "column"), [([], []), ([0, 1], [1.0]), ([[[0.0]]], [1.0]), (0.5, 1.0)]
)
def test_shapes_that_do_not_agree_are_refused(t, column):
    with pytest.raises(ModeconnError, match="shape"):
        result_of(t, loss=column)


def test_highest_is_the_largest_value_and_a_nan_counts_as_larger():
    assert result_of(loss=HUMP).highest() == (0.5, 1.0)
    plane = result_of([[0.0, 0.0], [0.25, 1.0]], loss=[1.0, 2.0])
    assert plane.highest("loss") == ((0.25, 1.0), 2.0)
    where, value = result_of([0, 0.5, 1], loss=[1.0, math.nan, 3.0]).highest()
    assert where == 0.5
    assert math.isnan(value)


def test_repr_shows_ranges_and_how_many_values_are_not_finite():
    text = repr(result_of([0, 0.5, 1], loss=[0.25, math.nan, 3.0], error=[math.inf] * 3))
    assert "loss=0.25…3 (1 not finite)" in text
    assert "error=not finite" in text


# ---------------------------------------------------------------- barrier


def test_the_barrier_is_the_rise_above_the_straight_line():
    chord = 0.2 * (1 - T) + 1.4 * T
    assert result_of(loss=chord + 3 * HUMP).barrier() == pytest.approx(3)
    assert result_of(loss=chord + 3 * HUMP, error=HUMP / 2).barrier("error") == pytest.approx(0.5)


def test_only_t_within_the_ends_count_for_the_barrier():
    t, loss = [-0.5, 0, 0.5, 1, 1.5], [100, 1, 2, 1, 100]
    assert result_of(t, loss=loss).barrier() == 1


@given(
    st.lists(st.floats(-1, 2, allow_nan=False), max_size=30),
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.randoms(use_true_random=False),
)
def test_the_barrier_follows_its_definition_in_any_order(inner, first, last, random):
    t = [0.0, 1.0, *inner]
    loss = {0.0: first, 1.0: last} | {
        x: random.uniform(-9, 9) for x in inner if x not in (0.0, 1.0)
    }
    order = random.sample(range(len(t)), len(t))
    result = result_of([t[i] for i in order], loss=[loss[t[i]] for i in order])
    expected = max(loss[x] - ((1 - x) * first + x * last) for x in t if 0 <= x <= 1)
    assert result.barrier() == pytest.approx(expected, abs=1e-12)
    assert result.barrier() >= 0


def test_a_barrier_that_is_not_finite_is_not_hidden():
    assert math.isnan(result_of([0, 0.5, 1], loss=[1, math.nan, 1]).barrier())
    assert result_of([0, 0.5, 1], loss=[1, math.inf, 1]).barrier() == math.inf
    assert math.isnan(result_of([0, 0.5, 1], loss=[1, 1, math.inf]).barrier())


def test_a_barrier_needs_both_ends_and_one_coordinate():
    with pytest.raises(ModeconnError, match=r"t = 0 and 1 was not evaluated"):
        result_of([0.25, 0.75], loss=[1, 2]).barrier()
    with pytest.raises(ModeconnError, match=r"t = 1 was not evaluated"):
        result_of([0, 0.999], loss=[1, 2]).barrier()
    with pytest.raises(ModeconnError, match="t has 2 coordinates: a barrier needs"):
        result_of([[0, 0], [1, 1]], loss=[1, 2]).barrier()


# ---------------------------------------------------------------- files

finite_or_not = st.floats(width=64)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@given(data=st.data())
def test_saved_and_loaded_is_equal_to_the_last_bit(tmp_path_factory, suffix, dimensions, data):
    rows = data.draw(st.integers(1, 5))
    shape = (rows,) if dimensions == 1 else (rows, dimensions)
    t = np.array(
        data.draw(st.lists(finite_or_not, min_size=math.prod(shape), max_size=math.prod(shape)))
    )
    columns = {
        name: np.array(data.draw(st.lists(finite_or_not, min_size=rows, max_size=rows)))
        for name in ("loss", "a name/with: odd… letters", "file", "t", "meta")
    }
    result = PathResult(
        t.reshape(shape), columns, 60000, 1, "reference", 0.125, {"torch": "2.9", "threads": 2}
    )
    file = tmp_path_factory.mktemp("results") / f"result{suffix}"
    result.save(file)
    again = PathResult.load(file)
    np.testing.assert_array_equal(again.t, result.t)
    assert list(again.values) == list(result.values)
    for name, column in result.values.items():
        np.testing.assert_array_equal(again.values[name], column)
        number = ~np.isnan(column)  # the sign of a NaN means nothing, that of a zero does
        np.testing.assert_array_equal(
            np.signbit(again.values[name])[number], np.signbit(column)[number]
        )
    for name in ("samples", "passes", "backend", "seconds", "info"):
        assert getattr(again, name) == getattr(result, name)


def test_json_is_standard_and_holds_the_barrier(tmp_path: Path):
    result_of([0, 0.5, 1], loss=[1, 3, 1], error=[0, math.inf, math.nan]).save(tmp_path / "r.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert content["barrier"] == {"loss": 2, "error": "nan"}
    assert content["values"]["error"] == [0, "inf", "nan"]
    assert content["samples"] == 1437


def test_npz_opens_without_pickle(tmp_path: Path):
    result_of(loss=HUMP).save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["values/loss"], HUMP)


def test_another_suffix_is_refused_and_nothing_is_written(tmp_path: Path):
    for name in ("r.csv", "r"):
        with pytest.raises(ModeconnError, match=r"saved as \.npz or \.json"):
            result_of(loss=HUMP).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_results_are_one_clear_line(tmp_path: Path):
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "other.json").write_text('{"format": "something else"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    np.savez(tmp_path / "array.npz", x=np.zeros(3))
    result_of(loss=HUMP).save(tmp_path / "whole.npz")
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    for name in ("empty.npz", "text.json", "other.json", "list.json", "array.npz", "half.npz"):
        with pytest.raises(ModeconnError, match=f"{name}: not a result saved by modeconn"):
            PathResult.load(tmp_path / name)
    with pytest.raises(ModeconnError, match="no such file"):
        PathResult.load(tmp_path / "absent.npz")


def test_a_pickled_object_in_an_npz_is_not_run(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    np.savez(tmp_path / "r.npz", t=np.array([Bomb()], dtype=object), meta=np.array("{}"))
    with pytest.raises(ModeconnError, match="not a result"):
        PathResult.load(tmp_path / "r.npz")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- tables and plots


def test_a_frame_has_a_row_per_point():
    frame = result_of(loss=HUMP, error=HUMP / 2).to_frame()
    assert list(frame.columns) == ["t", "loss", "error"]
    np.testing.assert_array_equal(frame["error"], HUMP / 2)
    assert list(result_of([[0, 1], [1, 0]], loss=[1, 2]).to_frame().columns) == ["t0", "t1", "loss"]


@pytest.mark.parametrize("package", ["pandas", "matplotlib"])
def test_without_an_optional_package_the_error_says_so(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ModeconnError, match=f"needs {package}, which is not installed"):
        result_of(loss=HUMP).to_frame() if package == "pandas" else result_of(loss=HUMP).plot()


@pytest.fixture
def ax():
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def test_a_plot_of_a_curve_shows_loss_error_chord_and_barrier(ax):
    shuffled = np.random.default_rng(0).permutation(len(T))
    loss, error = 1 - T + 2 * HUMP, HUMP / 2
    assert result_of(T[shuffled], loss=loss[shuffled], error=error[shuffled]).plot(ax) is ax
    curve, chord = ax.lines
    np.testing.assert_array_equal(curve.get_xydata(), np.stack([T, loss], 1))
    np.testing.assert_allclose(chord.get_xydata(), [[0, 1], [1, 0]], atol=1e-12)
    (right,) = [other for other in ax.figure.axes if other is not ax]
    np.testing.assert_allclose(right.lines[0].get_ydata(), 100 * error)
    assert right.get_ylabel() == "error (%)"
    assert ax.get_ylabel() == "loss"
    assert "1,437 samples" in ax.get_title()
    texts = [text.get_text() for text in ax.texts]
    assert "loss barrier 2" in texts
    top = ax.get_ylim()[1]
    assert top > loss.max(), "the legend needs room above the curve"
    assert ax.get_ylim()[0] == 0


def test_a_plot_leaves_gaps_where_values_are_not_finite(ax):
    result_of([0, 0.25, 0.5, 1], loss=[1, math.nan, math.inf, 1]).plot(ax)
    marked = [line.get_xdata()[0] for line in ax.lines[2:]]
    assert marked == [0.25, 0.5]


def test_a_plot_without_ends_or_with_no_rise_has_no_barrier(ax):
    result_of([0.2, 0.4], loss=[1.0, 2.0]).plot(ax)
    assert [len(ax.lines), len(ax.texts)] == [1, 0]
    ax.clear()
    result_of(loss=2 - T).plot(ax)
    assert not ax.texts


@pytest.mark.parametrize("layout", ["grid", "scattered", "one line", "constant"])
def test_a_plot_of_a_plane_marks_the_control_points(ax, layout):
    x, y = np.meshgrid(np.linspace(0, 1, 5), np.linspace(-1, 1, 4), indexing="ij")
    t = np.stack([x.ravel(), y.ravel()], 1)
    if layout == "scattered":
        t = np.random.default_rng(0).random((30, 2))
    if layout == "one line":
        t = np.stack([T, 2 * T], 1)
    loss = np.ones(len(t)) if layout == "constant" else np.exp(6 * t[:, 0])
    loss[1] = math.nan
    result_of(t, {"control_points": "[[0, 0], [1, 0], [0, 1]]"}, loss=loss).plot(ax)
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 0]], [[1, 0]], [[0, 1]]]
    assert len(ax.figure.axes) == 2, "a colour bar"
    ax.figure.canvas.draw()


def test_plots_refuse_what_they_cannot_show(ax):
    with pytest.raises(ModeconnError, match="t has 3 coordinates: a plot shows t"):
        result_of([[0, 0, 1]], loss=[1]).plot(ax)
    with pytest.raises(ModeconnError, match="finite nowhere"):
        result_of([[0, 0], [0, 1]], loss=[math.nan, math.inf]).plot(ax)
    with pytest.raises(ModeconnError, match="terminal plot is 20 × 15: expected at least"):
        result_of(loss=HUMP).terminal_plot(width=20)


def heights(text: str, margin: int) -> list[float]:
    """Find the topmost dot of each column of a Braille picture, from the bottom; -1: none."""
    rows = [line[margin:] for line in text.splitlines()[1:-2]]
    width = max(map(len, rows))
    tops = []
    for column in range(width):
        top = -1
        for row, line in enumerate(rows):
            cell = ord(line[column]) - 0x2800 if column < len(line) and line[column] != " " else 0
            dots = [level for level, bits in enumerate((0x09, 0x12, 0x24, 0xC0)) if cell & bits]
            if dots:
                top = 4 * (len(rows) - row) - dots[0] - 1
                break
        tops.append(top)
    return tops


@pytest.mark.parametrize(("width", "height"), [(72, 15), (80, 24), (30, 6)])
def test_the_terminal_plot_draws_the_curve_and_fits_its_size(width, height):
    t = np.linspace(0, 1, 401)
    text = result_of(t, loss=np.sin(np.pi * t)).terminal_plot(width=width, height=height)
    lines = text.splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    margin = lines[-2].index("└") + 1
    drawn = np.array(heights(text, margin))
    dots = 4 * (height - 3)
    across = np.linspace(0, 1, len(drawn))
    assert len(drawn) == width - margin
    np.testing.assert_allclose(
        drawn / (dots - 1), np.sin(np.pi * across), atol=2.5 / dots + 3.2 / len(drawn)
    )
    assert re.match(r" *1 ┤", lines[1])
    assert re.match(r" *0 ┤", lines[-3])
    assert lines[-1].split() == ["0", "0.25", "0.5", "0.75", "1"]


def test_the_terminal_plot_marks_values_that_are_not_finite():
    text = result_of([0, 0.5, 1], loss=[0, math.nan, 1]).terminal_plot(width=41)
    axis = text.splitlines()[-2]
    assert "× where not finite" in text.splitlines()[0]
    assert axis.count("×") == 1
    assert axis.index("×") - axis.index("└") - 1 == pytest.approx(
        (len(axis) - axis.index("└") - 1) / 2, abs=1
    )
    assert (
        result_of([0, 1], loss=[math.nan, math.inf]).terminal_plot()
        == "loss: finite at none of the 2 points"
    )


def test_the_terminal_plot_of_one_point_or_a_constant_is_a_level():
    assert "⠁" in result_of([0.5], loss=[0.3]).terminal_plot()
    level = [
        line
        for line in result_of(loss=np.full(11, 2.0)).terminal_plot().splitlines()
        if line.startswith("  2 ┤")
    ]
    assert len(set(level[0][5:])) == 1


def test_the_terminal_plot_of_a_plane_shades_from_low_to_high():
    x, y = np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9), indexing="ij")
    loss = x.ravel() + 0 * y.ravel()
    loss[-1] = math.inf  # the corner at (1, 1)
    text = result_of(np.stack([x.ravel(), y.ravel()], 1), loss=loss).terminal_plot(
        width=40, height=12
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 40
    body = [
        line[line.index("│") + 1 :] if "│" in line else line[line.index("┤") + 1 :]
        for line in lines[1:-2]
    ]
    assert body[0].endswith("!")
    ranks = [" ·:░▒▓█".index(letter) for letter in body[-1]]
    assert ranks == sorted(ranks)
    assert ranks[-1] == 6
