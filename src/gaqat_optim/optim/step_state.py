"""What changes in a :class:`GAQATOptimizer` from step to step."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.utils.hooks import RemovableHandle

from .perturbations import Perturbation
from .scale_tracker import ScaleMonitor
from .state_guards import BufferGuard

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
        buffers: what is known of the buffers of the model.
        told: names of scales that a warning has said are not trained.
        modules: number of modules of the model in the last step.
        watch: the hook that notices gradients of another backward in the place of those that are pending.
        rng_at_zero_grad: with ``replay_rng``, the random states when the gradients were last reset.
    """

    monitor: ScaleMonitor
    perturbation: Perturbation
    interval: int
    steps: int = 0
    in_second_pass: bool = False
    pending: tuple[Tensor, Tensor] | None = None
    without: int = 0
    buffers: BufferGuard = field(default_factory=BufferGuard)
    told: set[str] = field(default_factory=set)
    modules: int = 0
    watch: RemovableHandle | None = None
    rng_at_zero_grad: list[Tensor] | None = None

    def leave_pending(self, seen: tuple[Tensor, Tensor], p: Parameter) -> None:
        """Keep what a second pass has ``seen`` until the step, unless ``p`` gets a gradient from nothing before it.

        ``p.grad`` is then not the combined gradient any more: the pass was dropped, by ``model.zero_grad()`` say.
        """
        combined = weakref.ref(p.grad)

        def forget_if_dropped(p: Tensor) -> None:
            if p.grad is not combined():
                self.forget()

        self.pending = seen
        self.watch = p.register_post_accumulate_grad_hook(forget_if_dropped)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Forget a second pass that no step has followed."""
        self.pending = None
        if self.watch is not None:
            self.watch.remove()
            self.watch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watch": None}  # A copy has parameters of its own.

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
            self.forget()
            self.without = 0
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
