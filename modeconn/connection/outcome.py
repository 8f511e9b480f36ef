"""The verdicts of a certificate, in words that say what to do."""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """The verdict of a certificate; its text says what to do."""

    CERTIFIED = "certified: on the whole path the loss stays at or below the bound"
    ENDS = (
        "certified: the end points themselves make the bound, "
        "so no path between them has a lower one; "
        "a lower one needs better end points"
    )
    SUBNETWORK = (
        "target not met: a subnetwork makes the bound; train it longer, "
        "give it more or other kept units, or more hidden units or layers"
    )
    ABOVE_ENDS = (
        "target not met: an end point makes the bound, and no path is below its own ends; "
        "train that network further, or ask for no less than its loss"
    )
    UNDECIDED = (
        "undecided: the loss is not finite at a breakpoint; "
        "look for weights or inputs that are too large"
    )
