"""`modeconn align`: permutes the units of one checkpoint so that they match those of another."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from modeconn.training.alignment.alignment import Alignment

# Groups that are printed.
SHOWN = 8
SAVED = (".json", ".safetensors")
DESCRIPTION = """\
Permute the units of B so that they match those of A: the written network is the same function
as B, in A's basin as far as permutations lead there. Which units can be permuted is found on
the network itself, and checked."""
BEFORE_AND_AFTER = """\
Then compare the lines: modeconn evaluate a.safetensors b.safetensors, and b-aligned.safetensors."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "align",
        help="permute the units of a checkpoint to match those of another",
        description=DESCRIPTION,
        epilog=options.example(
            "modeconn align a.safetensors b.safetensors --data digits --out b-aligned.safetensors",
            BEFORE_AND_AFTER,
        ),
    )
    parser.add_argument("a", metavar="A", help=f"the network to match: {options.CHECKPOINT}")
    parser.add_argument("b", metavar="B", help="the network that is permuted")
    options.add_model(parser, required=False)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="write B, permuted, as .safetensors"
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help=f"write the permutations: {options.listed(SAVED)}",
    )
    parser.add_argument(
        "--method",
        choices=("activations", "weights"),
        default="activations",
        help="match what units do on the data, or weights alone (default: activations)",
    )
    options.add_count(parser, "--samples", "compare units on the first N samples", 10_000)
    options.add_seed(parser, "the order in which weights are matched")
    options.add_batch_size(parser)
    options.add_data(parser)
    options.add_json(parser, "the objective, and the groups with what is frozen")
    options.add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Checks everything, aligns, writes and prints."""
    options.check_inputs([args.a, args.b])
    options.check_checkpoint_name(args.out)
    if args.save is not None and not args.save.endswith(SAVED):
        raise ModeconnError(f"--save {args.save}: the name must end in {options.listed(SAVED)}")
    outputs = {"--out": args.out, "--save": args.save, "--json": args.json}
    options.check_outputs(outputs, [args.a, args.b])
    spec, model = options.load_model(args, [args.a, args.b])
    data = options.load_data(args)

    from modeconn.parameters import state
    from modeconn.training.alignment.alignment import align

    found = align(
        model,
        args.a,
        args.b,
        data,
        method=args.method,
        samples=args.samples,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    about = {"model": spec, "data": args.data, "aligned": args.b, "to": args.a}
    state.save(found.apply(args.b), args.out, about | {"permutations": found.digest})
    if args.save is not None:
        found.save(args.save)
    if args.json is not None:
        output.write_json(_content(found, args), args.json)
    if not args.quiet and args.json != "-":
        _print(found)
        output.print_written(args.out, args.save, args.json)


def _content(found: Alignment, args: argparse.Namespace) -> dict[str, object]:
    frozen = [[each.entry, each.axis, each.operation] for each in found.groups.frozen]
    return {
        "a": args.a,
        "b": args.b,
        "method": found.method,
        "samples": found.samples,
        "objective_before": output.json_number(found.objective_before),
        "objective_after": output.json_number(found.objective_after),
        "note": found.note,
        "permutations": found.digest,
        "log10_permutations": found.groups.log10,
        "groups": list(map(asdict, found.groups)),
        "frozen": frozen,
    }


def _print(found: Alignment) -> None:
    print(found.groups.described(SHOWN))
    print()
    print(found)
