"""`modeconn inspect`: what a checkpoint holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output

if TYPE_CHECKING:
    from torch import Tensor


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="the entries of a checkpoint: shapes, dtypes, sizes, values that are not finite",
        description="The entries of a checkpoint: shapes, dtypes, sizes, and values that are not finite.",
        epilog=options.example("modeconn inspect a.safetensors"),
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=".safetensors, or .pt that holds weights only"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write it as JSON; - is stdout, and nothing else then is"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the file, describe each entry, print."""
    options.check_inputs([args.checkpoint])
    options.check_outputs({"--json": args.json}, [args.checkpoint])

    from modeconn.parameters import state

    loaded = state.load(args.checkpoint)
    entries = {name: _describe(loaded[name]) for name in sorted(loaded, key=_by_number)}
    content = {
        "file": args.checkpoint,
        "entries": entries,
        "numbers": sum(entry["numbers"] for entry in entries.values()),
        "bytes": sum(entry["bytes"] for entry in entries.values()),
        "not_finite": sum(entry["not_finite"] for entry in entries.values()),
        "metadata": options.checkpoint_metadata(args.checkpoint),
    }
    if args.json is not None:
        output.write_json(content, args.json)
    if args.json != "-":
        _print(content)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")
    ]


def _describe(tensor: Tensor) -> dict[str, Any]:
    real = tensor.is_floating_point() or tensor.is_complex()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "numbers": tensor.numel(),
        "bytes": tensor.numel() * tensor.element_size(),
        "not_finite": int((~tensor.isfinite()).sum()) if real else 0,
        "rms": output.json_number(float(tensor.abs().double().square().mean().sqrt()))
        if tensor.numel()
        else 0.0,
    }


def _print(content: dict[str, Any]) -> None:
    rows = []
    for name, entry in content["entries"].items():
        bad = f"{entry['not_finite']:,} not finite" if entry["not_finite"] else ""
        shape = " × ".join(map(str, entry["shape"])) or "scalar"
        rows.append(
            [
                name,
                shape,
                entry["dtype"],
                f"{entry['numbers']:,}",
                f"{float(entry['rms']):.4g}",
                bad,
            ]
        )
    header = ["entry", "shape", "dtype", "numbers", "rms", ""]
    output.print_table(header, rows)
    print()
    entries = f"{len(rows):,} {'entry' if len(rows) == 1 else 'entries'}"
    print(
        f"{entries}, {output.counted(content['numbers'], 'number')}, {output.bytes_text(content['bytes'])}"
    )
    if content["not_finite"]:
        print(
            f"{output.counted(content['not_finite'], 'number')} not finite: such weights are not evaluated"
        )
    if content["metadata"]:
        print("\nmetadata")
        width = max(map(len, content["metadata"]))
        for key, value in sorted(content["metadata"].items()):
            print(f"  {key:<{width}}  {value}")
