"""`modeconn mix`: many weighted sums of checkpoints in one pass, and the best of them as a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from modeconn.cli import evaluate, options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from modeconn.evaluation.result import PathResult
    from modeconn.parameters.paths import Mixture

SHOWN = 5


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "mix",
        help="many weighted sums of checkpoints (soups, task arithmetic) in one pass",
        description="Evaluate many weighted sums of checkpoints in one pass over the data, and write the best.\n"
        "If no option says which: the mean of every subset.",
        epilog=options.example(
            "modeconn mix a.safetensors b.safetensors --data digits --grid 10 --out best.safetensors",
            "Task arithmetic: modeconn mix t1.safetensors t2.safetensors --base t0.safetensors --scales 0,0.5,1 …",
        ),
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="two or more; one will do with --base"
    )
    options.add_model(parser, required=False)
    parser.add_argument(
        "--base", metavar="CHECKPOINT", help="the network that the others were trained from"
    )
    which = parser.add_argument_group("which sums").add_mutually_exclusive_group()
    which.add_argument(
        "--grid",
        metavar="N",
        type=options.count,
        help="all weights that are multiples of 1/N and add up to 1",
    )
    which.add_argument(
        "--random",
        metavar="N",
        type=options.count,
        help="the mean, and N random weights that add up to 1",
    )
    which.add_argument(
        "--greedy",
        action="store_true",
        help="a greedy soup: the next best network joins the mean if that helps; a pass a step",
    )
    which.add_argument(
        "--scales",
        metavar="X,X,…",
        type=options.numbers,
        help="with --base: base + Σ x · (checkpoint - base), for all choices of x",
    )
    which.add_argument(
        "--weights",
        metavar="FILE",
        help="a text file: a line of weights for each sum, the base's last",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of --random (default: 0)")
    parser.add_argument(
        "--by",
        metavar="METRIC",
        help="the best is where this is lowest (default: the last of --metrics)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the best sum as a checkpoint: .safetensors"
    )
    options.add_data(parser)
    evaluate.add_computing(parser)
    evaluate.add_results(parser, plot=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything, evaluate, print and write."""
    check(args)
    spec, model = options.load_model(args, args.checkpoints)

    from modeconn.parameters.paths import Mixture

    files = [*args.checkpoints, *([args.base] if args.base else [])]
    path = Mixture(files)
    result = evaluate.evaluated(args, spec, model, path, weights_of(args, spec, model, path))
    by = args.by or list(result.values)[-1]
    best = int(result.metric(by).argmin())
    result.info |= {
        "networks": ", ".join(files),
        "best": json.dumps(result.t[best].tolist()),
        "by": by,
    }
    if args.out is not None:
        write_best(args, spec, model, path, result, best)
    evaluate.write(result, args)
    if not args.quiet and args.json != "-":
        _print(result, by, [Path(file).stem for file in files])
        output.print_written(args.out, args.save, args.json)


def check(args: argparse.Namespace) -> None:
    """Check the options before anything is computed."""
    if len(args.checkpoints) < (1 if args.base else 2):
        raise ModeconnError(
            f"a mixture needs at least 2 checkpoints, or 1 and --base, got {', '.join(args.checkpoints)}"
        )
    if args.weights is None and (args.scales is None) != (args.base is None):
        raise ModeconnError("--base and --scales go together: base + Σ scale · (checkpoint - base)")
    options.check_inputs([*args.checkpoints, *([args.base] if args.base else [])])
    if args.out is not None and not args.out.endswith(".safetensors"):
        raise ModeconnError(f"--out {args.out}: the name must end in .safetensors")
    evaluate.check_results(args, **{"--out": args.out})
    names = args.metrics or ("loss", "error")
    if args.by is not None and args.by not in names:
        raise ModeconnError(f"--by {args.by}: expected one of the metrics, {', '.join(names)}")


def weights_of(args: argparse.Namespace, spec: str, model: nn.Module, path: Mixture) -> np.ndarray:
    """The coefficients to evaluate, [T, checkpoints], the base's last."""
    from modeconn.parameters import mixtures as soups

    count = len(args.checkpoints)
    if args.weights is not None:
        return _from_file(args.weights, path.dim)
    if args.scales is not None:
        return soups.task_arithmetic(count, args.scales)
    if args.random is not None:
        return soups.random_simplex(count, args.random, args.seed)
    if args.grid is not None:
        return soups.simplex_grid(count, args.grid)
    if not args.greedy:
        return soups.subset_means(count)

    def score(coefficients: np.ndarray) -> np.ndarray:
        result = evaluate.evaluated(args, spec, model, path, coefficients, resume=False)
        return result.metric(args.by or list(result.values)[-1])

    return soups.greedy_soup(count, score)


def write_best(
    args: argparse.Namespace,
    spec: str,
    model: nn.Module,
    path: Mixture,
    result: PathResult,
    best: int,
) -> None:
    """Write the best network; where norms' statistics were recomputed, with these."""
    from modeconn.evaluation.statistics import network_at
    from modeconn.parameters import state

    data = options.load_data(args, "train") if args.buffers == "recompute" else None
    network = network_at(
        model, path, result.t[best], data, batch_size=args.batch_size, precision=args.precision
    )
    mixed = dict(zip(result.info["networks"].split(", "), result.t[best].tolist()))  # type: ignore[union-attr]
    state.save(network, args.out, {"model": spec, "data": args.data, "mixed": json.dumps(mixed)})


def _from_file(file: str, count: int) -> np.ndarray:
    import numpy as np

    options.check_inputs([file])
    try:
        rows = np.array(
            [
                [float(v) for v in line.replace(",", " ").split()]
                for line in Path(file).read_text().splitlines()
            ]
        )
    except ValueError as error:
        raise ModeconnError(
            f"--weights {file}: {error}; expected lines of {count} numbers"
        ) from None
    if rows.ndim != 2 or rows.shape[1] != count:
        raise ModeconnError(
            f"--weights {file} has shape {list(rows.shape)}: expected a line of {count} numbers for each sum"
        )
    return rows


def _print(result: PathResult, by: str, names: list[str]) -> None:
    order = result.metric(by).argsort(kind="stable")[:SHOWN]
    rows = [
        [
            f"{place + 1}",
            *(f"{c:.4g}" for c in result.t[i]),
            *(output.metric_text(n, v[i]) for n, v in result.values.items()),
        ]
        for place, i in enumerate(order)
    ]
    output.print_table(["", *names, *result.values], rows)
    print()
    output.print_effort(result)
