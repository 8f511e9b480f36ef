"""Evaluate a neural network at many points along a path in parameter space, in one pass over the data."""

from modeconn import datasets
from modeconn.connect.certificate import Certificate, FalseCertificate
from modeconn.connect.conditions import ConditionsTable, conditions
from modeconn.connect.connect import connect
from modeconn.connect.connection import Connection
from modeconn.connect.dropout import dropout_stability
from modeconn.connect.separability import Separation, linear_separability
from modeconn.connect.stability import subnetwork_stability
from modeconn.connect.table import StabilityTable
from modeconn.connect.verify import verify
from modeconn.errors import ModeconnError
from modeconn.evaluate import evaluate, explain
from modeconn.forward import forward
from modeconn.paths import Bezier, Line, Mixture, Plane, PolyChain
from modeconn.plan.explain import Plan
from modeconn.result import PathResult
from modeconn.state import load

__all__ = [
    "Bezier",
    "Certificate",
    "ConditionsTable",
    "Connection",
    "FalseCertificate",
    "Line",
    "Mixture",
    "ModeconnError",
    "PathResult",
    "Plan",
    "Plane",
    "PolyChain",
    "Separation",
    "StabilityTable",
    "conditions",
    "connect",
    "datasets",
    "dropout_stability",
    "evaluate",
    "explain",
    "forward",
    "linear_separability",
    "load",
    "subnetwork_stability",
    "verify",
]

__version__ = "0.1.0"
