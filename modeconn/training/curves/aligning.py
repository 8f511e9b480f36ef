"""The second network of a curve, its units permuted to match the first one's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modeconn.data.inputs import Inputs
from modeconn.errors import ModeconnError
from modeconn.parameters.paths import Line, Path
from modeconn.training.alignment.alignment import Alignment
from modeconn.training.alignment.alignment import align as alignment_of


def aligned(
    model: nn.Module, line: Path, samples: tuple[Inputs, Tensor], align: Any, seed: int
) -> tuple[Path, Any]:
    """Return the line to the permuted network, and the alignment.

    Args:
        model: the architecture.
        line: between the given networks.
        samples: inputs and targets to match activations on.
        align: True, an alignment, or False.
        seed: of the alignment.
    """
    if align is False or align is None:
        return line, None
    if align is True:
        first, second = line.control_points
        align = alignment_of(model, first, second, samples, seed=seed)
    if not isinstance(align, Alignment):
        raise ModeconnError(
            f"align is a {type(align).__name__}: expected True, False or an Alignment"
        )
    made = Line(line.control_points[0], align.apply(line.control_points[1]))
    made.names = [line.names[0], f"{line.names[1]}, permuted"]
    made.prefixes = line.prefixes
    return made, align


def digest_of_alignment(alignment: Any) -> str:
    """Return the digest of an alignment's permutations, "" without one."""
    return "" if alignment is None else str(alignment.digest)
