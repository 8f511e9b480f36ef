"""Settings of the experiments: the paper's, and small ones that show the same effect in minutes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modeconn.connection.recipe import Recipe
from modeconn.errors import ModeconnError

# The paper's fully connected subnetworks stop past 100 epochs where some draw has no training
# error. Settings are those of the published code, github.com/modeconnectivity/modeconnectivity.
_PAPER = Recipe(
    "sgd",
    lr=3e-3,
    momentum=0.95,
    batch_size=100,
    epochs=400,
    schedule="constant",
    stop_error=0.0,
    min_epochs=100,
    stop_together=True,
)
_QUICK = Recipe("adamw", lr=2e-3, batch_size=256, epochs=10, schedule="onecycle", weight_decay=1e-4)


@dataclass(frozen=True)
class Solution:
    """Settings of the training of an experiment's network, to zero training error or to the end.

    They are arguments of `modeconn.training.train.train`.
    """

    lr: float
    epochs: int = 200
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    batch_size: int = 100
    halve_every: int = 0


@dataclass(frozen=True)
class OtherRecipe:
    """A recipe for some entry layers, at one fraction F or (None) at all."""

    entries: tuple[int, ...]
    recipe: Recipe
    fraction: float | None = None


@dataclass(frozen=True)
class Experiment:
    """Subnetworks and dropout networks at every entry layer of one solution.

    Attributes:
        data: name of the data set.
        model: spec of the architecture.
        solution: of its training, where no checkpoint is given.
        recipe: of the subnetworks' training; `others` has those of some entry layers.
        fractions: F: half of the units (2) or a quarter (4) are left to the next subnetwork.
        draws, dropout_draws: per entry layer; `first_draws` at entry layer 0, whose subnetworks
            read all inputs and differ in their first weights alone.
        limit: only so many training samples; None for all.
        solutions: networks that are trained, from different seeds.
    """

    data: str
    model: str
    solution: Solution
    recipe: Recipe
    others: tuple[OtherRecipe, ...] = ()
    fractions: tuple[float, ...] = (2,)
    draws: int = 20
    first_draws: int = 1
    dropout_draws: int = 200
    limit: int | None = None
    solutions: int = 1

    def recipe_of(self, fraction: float, entry: int) -> Recipe:
        """Returns the recipe of an entry layer's subnetworks."""
        for other in self.others:
            if entry in other.entries and other.fraction in (None, fraction):
                return other.recipe
        return self.recipe

    def draws_of(self, entry: int) -> int:
        """Returns the number of an entry layer's subnetworks."""
        return self.draws if entry else self.first_draws


@dataclass(frozen=True)
class Sweep:
    """One experiment at several widths: networks of two hidden layers."""

    base: Experiment
    widths: tuple[int, ...]

    def at(self, width: int) -> Experiment:
        """Returns the experiment of one width."""
        inputs, _, classes = self.base.model.split("-")
        return replace(self.base, model=f"{inputs}-{width}x2-{classes}")


@dataclass(frozen=True)
class Join:
    """Two solutions joined by a path, beside the dropout networks' level.

    Attributes:
        base: the experiment of one solution.
        target, kept: as for `connect`.
    """

    base: Experiment
    target: float
    kept: float = 0.5


_MNIST_FCN = Experiment("mnist", "mlp:784-245x10-10", Solution(lr=1e-3), _PAPER, solutions=10)
_CIFAR_FCN = Experiment(
    "cifar10",
    "mlp:3072-500x5-10",
    Solution(lr=5e-4),
    _PAPER,
    (OtherRecipe((0, 1), replace(_PAPER, lr=1e-3)),),
    solutions=10,
)
_VGG_RECIPE = Recipe(
    "sgd",
    lr=5e-3,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=100,
    epochs=200,
    schedule="step",
    every=20,
    decay=0.5,
    stop_error=0.0,
)
_CIFAR_VGG = Experiment(
    "cifar10",
    "vgg11:hidden=4096",
    Solution(lr=5e-3, momentum=0.9, weight_decay=5e-4, halve_every=10),
    _VGG_RECIPE,
    (
        # Published with steps of 250 epochs, more than there are.
        OtherRecipe((0,), replace(_VGG_RECIPE, schedule="constant"), fraction=4),
        # Published as 0.9 on a plateau of 10 epochs; here 0.9 after every 10 epochs, which falls
        # as fast as that can.
        OtherRecipe((1,), replace(_VGG_RECIPE, every=10, decay=0.9), fraction=4),
    ),
    fractions=(2, 4),
    solutions=5,
)
_SWEEPS = (*range(50, 501, 50), *range(600, 1501, 100), *range(1800, 3001, 300))
_WIDE = replace(_PAPER, lr=5e-3)

