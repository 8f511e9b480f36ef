"""Nothing of the user's is written to, by any public function: models, data, process-wide state."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import sklearn.datasets  # noqa: F401  # its import sets variables of the environment and draws numbers
import torch
from torch import Tensor, nn

import modeconn as mc
from fuzz.check import described, digest
from nasty_modules import Clamps, Counts, InPlace, Merges, Norms, Tied
from process_state import of_process

mpl.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore:the model runs as it is", "ignore:batch norms")

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3


@dataclass
class World:
    """All that a user has when a function is called."""

    model: nn.Module
    a: nn.Module
    b: dict[str, Tensor]
    x: Tensor
    y: Tensor
    folder: Path
    optimizer: torch.optim.Optimizer | None = None

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def state(self) -> dict[str, object]:
        """Everything that must be the same afterwards."""
        modules = [*self.model.modules(), *self.a.modules()]
        tensors = [
            *self.model.state_dict(keep_vars=True).values(),
            *self.a.state_dict(keep_vars=True).values(),
        ]
        steps = self.optimizer.state_dict() if self.optimizer else {"state": {}}
        moments = [v for each in steps["state"].values() for v in each.values()]
        return {
            "models": digest(tensors),
            "gradients": digest([p.grad for p in self.a.parameters() if p.grad is not None]),
            "modules": [described(module) for module in modules],
            "state dict": digest(self.b.values()),
            "data": digest([self.x, self.y]),
            "optimizer": (digest(moments), str(steps.get("param_groups"))),
        } | of_process()


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


NASTY = [InPlace, Clamps, Merges, Counts, Norms, Tied]


def world(make: Callable[[], nn.Module], folder: Path) -> World:
    """Two networks, one of them in the middle of its training."""
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        made.append(make())
    model, a, other = made
    b = {name: value.clone() for name, value in other.state_dict().items()}
    if isinstance(a, Tied):
        b |= {name: b[name.replace("three", "two")] for name in b if name.startswith("three")}
    optimizer = torch.optim.Adam([p for p in a.parameters() if p.requires_grad])
    a.requires_grad_(a.training)
    before = copy.deepcopy(a.state_dict())
    for parameter in a.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    a.load_state_dict(before)
    return World(model, a, b, X.clone(), Y.clone(), folder, optimizer)


# -- every public name -----------------------------------------------------------------------------


def line(w: World) -> mc.Line:
    return mc.Line(w.a, w.b)


def evaluated(w: World, **options: Any) -> mc.PathResult:
    return mc.evaluate(w.model, line(w), w.data, 3, progress=False, **options)


def in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    """A metric of all rows that writes into what it is given."""
    return outputs.exp_().mean() + targets.zero_().sum()


def walked(path: Any) -> None:
    """Everything that a path can be asked."""
    points = path.points([[0.25] * path.dim, [0.5] * path.dim] if path.dim > 1 else 3)
    path.coefficients(points)
    path.segment_of(points)
    path.at(points[0])
    path.info()
    repr(path)


def of_results(w: World) -> None:
    result = evaluated(w)
    for name in ("r.npz", "r.json"):
        result.save(w.folder / name)
        mc.PathResult.load(w.folder / name)
    result.to_frame()
    result.plot()
    result.terminal_plot()
    result.barrier()
    result.highest(), result.lowest(), repr(result)


def connected(w: World) -> mc.Connection:
    return mc.connect(w.model, w.a, w.b, w.data, subnetworks="readout")


def of_connections(w: World) -> None:
    connection = connected(w)
    connection.save(w.folder / "c")
    loaded = mc.Connection.load(w.folder / "c")
    loaded.plot()
    str(loaded.certificate), repr(loaded)
    mc.verify(w.model, loaded, w.data, a=w.a, b=w.b)


def of_loads(w: World) -> None:
    mc.load(w.a)
    mc.load(w.b)


def of_adapters(w: World) -> None:
    folder = w.folder / "adapter"
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    key, weight = next((k, v) for k, v in w.a.state_dict().items() if v.dim() == 2)
    name = f"base_model.model.{key.removesuffix('.weight')}.lora"
    factors = {"A": torch.ones(2, weight.shape[1]), "B": torch.ones(weight.shape[0], 2)}
    named = {f"{name}_{side}.weight": value for side, value in factors.items()}
    torch.save(named, folder / "adapter_model.bin")
    mc.lora(w.a, folder)
    walked(mc.lora(w.b, [folder, folder]))


def of_maps(w: World) -> None:
    # In training mode dropout draws numbers at every point, as it would in a loop.
    found = mc.map(lambda model: model.eval()(w.x.clone()).sum().item(), w.model, line(w), 3)
    repr(found), [*found]


def of_fits(w: World) -> None:
    fit = mc.fit_curve(w.model, w.a, w.b, w.data, align=False, steps=3, points=2)
    fit.save(w.folder / "curve.safetensors")
    str(fit), walked(mc.load_path(w.folder / "curve.safetensors", model=w.model))


def of_alignments(w: World) -> None:
    found = mc.align(w.model, w.a, w.b, w.data)
    found.save(w.folder / "p.json")
    again = mc.Alignment.load(w.folder / "p.json").inverse()
    str(found), again.apply(w.b), again.check(w.a, w.x)


def of_loss_functions(w: World) -> None:
    function = mc.loss_function(w.model, w.data)
    float(function(line(w).at(0.5)))


def of_stars(w: World) -> None:
    star = mc.connect(w.model, [w.a, w.b, w.model], train=w.data, subnetworks="readout")
    star.save(w.folder / "star")
    loaded = mc.Star.load(w.folder / "star")
    repr(loaded), loaded.bound


def of_trajectories(w: World) -> None:
    trajectory = mc.Trajectory(every=1)
    for network in (w.a, w.model, w.a):
        trajectory.add(network)


def of_separations(w: World) -> None:
    str(mc.linear_separability(w.x, w.y))


def table(function: Callable[..., Any], **options: Any) -> Callable[[World], None]:
    def call(w: World) -> None:
        str(function(w.model, w.a, w.data, **options))

    return call


CALLS: dict[str, Callable[[World], Any]] = {
    "Alignment": of_alignments,
    "Bezier": lambda w: walked(mc.Bezier([w.a, w.b, w.model])),
    "Certificate": of_connections,
    "Comparison": lambda w: str(mc.check(w.a, w.b)),
    "ConditionsTable": table(mc.conditions),
    "Connection": of_connections,
    "DatasetMetric": lambda w: evaluated(w, metrics=[mc.DatasetMetric(in_place)]),
    "Ensemble": lambda w: str(mc.ensemble(w.model, line(w), w.data, 3)),
    "FalseCertificate": lambda w: str(mc.FalseCertificate("false")),
    "Fit": of_fits,
    "Forward": lambda w: mc.Forward(w.model, line(w), w.x[:4])(2, w.x),
    "Groups": lambda w: str(mc.symmetries(w.model, w.x)),
    "LayerTable": lambda w: str(mc.layerwise(w.model, w.a, w.b, w.data, 3)),
    "Line": lambda w: walked(line(w)),
    "LossFunction": of_loss_functions,
    "MapResult": of_maps,
    "Mixture": lambda w: walked(mc.Mixture([w.a, w.b])),
    "ModeconnError": lambda w: str(mc.ModeconnError("wrong")),
    "PathResult": of_results,
    "Plan": lambda w: str(mc.explain(w.model, line(w), w.x)),
    "Plane": lambda w: [
        walked(mc.Plane.through(w.a, w.b, w.model)),
        walked(mc.Plane.random(w.a, seed=1, norm="filter")),
    ],
    "PolyChain": lambda w: walked(mc.PolyChain([w.a, w.b, w.model])),
    "Predictions": lambda w: [*mc.predict(w.model, line(w), w.data, 2)],
    "Sameness": lambda w: str(mc.same_function(w.model, w.a, w.data)),
    "Separation": of_separations,
    "Slerp": lambda w: walked(mc.Slerp(w.a, w.b)),
    "Star": of_stars,
    "States": lambda w: mc.evaluate(w.model, mc.States([w.a, w.b]), w.data),
    "Subspace": lambda w: [
        walked(mc.Subspace(w.a, [w.b])),
        walked(mc.Subspace.random(w.a, 3, seed=1)),
    ],
    "StabilityTable": table(mc.dropout_stability, draws=2),
    "Trajectory": of_trajectories,
    "align": of_alignments,
    "certify": lambda w: mc.certify(w.model, mc.PolyChain([w.a, w.a]), w.data),
    "check": lambda w: mc.check(w.a, w.model, w.data),
    "conditions": table(mc.conditions),
    "connect": connected,
    "datasets": lambda w: mc.datasets.load("digits"),
    "dropout_stability": table(mc.dropout_stability, draws=2),
    "ensemble": lambda w: mc.ensemble(w.model, line(w), w.data, 3),
    "evaluate": lambda w: [
        evaluated(w),
        evaluated(w, precision="float64", backend="reference", resume=w.folder / "r"),
        evaluated(w, buffers="start", noise_seed=1),
    ],
    "explain": lambda w: mc.explain(w.model, line(w), w.x),
    "fit_curve": of_fits,
    "fit_line": lambda w: mc.fit_line(w.model, w.a, w.b, w.data, steps=2, points=2),
    "fit_simplex": lambda w: mc.fit_simplex(w.model, [w.a, w.b], w.data, steps=2, points=2),
    "forward": lambda w: mc.forward(w.model, line(w), [0.0, 0.5], w.x),
    "layerwise": lambda w: mc.layerwise(w.model, w.a, w.b, w.data, 2, mode="cumulative"),
    "linear_separability": of_separations,
    "load": of_loads,
    "load_path": of_fits,
    "lora": of_adapters,
    "loss_function": of_loss_functions,
    "map": of_maps,
    "predict": lambda w: [*mc.predict(w.model, line(w), w.data, 2)],
    "recomputed": lambda w: mc.recomputed(w.model, line(w), 0.5, w.data),
    "repair": lambda w: mc.repair(w.model, line(w), w.data).folded(0.5),
    "search": lambda w: mc.search(w.model, mc.Mixture([w.a, w.b]), w.data, 4),
    "same_function": lambda w: mc.same_function(w.a, w.b, w.data),
    "subnetwork_stability": table(mc.subnetwork_stability, draws=1, method="readout"),
    "symmetries": lambda w: str(mc.symmetries(w.model, w.x)),
    "verify": of_connections,
}
# What takes any module; the others take chains of layers, and refuse the rest.
ANY = [
    "Bezier",
    "Line",
    "Mixture",
    "Plan",
    "Plane",
    "PolyChain",
    "Subspace",
    "evaluate",
    "explain",
    "forward",
]
ANY += ["Forward", "Trajectory", "load", "loss_function", "map", "recomputed", "same_function"]


def unchanged(w: World, call: Callable[[World], Any], refusals: bool = False) -> None:
    before = w.state()
    try:
        call(w)
    except mc.ModeconnError:
        if not refusals:
            raise
    after = w.state()
    assert [what for what in before if before[what] != after[what]] == []


@pytest.mark.parametrize("name", mc.__all__)
def test_every_public_name(name: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    assert name in CALLS, f"say in CALLS how {name} is used"
    unchanged(world(plain, tmp_path), CALLS[name])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("make", NASTY)
def test_nasty_modules(name: str, make: Callable[[], nn.Module], tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unchanged(world(make, tmp_path), CALLS[name])


@pytest.mark.parametrize("make", NASTY)
def test_what_is_refused_is_left_alone(make: Callable[[], nn.Module], tmp_path: Path):
    for name in ("connect", "dropout_stability", "conditions"):
        unchanged(world(make, tmp_path), CALLS[name], refusals=True)


def test_what_fails_leaves_everything(tmp_path: Path):
    """A loss that raises in the middle of an evaluation, inside torch.no_grad() of the library."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError

    def fails(w: World) -> None:
        with pytest.raises((ZeroDivisionError, mc.ModeconnError)):
            evaluated(w, loss=loss)

    unchanged(world(plain, tmp_path), fails)
