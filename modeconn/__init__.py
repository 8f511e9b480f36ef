"""Loss landscapes and mode connectivity: networks along paths of parameters, in one pass."""

import importlib as _importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeconn.connection.certificate import Certificate, FalseCertificate
    from modeconn.connection.certifying import certify
    from modeconn.connection.connection import Connection
    from modeconn.connection.pipeline import connect
    from modeconn.connection.separability import Separation, linear_separability
    from modeconn.connection.star import Star
    from modeconn.connection.verification import verify
    from modeconn.data import datasets
    from modeconn.errors import ModeconnError
    from modeconn.evaluation.checking import check
    from modeconn.evaluation.differences import Comparison
    from modeconn.evaluation.evaluator import evaluate, explain
    from modeconn.evaluation.layer_table import LayerTable
    from modeconn.evaluation.layers import layerwise
    from modeconn.evaluation.losses import LossFunction, loss_function
    from modeconn.evaluation.outputs import Forward, forward
    from modeconn.evaluation.predictions import Ensemble, Predictions, ensemble, predict
    from modeconn.evaluation.replay.mapping import MapResult, map  # noqa: A004
    from modeconn.evaluation.result import PathResult
    from modeconn.evaluation.sameness import Sameness, same_function
    from modeconn.evaluation.searches import search
    from modeconn.evaluation.statistics import recomputed
    from modeconn.metrics import DatasetMetric
    from modeconn.parameters.adapting import lora
    from modeconn.parameters.loading import load_path
    from modeconn.parameters.paths import Bezier, Line, Mixture, PolyChain
    from modeconn.parameters.planes import Plane
    from modeconn.parameters.spherical import Slerp
    from modeconn.parameters.state import load
    from modeconn.parameters.subspace import Subspace
    from modeconn.parameters.unrelated import States
    from modeconn.plan.report import Plan
    from modeconn.stability.criteria import ConditionsTable, conditions
    from modeconn.stability.dropout import dropout_stability
    from modeconn.stability.subnetworks import subnetwork_stability
    from modeconn.stability.table import StabilityTable
    from modeconn.training.alignment.alignment import Alignment, align
    from modeconn.training.alignment.discovery import symmetries
    from modeconn.training.alignment.groups import Groups
    from modeconn.training.alignment.renormalized import repair
    from modeconn.training.curves.fit import fit_curve
    from modeconn.training.curves.result import Fit
    from modeconn.training.curves.subspaces import fit_line, fit_simplex
    from modeconn.training.trajectory import Trajectory

__all__ = [
    "Alignment",
    "Bezier",
    "Certificate",
    "Comparison",
    "ConditionsTable",
    "Connection",
    "DatasetMetric",
    "Ensemble",
    "FalseCertificate",
    "Fit",
    "Forward",
    "Groups",
    "LayerTable",
    "Line",
    "LossFunction",
    "MapResult",
    "Mixture",
    "ModeconnError",
    "PathResult",
    "Plan",
    "Plane",
    "PolyChain",
    "Predictions",
    "Sameness",
    "Separation",
    "Slerp",
    "StabilityTable",
    "Star",
    "States",
    "Subspace",
    "Trajectory",
    "align",
    "certify",
    "check",
    "conditions",
    "connect",
    "datasets",
    "dropout_stability",
    "ensemble",
    "evaluate",
    "explain",
    "fit_curve",
    "fit_line",
    "fit_simplex",
    "forward",
    "layerwise",
    "linear_separability",
    "load",
    "load_path",
    "lora",
    "loss_function",
    "map",
    "predict",
    "recomputed",
    "repair",
    "same_function",
    "search",
    "subnetwork_stability",
    "symmetries",
    "verify",
]

__version__ = "0.1.0"

# Where the public names stand: their modules are imported when a name is first used, so that
# `import modeconn` costs next to nothing beside torch.
_HOME = {
    "modeconn.connection.certificate": "Certificate FalseCertificate",
    "modeconn.connection.certifying": "certify",
    "modeconn.connection.connection": "Connection",
    "modeconn.connection.pipeline": "connect",
    "modeconn.connection.separability": "Separation linear_separability",
    "modeconn.connection.star": "Star",
    "modeconn.connection.verification": "verify",
    "modeconn.data": "datasets",
    "modeconn.errors": "ModeconnError",
    "modeconn.evaluation.checking": "check",
    "modeconn.evaluation.differences": "Comparison",
    "modeconn.evaluation.evaluator": "evaluate explain",
    "modeconn.evaluation.layer_table": "LayerTable",
    "modeconn.evaluation.layers": "layerwise",
    "modeconn.evaluation.losses": "LossFunction loss_function",
    "modeconn.evaluation.outputs": "Forward forward",
    "modeconn.evaluation.predictions": "Ensemble Predictions ensemble predict",
    "modeconn.evaluation.searches": "search",
    "modeconn.evaluation.result": "PathResult",
    "modeconn.evaluation.statistics": "recomputed",
    "modeconn.evaluation.sameness": "Sameness same_function",
    "modeconn.metrics": "DatasetMetric",
    "modeconn.parameters.loading": "load_path",
    "modeconn.parameters.adapting": "lora",
    "modeconn.parameters.paths": "Bezier Line Mixture PolyChain",
    "modeconn.parameters.planes": "Plane",
    "modeconn.parameters.spherical": "Slerp",
    "modeconn.parameters.state": "load",
    "modeconn.parameters.subspace": "Subspace",
    "modeconn.parameters.unrelated": "States",
    "modeconn.plan.report": "Plan",
    "modeconn.evaluation.replay.mapping": "MapResult map",
    "modeconn.stability.criteria": "ConditionsTable conditions",
    "modeconn.stability.dropout": "dropout_stability",
    "modeconn.stability.subnetworks": "subnetwork_stability",
    "modeconn.stability.table": "StabilityTable",
    "modeconn.training.alignment.alignment": "Alignment align",
    "modeconn.training.alignment.groups": "Groups",
    "modeconn.training.alignment.renormalized": "repair",
    "modeconn.training.alignment.discovery": "symmetries",
    "modeconn.training.curves.fit": "fit_curve",
    "modeconn.training.curves.result": "Fit",
    "modeconn.training.curves.subspaces": "fit_line fit_simplex",
    "modeconn.training.trajectory": "Trajectory",
}
_MODULE_OF: dict[str, str] = {}
for _module, _names in _HOME.items():
    _MODULE_OF |= dict.fromkeys(_names.split(), _module)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(_MODULE_OF[name])
    value = getattr(module, name, None)
    if value is None:  # a module of its own, such as `datasets`
        value = _importlib.import_module(f"{_MODULE_OF[name]}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