FULL: dict[str, Experiment | Sweep | Join] = {
    "mnist-fcn": _MNIST_FCN,
    "cifar10-fcn": _CIFAR_FCN,
    "cifar10-vgg11": _CIFAR_VGG,
    "widths": Sweep(
        replace(
            _MNIST_FCN,
            model="mlp:784-50x2-10",
            solution=Solution(lr=5e-3, epochs=400),
            recipe=_WIDE,
            solutions=3,
        ),
        _SWEEPS,
    ),
    "widths-cifar10": Sweep(
        replace(
            _CIFAR_FCN,
            model="mlp:3072-50x2-10",
            recipe=_WIDE,
            others=(OtherRecipe((0,), replace(_PAPER, lr=1e-3)),),
            solutions=3,
        ),
        _SWEEPS,
    ),
    "path": Join(_MNIST_FCN, target=0.001),
    "path-cifar10": Join(_CIFAR_FCN, target=0.001),
}

# Few samples make short epochs; readouts of few units need many steps.
_QUICK_WIDTHS = replace(_QUICK, lr=4e-3, batch_size=64, epochs=60)
_QUICK_CIFAR = Solution(lr=5e-3, epochs=60)
QUICK: dict[str, Experiment | Sweep | Join] = {
    "mnist-fcn": replace(
        _MNIST_FCN,
        solution=Solution(lr=5e-3, epochs=15),
        recipe=_QUICK,
        draws=3,
        first_draws=3,
        solutions=1,
        dropout_draws=20,
    ),
    "cifar10-fcn": replace(
        _CIFAR_FCN,
        solution=_QUICK_CIFAR,
        recipe=replace(_QUICK, lr=4e-3, batch_size=128, epochs=30),
        others=(),
        draws=3,
        first_draws=3,
        solutions=1,
        dropout_draws=20,
        limit=10_000,
    ),
    "cifar10-vgg11": replace(
        _CIFAR_VGG,
        model="vgg11:width=16",
        solution=Solution(lr=5e-3, epochs=15, momentum=0.9),
        recipe=replace(_QUICK, epochs=6, batch_size=128),
        others=(),
        fractions=(2,),
        draws=2,
        first_draws=2,
        solutions=1,
        dropout_draws=20,
        limit=10_000,
    ),
    "widths": Sweep(
        replace(
            _MNIST_FCN,
            model="mlp:784-50x2-10",
            solution=Solution(lr=0.01, epochs=20),
            recipe=_QUICK_WIDTHS,
            draws=3,
            first_draws=3,
            solutions=1,
            dropout_draws=20,
            limit=10_000,
        ),
        (50, 100, 200, 400, 800),
    ),
    "widths-cifar10": Sweep(
        replace(
            _CIFAR_FCN,
            model="mlp:3072-50x2-10",
            solution=_QUICK_CIFAR,
            recipe=_QUICK_WIDTHS,
            others=(),
            draws=3,
            first_draws=3,
            solutions=1,
            dropout_draws=20,
            limit=5_000,
        ),
        (50, 100, 200, 400),
    ),
    # Networks that are below the target themselves.
    "path": Join(
        replace(_MNIST_FCN, solution=Solution(lr=5e-3, epochs=24, halve_every=6), dropout_draws=20),
        target=0.003,
    ),
    "path-cifar10": Join(
        replace(_CIFAR_FCN, solution=_QUICK_CIFAR, dropout_draws=20, limit=10_000), target=0.05
    ),
}
NAMES = tuple(FULL)


def settings(name: str, quick: bool) -> Experiment | Sweep | Join:
    """Returns the settings of an experiment; a ModeconnError lists the experiments there are."""
    if name not in FULL:
        raise ModeconnError(f"experiment {name!r} is unknown: expected one of {', '.join(NAMES)}")
    return (QUICK if quick else FULL)[name]
