"""`modeconn verify` of a folder that `modeconn connect` of several networks wrote."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output

if TYPE_CHECKING:
    from torch import nn

    from modeconn.connection.certificate import Certificate
    from modeconn.connection.star import Star


def run(args: argparse.Namespace, star: Star, model: nn.Module) -> bool:
    """Verifies all descents and joins, prints and writes.

    Args:
        args: those of `modeconn verify`. star: the star of its folder. model: the architecture.

    Returns:
        whether the data are those of the certificates.
    """
    from modeconn.connection.hub import verify_star
    from modeconn.evaluation.progress import reporting

    data = options.load_data(args)
    ends = {name: file for name, file in (("a", args.a), ("b", args.b)) if file is not None}
    started = time.perf_counter()
    tested = all(each.test_certificate is not None for each in star.descents.values())
    with reporting(output.on_terminal() and not args.quiet, what="verify") as report:
        found = verify_star(
            model,
            star,
            data,
            ends,
            batch_size=args.batch_size,
            progress=report,
            test=options.load_data(args, "test") if tested and args.split == "train" else None,
            target=args.target,
            require_same_data=args.require_same_data,
        )
    seconds = time.perf_counter() - started
    if args.plot is not None:
        output.write_figure(star.plot, args.plot)
    if args.json is not None:
        output.write_json(_content(found, star, args), args.json)
    if not args.quiet and args.json != "-":
        _print(found, star, args, seconds)
        output.print_written(args.plot, args.json)
    return all(each.same_data for each in found.values())


def _content(found: dict[str, Certificate], star: Star, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "networks": {name: each.to_dict() for name, each in found.items()},
        "pairs": [list(pair) for pair in star.pairs],
        "bound": max(each.bound for each in found.values()),
        "error_bound": max(each.error_bound for each in found.values()),
        "same_data": all(each.same_data for each in found.values()),
        "folder": args.folder,
        "data": f"{args.data} {args.split}",
    }


def _print(
    found: dict[str, Certificate], star: Star, args: argparse.Namespace, seconds: float
) -> None:
    data = f"{args.data} {args.split}"
    if all(each.same_data for each in found.values()):
        print(f"verified: the weights and {data} bear out the certificates of all descents")
    else:
        print(
            f"OTHER DATA: {data} are not the data of the stored certificates, "
            "whose numbers were not compared"
        )
    bound = max(each.bound for each in found.values())
    error = f"{100 * max(each.error_bound for each in found.values()):.3g} %"
    print(f"{len(star.pairs)} pairs: loss at most {bound:.4g}, error at most {error}")
    for name, each in found.items():
        print(f"{name}: {each.losses[0]:.4g} itself; on its descent at most {each.bound:.4g}")
    print(f"\n{len(found)} passes over the data in {output.seconds_text(seconds)}")
