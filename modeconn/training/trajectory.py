"""Checkpoints of a run, kept while it trains, for the plane that shows its trajectory."""

from __future__ import annotations

from typing import Any

from torch import nn

from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.parameters.planes import Plane
from modeconn.parameters.state import State, load


class Trajectory:
    """Keeps copies of a model's weights during a training, on the CPU.

    Where they become too many, every other one is dropped, and from then on they are kept half as
    often: the first and the latest stay.

        trajectory = mc.Trajectory(every=100)
        Trainer(callbacks=[trajectory.for_lightning()])        # Lightning's
        Trainer(callbacks=[trajectory.for_transformers()])     # transformers'
        trajectory.add(model)                                  # in a loop of one's own
        plane = trajectory.plane()

    Args:
        every: steps of the optimizer between checkpoints; None for one per epoch.
        most: how many checkpoints are kept, at least 4.

    Attributes:
        checkpoints: states, in the order of the training.
    """

    def __init__(self, every: int | None = None, most: int = 64) -> None:
        self.every = positive("every", every)
        if isinstance(most, bool) or not isinstance(most, int) or most < 4:
            raise ModeconnError(f"most is {most!r}: expected a whole number, at least 4")
        self._most, self._stride, self._seen = most, 1, 0
        self._kept: list[tuple[int, State]] = []

    @property
    def checkpoints(self) -> list[State]:
        """The states, in the order of the training."""
        return [state for _, state in self._kept]

    def add(self, model: nn.Module) -> None:
        """Keep a copy of a model's parameters and buffers as they are now."""
        number, self._seen = self._seen, self._seen + 1
        state = {k: v.detach().to("cpu", copy=True) for k, v in load(model).items()}
        # the latest stays until the next one comes
        self._kept = [kept for kept in self._kept if kept[0] % self._stride == 0]
        self._kept.append((number, state))
        if len(self._kept) > self._most:
            self._stride *= 2
            last = self._kept[-1]
            self._kept = [kept for kept in self._kept if kept[0] % self._stride == 0]
            if self._kept[-1] is not last:
                self._kept.append(last)

    def plane(self, **options: Any) -> Plane:
        """Return the plane of the first two principal components, as `Plane.trajectory` does.

        Args:
            options: of `Plane.trajectory`.
        """
        return Plane.trajectory(self.checkpoints, **options)

    def for_lightning(self) -> Any:
        """Return a callback for Lightning's Trainer.

        Raises:
            ModeconnError: neither lightning nor pytorch_lightning is installed.
        """
        return _lightning_callback(self)

    def for_transformers(self) -> Any:
        """Return a callback for the Trainer of transformers.

        Raises:
            ModeconnError: transformers is not installed.
        """
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ModeconnError(
                f"transformers cannot be imported ({error}): pip install transformers"
            ) from error
        trajectory = self

        class Keep(TrainerCallback):
            """Adds the model to the trajectory."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                trajectory.add(kwargs["model"])

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if trajectory.every and state.global_step % trajectory.every == 0:
                    trajectory.add(kwargs["model"])

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not trajectory.every:
                    trajectory.add(kwargs["model"])

        return Keep()


def _lightning_callback(trajectory: Trajectory) -> Any:
    base = _lightning_base()

    class Keep(base):  # type: ignore[misc, valid-type]  # found at run time
        """Adds the module to the trajectory."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self._at = trainer.global_step
            trajectory.add(module)

        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            step = trainer.global_step  # gradients may be accumulated over several batches
            if trajectory.every and step != self._at and step % trajectory.every == 0:
                trajectory.add(module)
            self._at = step

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if not trajectory.every:
                trajectory.add(module)

    return Keep()


def _lightning_base() -> type:
    import importlib

    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base: type = importlib.import_module(name).Callback
        except ImportError:
            continue
        return base
    raise ModeconnError(
        "neither lightning nor pytorch_lightning can be imported: pip install lightning"
    )
