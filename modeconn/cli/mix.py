"""`modeconn mix`: evaluates many weighted sums of checkpoints in one pass, and writes the best."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.cli import evaluate, options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from modeconn.evaluation.result import PathResult
    from modeconn.parameters.paths import Mixture

# Sums that the table of the best shows.
SHOWN = 5
# As modeconn.parameters.searching has them, which costs the import of torch.
STRATEGIES, BUDGET = ("random", "grid", "greedy", "cma"), 100
DESCRIPTION = """\
Evaluate many weighted sums of checkpoints in one pass over the data, and write the best.
If no option chooses the sums, they are the means of all subsets."""
TASK_ARITHMETIC = """\
For task arithmetic, add --base pretrained.safetensors --scales 0,0.5,1 instead of --grid."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "mix",
        help="many weighted sums of checkpoints (soups, task arithmetic) in one pass",
        description=DESCRIPTION,
        epilog=options.example(
            "modeconn mix a.safetensors b.safetensors --data digits --grid 10 --out m.safetensors",
            TASK_ARITHMETIC,
        ),
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="two or more; one will do with --base"
    )
    options.add_model(parser, required=False)
    parser.add_argument(
        "--base", metavar="CHECKPOINT", help="the network that the others were trained from"
    )
    _add_sums(parser)
    parser.add_argument(
        "--budget",
        metavar="N",
        type=options.count,
        default=BUDGET,
        help=f"sums that --search evaluates in all (default: {BUDGET})",
    )
    options.add_seed(parser, "--random and --search")
    parser.add_argument(
        "--by",
        metavar="METRIC",
        help="metric that the best sum minimises (default: the last of --metrics)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the best sum as a checkpoint: .safetensors"
    )
    options.add_data(parser)
    evaluate.add_computing(parser)
    evaluate.add_results(parser, plot=False)
    parser.set_defaults(run=run)


