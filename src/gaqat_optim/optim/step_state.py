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
from .scale_tracker import ScaleTracker
from .state_guards import BufferGuard

# So many steps without a second pass are no accident: the training loop never makes one.
WARN_AFTER = 20


@dataclass
class StepState:
    """Mutable state in one object: Lightning's wrapper copies ``__dict__``, and both must see the same state.

    Attributes:
        tracker: the scales, counted and frozen.
        perturbation: where the second pass looks.
        interval: of how many steps one has a second pass.
        steps: number of steps made.
        in_second_pass: whether the parameters are displaced.
        uncommitted_scale_grads: the two gradients of the scales from a second pass that no step has followed yet.
        steps_without_second_pass: number of steps in a row that were due a second pass and had none.
        buffers: what is known of the buffers of the model.
        warned_of_scales: names of scales that a warning has said are not trained.
        module_count: number of modules of the model in the last step.
        watch: the hook that notices gradients of another backward in place of the combined ones.
        rng_at_zero_grad: with ``replay_rng``, the random states when the gradients were last reset.
    """

    tracker: ScaleTracker
    perturbation: Perturbation
    interval: int
    steps: int = 0
    in_second_pass: bool = False
    uncommitted_scale_grads: tuple[Tensor, Tensor] | None = None
    steps_without_second_pass: int = 0
    buffers: BufferGuard = field(default_factory=BufferGuard)
    warned_of_scales: set[str] = field(default_factory=set)
    module_count: int = 0
    watch: RemovableHandle | None = None
    rng_at_zero_grad: list[Tensor] | None = None

    def keep_until_step(self, scale_grads: tuple[Tensor, Tensor], p: Parameter) -> None:
        """Keep what a second pass gave until the step, unless ``p`` then gets a gradient without having one.

        ``p.grad`` is then not the combined gradient any more: the pass was dropped, by ``model.zero_grad()`` say.
        """
        combined = weakref.ref(p.grad)

        def forget_if_dropped(p: Tensor) -> None:
            if p.grad is not combined():
                self.forget()

        self.uncommitted_scale_grads = scale_grads
        self.watch = p.register_post_accumulate_grad_hook(forget_if_dropped)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Forget a second pass that no step has followed."""
        self.uncommitted_scale_grads = None
        if self.watch is not None:
            self.watch.remove()
            self.watch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watch": None}  # A copy has parameters of its own.

    def record_step(self, base: torch.optim.Optimizer, second_pass_due: bool, has_closure: bool) -> bool:
        """Count a step that ``base`` has made.

        Args:
            base: the base optimizer.
            second_pass_due: whether the step was to have a second pass.
            has_closure: whether the step was given a closure.

        Returns:
            Whether a window of the tracker ended.
        """
        judged = False
        if self.uncommitted_scale_grads is not None:
            judged = self.tracker.commit(*self.uncommitted_scale_grads)
            self.forget()
            self.steps_without_second_pass = 0
        elif not has_closure and all_rates_zero(base):
            # torch's distributed checkpoints make a step at rate 0 to have a state to fill; that one is no training.
            return False
        elif second_pass_due:
            self.steps_without_second_pass += 1
            if self.steps_without_second_pass == WARN_AFTER:
                warnings.warn(
                    f"{WARN_AFTER} steps in a row had no second pass: they were steps of {type(base).__name__} "
                    "alone. Give step() a closure, or use perturbed() before it",
                    stacklevel=4,
                )
        self.steps += 1
        return judged


def all_rates_zero(base: torch.optim.Optimizer) -> bool:
    """Whether all learning rates are 0, as far as can be said without asking the device."""
    rates = [group.get("lr", 1.0) for group in base.param_groups]
    return all(not (isinstance(lr, Tensor) and lr.device.type != "cpu") and bool(lr == 0) for lr in rates)
