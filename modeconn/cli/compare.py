"""`modeconn connect --compare curve`: a trained curve beside the certified path."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

    from modeconn.connection.connection import Connection
    from modeconn.parameters.paths import Path
    from modeconn.training.curves.result import Fit

WITH = ("curve",)
# Steps of the curve by default, and points that lengths are sums of distances between.
STEPS, _POINTS = 1000, 1001
_COLOUR = "#2a7d4f"


@dataclass(frozen=True)
class Row:
    """Returns a path's row of the table: largest loss and error, its length, and what it cost."""

    name: str
    loss: float
    error: float
    proved: bool
    length: float
    seconds: float

    def cells(self) -> list[str]:
        """Return the row as text."""
        loss, error = output.metric_text("loss", self.loss), output.metric_text("error", self.error)
        kind = "proved" if self.proved else "measured"
        return [
            self.name,
            loss,
            error,
            kind,
            f"{self.length:.4g}",
            output.seconds_text(self.seconds),
        ]


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--compare",
        choices=WITH,
        help="train a curve between the two networks as well, and show it beside the path",
    )
    group.add_argument(
        "--curve-steps",
        metavar="N",
        type=options.count,
        help=f"steps of the curve's training (default: {STEPS})",
    )


def check(args: argparse.Namespace) -> None:
    """Raises ModeconnError where the options do not go together."""
    if args.compare is None and args.curve_steps is not None:
        raise ModeconnError("--curve-steps is for --compare curve")
    if args.compare is not None and len(args.checkpoints) > 2:
        raise ModeconnError(
            f"--compare {args.compare} is for two networks, got {len(args.checkpoints)}: expected "
            "two, or no --compare"
        )


def fitted(args: argparse.Namespace, model: nn.Module, data: Any) -> Fit:
    """Trains the curve."""
    from modeconn.training.curves.fit import fit_curve

    return fit_curve(
        model,
        args.checkpoints[0],
        args.checkpoints[1],
        data,
        steps=args.curve_steps or STEPS,
        seed=args.seed,
        progress=output.on_terminal() and not args.quiet and args.json != "-",
    )


def rows(model: nn.Module, found: Connection, seconds: float, fit: Fit) -> list[Row]:
    """Returns what the table says of both paths."""
    bounds = found.certificate
    path = Row(
        "certified path",
        bounds.bound,
        bounds.error_bound,
        True,
        length_of(model, found.path),
        seconds,
    )
    loss, error = (fit.result.highest(name)[1] for name in ("loss", "error"))
    curve = Row("trained curve", loss, error, False, length_of(model, fit.path), fit.seconds)
    return [path, curve]


def length_of(model: nn.Module, path: Path) -> float:
    """Returns the length of a path in the space of the network's parameters."""
    from modeconn.parameters.length import Lengths

    names = [name for name, _ in model.named_parameters()]
    return float(Lengths(path, names).steps(_POINTS).sum())


def draw(ax: Axes, fit: Fit) -> None:
    """Adds the curve's loss to the figure of a path."""
    style: dict[str, Any] = {"color": _COLOUR, "linewidth": 1.4, "marker": "."}
    (line,) = ax.plot(fit.result.t, fit.result.loss, **style)
    legend = ax.get_legend()
    if legend is None:
        return
    line.set_label("trained curve's loss")
    handles = [handle for handle in legend.legend_handles if handle is not None]
    layout: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
    ax.legend(handles=[*handles, line], frameon=False, fontsize="small", **layout)


def print_rows(both: list[Row]) -> None:
    """Prints the table, if there is one."""
    if not both:
        return
    header = ["", "largest loss", "error", "", "length", "time"]
    print()
    output.print_table(header, [row.cells() for row in both])