def _add_sums(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which sums").add_mutually_exclusive_group()
    group.add_argument(
        "--grid",
        metavar="N",
        type=options.count,
        help="all weights that are multiples of 1/N and add up to 1",
    )
    group.add_argument(
        "--random",
        metavar="N",
        type=options.count,
        help="the mean, and N random weights that add up to 1",
    )
    group.add_argument(
        "--greedy",
        action="store_true",
        help="greedy soup: the next best network joins the mean if that helps; one pass a step",
    )
    group.add_argument(
        "--search",
        choices=STRATEGIES,
        metavar="BY",
        help="search for the best weights that add up to 1, --budget sums in all, by "
        f"{', '.join(STRATEGIES)} (CMA-ES, many sums a pass; needs the package cmaes)",
    )
    group.add_argument(
        "--scales",
        metavar="X,…",
        type=options.numbers,
        help="with --base: base + Σ x · (checkpoint - base), for all choices of x",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="text file with a line of weights for each sum, the base's last",
    )


def run(args: argparse.Namespace) -> None:
    """Checks everything, evaluates, prints and writes."""
    check(args)
    spec, model = options.load_model(args, args.checkpoints)

    from modeconn.parameters import ranking
    from modeconn.parameters.paths import Mixture

    files = files_of(args)
    path = Mixture(files)
    if args.search is None:
        result = evaluate.evaluated(args, spec, model, path, weights_of(args, spec, model, path))
    else:
        result = _searched(args, spec, model, path)
    by = args.by or list(result.values)[-1]
    best = ranking.best(result.metric(by), f"{by} of the sums")
    result.info |= {
        "networks": ", ".join(files),
        "best": json.dumps(result.t[best].tolist()),
        "by": by,
    }
    if args.out is not None:
        write_best(args, spec, model, path, result.t[best])
    evaluate.write(result, args)
    if not args.quiet and args.json != "-":
        _print(result, by, [Path(file).stem for file in files])
        output.print_written(args.out, args.save, args.csv, args.json)


def _searched(args: argparse.Namespace, spec: str, model: nn.Module, path: Mixture) -> PathResult:
    """Searches for the best sum as the options ask."""
    from modeconn.evaluation.searches import search
    from modeconn.metrics import Head

    def by(_: Any, __: Any, data: Any, points: int, **given: Any) -> PathResult:
        return search(
            model,
            path,
            data,
            points,
            strategy=args.search,
            seed=args.seed,
            metric=metric,
            **given,
        )

    metric = args.by or Head(args.loss, args.metrics).names[-1]
    result: PathResult = evaluate.evaluated(args, spec, model, path, args.budget, by=by)
    return result


def files_of(args: argparse.Namespace) -> list[str]:
    """Lists the files of the networks, the base's last."""
    return [*args.checkpoints, *([args.base] if args.base else [])]


def check(args: argparse.Namespace) -> None:
    """Checks the options before anything is computed."""
    if len(args.checkpoints) < (1 if args.base else 2):
        given = ", ".join(args.checkpoints)
        raise ModeconnError(f"a mixture needs at least 2 checkpoints, or 1 and --base, got {given}")
    if args.weights is None and (args.scales is None) != (args.base is None):
        raise ModeconnError("--base and --scales go together: base + Σ scale · (checkpoint - base)")
    options.check_inputs(files_of(args))
    options.check_checkpoint_name(args.out)
    evaluate.check_results(args, **{"--out": args.out})
    names = args.metrics or ("loss", "error")
    if args.by is not None and args.by not in names:
        raise ModeconnError(f"--by {args.by}: expected one of the metrics, {', '.join(names)}")


def weights_of(args: argparse.Namespace, spec: str, model: nn.Module, path: Mixture) -> np.ndarray:
    """Returns the coefficients to evaluate, [T, checkpoints], the base's last."""
    from modeconn.parameters import mixtures

    count = len(args.checkpoints)
    if args.weights is not None:
        return _from_file(args.weights, path.dim)
    if args.scales is not None:
        return mixtures.task_arithmetic(count, args.scales)
    if args.random is not None:
        return mixtures.random_simplex(count, args.random, args.seed)
    if args.grid is not None:
        return mixtures.simplex_grid(count, args.grid)
    if not args.greedy:
        return mixtures.subset_means(count)

    def score(coefficients: np.ndarray) -> np.ndarray:
        result = evaluate.evaluated(args, spec, model, path, coefficients, resume=False)
        column: np.ndarray = result.metric(args.by or list(result.values)[-1])
        return column

    return mixtures.greedy_soup(count, score)


def write_best(
    args: argparse.Namespace, spec: str, model: nn.Module, path: Mixture, weights: np.ndarray
) -> None:
    """Writes the sum with these weights, with recomputed statistics where --buffers says so."""
    from modeconn.evaluation.statistics import network_at
    from modeconn.parameters import state

    data = options.load_data(args, "train") if args.buffers == "recompute" else None
    network = network_at(
        model, path, weights, data, batch_size=args.batch_size, precision=args.precision
    )
    mixed = json.dumps(dict(zip(files_of(args), weights.tolist())))
    state.save(network, args.out, {"model": spec, "data": args.data, "mixed": mixed})


def _from_file(file: str, count: int) -> np.ndarray:
    import numpy as np

    options.check_inputs([file])
    lines = Path(file).read_text().splitlines()
    try:
        weights = np.array([_numbers(line) for line in lines])
    except ValueError as error:
        raise ModeconnError(
            f"--weights {file}: {error}; expected lines of {count} numbers"
        ) from None
    if weights.ndim != 2 or weights.shape[1] != count:
        raise ModeconnError(
            f"--weights {file} has shape {list(weights.shape)}: "
            f"expected a line of {count} numbers for each sum"
        )
    return weights


def _numbers(line: str) -> list[float]:
    return [float(text) for text in line.replace(",", " ").split()]


def _print(result: PathResult, by: str, names: list[str]) -> None:
    from modeconn.parameters import ranking

    rows = []
    for place, i in enumerate(ranking.order(result.metric(by))[:SHOWN]):
        weights = [f"{c:.4g}" for c in result.t[i]]
        values = [output.metric_text(name, column[i]) for name, column in result.values.items()]
        rows.append([f"{place + 1}", *weights, *values])
    output.print_table(["", *names, *result.values], rows)
    print()
    output.print_effort(result)
