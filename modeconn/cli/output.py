"""Printing and writing for the commands."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from modeconn.errors import SystemFailure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from modeconn.evaluation.layer_table import LayerTable
    from modeconn.evaluation.result import PathResult
    from modeconn.training.loop import Epoch


def on_terminal() -> bool:
    """Whether both streams are terminals, so that progress bars may be drawn."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def version() -> str:
    """Return the version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("modeconn")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def shown(text: object) -> str:
    """Return text with control characters escaped: names of files must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(text))


class Nowhere(io.TextIOBase):
    """Takes the place of a standard stream that the process was started without."""

    def write(self, text: str) -> int:
        """Drop the text."""
        return len(text)


def is_closed(stream: TextIO | None) -> bool:
    """Whether nothing can be written to a standard stream."""
    return stream is None or isinstance(stream, Nowhere) or stream.closed


class Shown:
    """A text stream whose control characters are escaped; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text as `shown` gives it."""
        self._stream.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines as `shown` gives them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept(file: str | None, name: str | None) -> Iterator[None]:
    """Say after an interruption where the finished part is, if it is anywhere.

    Args:
        file: the file that is there once something is kept; None where nothing is.
        name: what to call the place.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if file is None or str(interrupt) or not Path(file).exists():
            raise
        raise KeyboardInterrupt(
            f"interrupted; what is done is in {name}: the same command goes on from there"
        ) from None


def write_json(content: dict[str, Any], file: str) -> None:
    """Writes JSON to a file, whole or not at all, or to stdout if it is ``-``."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if file == "-":
        if is_closed(sys.stdout):
            raise SystemFailure("standard output is closed: --json - cannot be written")
        sys.stdout.write(text)
        return
    from modeconn.files.writing import atomic_write

    atomic_write(file, lambda stream: stream.write(text.encode()))


def main_metric(result: PathResult) -> str:
    """Returns the metric that pictures show: the loss, or the first where there is none."""
    return "loss" if "loss" in result.values else next(iter(result.values))


def write_plot(result: PathResult, file: str, metric: str | None = None) -> None:
    """Draws a metric of a result into a PNG, SVG or PDF file, whole or not at all."""
    write_figure(lambda ax: result.plot(ax, metric or main_metric(result)), file)


def write_figure(draw: Callable[[Axes], object], file: str, surface: bool = False) -> None:
    """Writes a figure into a PNG, SVG or PDF file, whole or not at all.

    Args:
        draw: draws into the axes.
        file: whose suffix chooses the format.
        surface: give `draw` axes in three dimensions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from modeconn.files.writing import atomic_write

    # Not pyplot: it would look for a display.
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot(projection="3d" if surface else None))
    kind = Path(file).suffix.lower().lstrip(".")
    atomic_write(file, lambda stream: figure.savefig(stream, format=kind, dpi=160))


def print_plot(result: PathResult, metric: str | None = None) -> None:
    """Prints the small picture, as wide as the terminal allows, up to 80 columns."""
    width = min(80, max(30, shutil.get_terminal_size((80, 24)).columns))
    print(result.terminal_plot(width=width, height=14, metric=metric or main_metric(result)))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Prints columns, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        cells[0] = f"{row[0]:<{widths[0]}}"
        print("  ".join(cells).rstrip())


def metric_text(name: str, value: float | None) -> str:
    """Formats a value; error rates are in per cent."""
    if value is None:
        return "–"
    if name.endswith("error") and math.isfinite(value):
        return f"{100 * value:.2f} %"
    return f"{value:.4g}"


def seconds_text(seconds: float) -> str:
    """Formats a duration with about three digits."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.3g} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def bytes_text(count: int) -> str:
    """Formats a size in memory with about three digits."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1000:
            size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"


def counted(number: int, noun: str) -> str:
    """Formats a number of things: ``1 pass``, ``60,000 samples``."""
    plural = {"pass": "passes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"


def print_result(result: PathResult, metric: str | None = None) -> None:
    """Prints the picture of a metric, by default the loss, and the numbers of an evaluation."""
    print_plot(result, metric)
    print()
    if result.t.ndim == 1:
        print_curve(result)
    else:
        _print_plane(result)
    print()
    print_effort(result)


def print_effort(result: PathResult | LayerTable) -> None:
    """Prints the size of an evaluation, its time, and the backend."""
    points = next(iter(result.values.values())).size
    print(
        f"{counted(result.samples, 'sample')}, {counted(points, 'point')}, "
        f"{counted(result.passes, 'pass')} over the data in {seconds_text(result.seconds)}"
    )
    if "rule" in result.info:
        print(f"adaptive: {result.info['rule']}; {result.info['stopped']}")
    where = [str(result.info[key]) for key in ("device", "precision") if key in result.info]
    print(", ".join([f"{result.backend} backend", *where]))


def print_written(*files: str | None) -> None:
    """Names the files that were written."""
    for file in files:
        if file is not None and file != "-":
            print(f"wrote {file}")


def print_curve(result: PathResult, label: str = "") -> None:
    """Prints what each metric is at the ends and at its highest."""
    rows = []
    for name, column in result.values.items():
        ends = [column[result.t == end] for end in (0.0, 1.0)]
        first, last = (float(end[0]) if len(end) else None for end in ends)
        where, highest = result.highest(name)
        barrier = None if first is None or last is None else result.barrier(name)
        rows.append(
            [
                name,
                metric_text(name, first),
                metric_text(name, last),
                f"{metric_text(name, highest)} at t = {where:.4g}",
                metric_text(name, barrier),
            ]
        )
    print_table([label, "t = 0", "t = 1", "highest", "barrier"], rows)


def _print_plane(result: PathResult) -> None:
    from modeconn.parameters import ranking

    rows = []
    for name, column in result.values.items():
        cells = []
        for index in (int(ranking.order(column)[0]), int(column.argmax())):
            where = ", ".join(f"{number:.4g}" for number in result.t[index])
            cells.append(f"{metric_text(name, float(column[index]))} at ({where})")
        rows.append([name, *cells])
    print_table(["", "lowest", "highest"], rows)


def json_number(value: float) -> float | str:
    """Returns a float as JSON holds it: NaN and infinities are strings, as in a saved result."""
    return value if math.isfinite(value) else str(value)


@contextmanager
def epoch_bar(epochs: int, quiet: bool) -> Iterator[Callable[[Epoch], None]]:
    """Shows the epochs of a training: a bar on a terminal, a line each elsewhere, or nothing."""
    if quiet:
        yield lambda epoch: None
    elif not on_terminal():
        width = len(str(epochs))

        def print_line(epoch: Epoch) -> None:
            number = f"epoch {epoch.epoch:>{width}}/{epochs}"
            print(f"{number}  {_progress_text(epoch)}  {epoch.seconds:.2f} s", flush=True)

        yield print_line
    else:
        from tqdm import tqdm

        with tqdm(total=epochs, unit="epoch", leave=False, dynamic_ncols=True) as bar:

            def show(epoch: Epoch) -> None:
                bar.set_postfix_str(_progress_text(epoch), refresh=False)
                bar.update(epoch.epoch - bar.n)

            yield show


def _progress_text(epoch: Epoch) -> str:
    return f"loss {epoch.loss:.4f}  error {100 * epoch.error:5.2f} %"
