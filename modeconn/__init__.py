"""Evaluate a neural network at many points along a path in parameter space, in one pass over the data."""

from modeconn import datasets
from modeconn.errors import ModeconnError
from modeconn.evaluate import evaluate, explain
from modeconn.paths import Bezier, Line, Mixture, Plane, PolyChain
from modeconn.plan.explain import Plan
from modeconn.result import PathResult
from modeconn.state import load

__all__ = [
    "Bezier",
    "Line",
    "Mixture",
    "ModeconnError",
    "PathResult",
    "Plan",
    "Plane",
    "PolyChain",
    "datasets",
    "evaluate",
    "explain",
    "load",
]

__version__ = "0.1.0"
