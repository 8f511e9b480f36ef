"""`modeconn inspect`: lists the tensors of a checkpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output
from modeconn.parameters.reading import text_beside

if TYPE_CHECKING:
    from torch import Tensor


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "inspect",
        help="list the tensors of a checkpoint: shapes, dtypes, sizes, values that are not finite",
        description="List the tensors of a checkpoint: shapes, dtypes, sizes, and values that are\n"
        "not finite.",
        epilog=options.example("modeconn inspect a.safetensors"),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=options.CHECKPOINT)
    options.add_json(parser, "the list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Reads the file, describes each tensor, prints."""
    options.check_inputs([args.checkpoint])
    options.check_outputs({"--json": args.json}, [args.checkpoint])

    from modeconn.parameters import state

    loaded = state.load(args.checkpoint)
    entries = {name: _describe(loaded[name]) for name in sorted(loaded, key=_by_number)}
    content = {
        "file": args.checkpoint,
        "entries": entries,
        "numbers": _total(entries, "numbers"),
        "bytes": _total(entries, "bytes"),
        "not_finite": _total(entries, "not_finite"),
        "metadata": text_beside(args.checkpoint),
    }
    if args.json is not None:
        output.write_json(content, args.json)
    if args.json != "-":
        _print(content)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Returns a sort key that puts layer 2 before layer 10."""
    key = []
    for part in name.split("."):
        number = part.isdecimal()
        key.append((number, int(part) if number else 0, part))
    return key


def _total(entries: dict[str, dict[str, Any]], key: str) -> int:
    return sum(entry[key] for entry in entries.values())


def _describe(tensor: Tensor) -> dict[str, Any]:
    real = tensor.is_floating_point() or tensor.is_complex()
    rms = float(tensor.abs().double().square().mean().sqrt()) if tensor.numel() else 0.0
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "numbers": tensor.numel(),
        "bytes": tensor.numel() * tensor.element_size(),
        "not_finite": int((~tensor.isfinite()).sum()) if real else 0,
        "rms": output.json_number(rms),
    }


def _print(content: dict[str, Any]) -> None:
    rows = []
    for name, entry in content["entries"].items():
        shape = " × ".join(map(str, entry["shape"])) or "scalar"
        numel, rms = f"{entry['numbers']:,}", f"{float(entry['rms']):.4g}"
        bad = f"{entry['not_finite']:,} not finite" if entry["not_finite"] else ""
        rows.append([name, shape, entry["dtype"], numel, rms, bad])
    output.print_table(["tensor", "shape", "dtype", "numel", "rms", ""], rows)
    print()
    tensors = output.counted(len(rows), "tensor")
    elements = output.counted(content["numbers"], "element")
    print(f"{tensors}, {elements}, {output.bytes_text(content['bytes'])}")
    if content["not_finite"]:
        bad = output.counted(content["not_finite"], "element")
        print(f"{bad} not finite: such weights are not evaluated")
    if content["metadata"]:
        print("\nmetadata")
        width = max(map(len, content["metadata"]))
        for key, value in sorted(content["metadata"].items()):
            print(f"  {key:<{width}}  {value}")
