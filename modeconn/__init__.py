"""Loss landscapes and mode connectivity: networks along paths of parameters, in one pass."""

from modeconn.connection.certificate import Certificate, FalseCertificate
from modeconn.connection.connection import Connection
from modeconn.connection.pipeline import connect
from modeconn.connection.verification import verify
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate, explain
from modeconn.evaluation.outputs import forward
from modeconn.evaluation.result import PathResult
from modeconn.parameters.paths import Bezier, Line, Mixture, Plane, PolyChain
from modeconn.parameters.state import load
from modeconn.plan.report import Plan
from modeconn.stability.criteria import ConditionsTable, conditions
from modeconn.stability.dropout import dropout_stability
from modeconn.stability.separability import Separation, linear_separability
from modeconn.stability.subnetworks import subnetwork_stability
from modeconn.stability.table import StabilityTable

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
