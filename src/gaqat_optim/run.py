"""What changes in a :class:`GAQATOptimizer` from step to step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .monitor import ScaleMonitor
from .perturbations import Perturbation

# So many steps without a second pass are no accident: the training loop never makes one.
STEPS_WITHOUT = 20


@dataclass
class Run:
    """One object, so that a wrapper that borrows the optimizer's class, as Lightning's does, shares it.

    Attributes:
        monitor: the scales, counted and frozen.
        perturbation: where the second pass looks.
        interval: of how many steps one has a second pass.
        steps: number of steps made.
        in_second_pass: whether the parameters are displaced.
        pending: the two gradients of the scales in a second pass that no step has followed yet.
        without: number of steps in a row that were due a second pass and had none.
        told: names of scales that a warning has said are not trained.
    """

    monitor: ScaleMonitor
    perturbation: Perturbation
    interval: int
    steps: int = 0
    in_second_pass: bool = False
    pending: tuple[Tensor, Tensor] | None = None
    without: int = 0
    told: set[str] = field(default_factory=set)

    def count(self, base: torch.optim.Optimizer, due: bool, given: bool) -> bool:
        """Count a step that ``base`` has made.

        Args:
            base: the base optimizer.
            due: whether the step was to have a second pass.
            given: whether the step was given a closure.

        Returns:
            Whether a window of the monitor ended.
        """
        judged = False
        if self.pending is not None:
            judged = self.monitor.commit(*self.pending)
            self.pending, self.without = None, 0
        elif not given and all_rates_zero(base):
            # torch's distributed checkpoints make a step at rate 0 to have a state to fill; that one is no training.
            return False
        elif due:
            self.without += 1
            if self.without == STEPS_WITHOUT:
                warnings.warn(
                    f"{STEPS_WITHOUT} steps in a row had no second pass: they were steps of {type(base).__name__} "
                    "alone. Give step() a closure, or use perturbed() before it",
                    stacklevel=4,
                )
        self.steps += 1
        return judged


def all_rates_zero(base: torch.optim.Optimizer) -> bool:
    """Whether all learning rates are 0, as far as can be said without asking the device."""
    rates = [group.get("lr", 1.0) for group in base.param_groups]
    return all(not (isinstance(lr, Tensor) and lr.device.type != "cpu") and bool(lr == 0) for lr in rates)
