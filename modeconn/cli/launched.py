"""Commands that torchrun starts: a process per rank, of which the first writes and prints."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from modeconn.cli.output import Nowhere
from modeconn.errors import ModeconnError, first_line

# Commands whose passes ranks share, and the options that name what they write.
SHARED = ("evaluate", "plane", "mix")
OUTPUTS = ("plot", "save", "json", "surface", "out")
# What torchrun tells each process.
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_shared() -> bool:
    """Whether torchrun has started several processes, of which this is one."""
    told = all(name in os.environ for name in _TOLD)
    return told and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Within, this process is one of those that torchrun has started, if it has.

    Args:
        args: the parsed options; in all processes but the first they name no file to write.

    Raises:
        ModeconnError: the command is for one process, or the others cannot be reached.
    """
    if not is_shared():
        yield
        return
    command = args.run.__module__.rpartition(".")[2]
    if command not in SHARED:
        raise ModeconnError(
            f"modeconn {command} runs in one process, and torchrun has started "
            f"{os.environ['WORLD_SIZE']}: expected one of {', '.join(SHARED)}, or no torchrun"
        )
    if getattr(args, "device", None) == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo")  # what is exchanged is a few numbers, in main memory
    except (RuntimeError, ValueError) as error:
        raise ModeconnError(
            f"the ranks of torchrun cannot be reached ({first_line(error)}): expected MASTER_ADDR "
            "and MASTER_PORT to be open between all machines"
        ) from error
    stdout = sys.stdout
    try:
        if dist.get_rank():
            sys.stdout = Nowhere()
            vars(args).update({name: None for name in OUTPUTS if name in args})
        yield
    finally:
        sys.stdout = stdout
        dist.destroy_process_group()
