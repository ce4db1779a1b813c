"""What changes in a :class:`GAQATOptimizer` from step to step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.utils.hooks import RemovableHandle

from ..perturbations import Perturbation
from ..scale_tracker import ScaleChoice, ScaleTracker, find_scales
from ..validation import name_list, untrained_scales
from .state_guards import BufferGuard

# A loop with so many steps without a second pass in a row never makes one.
WARN_AFTER = 20


@dataclass
class StepState:
    """Mutable state in one object: Lightning's wrapper copies ``__dict__``, and both must see the same state."""

    tracker: ScaleTracker  # counts and freezes the scales
    perturbation: Perturbation
    interval: int  # one step of so many has a second pass
    names: dict[Parameter, str]  # qualified names of the parameters
    steps: int = 0
    in_second_pass: bool = False
    uncommitted_scale_grads: tuple[Tensor, Tensor] | None = None  # of a second pass, until the step counts them
    steps_without_second_pass: int = 0  # in a row, though one was due
    buffers: BufferGuard = field(default_factory=BufferGuard)
    warned_of_scales: set[str] = field(default_factory=set)
    module_count: int = 0  # in the last step
    watch: RemovableHandle | None = None  # the hook that notices another backward's gradients
    rng_at_zero_grad: list[Tensor] | None = None  # random states at the last zero_grad(), with replay_rng

    @property
    def perturbs(self) -> bool:
        """Whether the coming step has a second pass."""
        return self.steps % self.interval == 0

    def keep_until_step(self, scale_grads: tuple[Tensor, Tensor], p: Parameter) -> None:
        """Keep the scales' gradients of a second pass for the step, unless ``p`` gets another gradient before it.

        A user may drop a second pass: ``model.zero_grad()``, then ``backward()`` of the next batch. ``p.grad`` is then
        a new tensor, and the step must not count the pass.
        """
        combined_grad = weakref.ref(p.grad)

        def forget_if_replaced(p: Tensor) -> None:
            if p.grad is not combined_grad():
                self.forget()

        self.uncommitted_scale_grads = scale_grads
        self.watch = p.register_post_accumulate_grad_hook(forget_if_replaced)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Forget a second pass that no step has followed."""
        self.uncommitted_scale_grads = None
        if self.watch is not None:
            self.watch.remove()
            self.watch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watch": None}  # A copy has parameters of its own, without the hook.

    def track(self, scales: Mapping[str, Parameter]) -> None:
        """Track ``scales`` from now on, and keep what is known of those among them that are tracked already."""
        tracker = self.tracker.with_scales(scales)
        if self.uncommitted_scale_grads is not None:
            task, smooth = (tracker.gather(self.tracker.split(grads)) for grads in self.uncommitted_scale_grads)
            self.uncommitted_scale_grads = task, smooth
        self.tracker = tracker

    def record_step(self, base: torch.optim.Optimizer, has_closure: bool) -> bool:
        """Count a step that ``base`` has made; returns whether a window ended."""
        window_ended = False
        if self.uncommitted_scale_grads is not None:
            window_ended = self.tracker.commit(*self.uncommitted_scale_grads)
            self.forget()
            self.steps_without_second_pass = 0
        elif not has_closure and all_learning_rates_zero(base):
            # torch.distributed.checkpoint sets every learning rate to 0 and calls step() once, so that Adam, say,
            # creates the exp_avg tensors that it then loads into. No training step has learning rate 0 everywhere and
            # neither closure nor second pass, so this one is not counted.
            return False
        elif self.perturbs:
            self.steps_without_second_pass += 1
            if self.steps_without_second_pass == WARN_AFTER:
                warnings.warn(
                    f"{WARN_AFTER} steps in a row had no second pass: they were steps of {type(base).__name__} "
                    "alone. Give step() a closure, or use perturbed() before it",
                    stacklevel=4,  # where step() was called
                )
        self.steps += 1
        return window_ended

    def warn_of_new_scales(
        self, base: torch.optim.Optimizer, model: nn.Module, choice: ScaleChoice, window_ended: bool
    ) -> None:
        """Warn once of each scale that a layer got after the optimizer was built, and that no group has.

        The search costs a walk through the model: it is made where the number of modules has changed, and at the end
        of a window.
        """
        last_count, self.module_count = self.module_count, sum(1 for _ in model.modules())
        if self.module_count == last_count and not window_ended:
            return
        new_names = [
            name
            for name in untrained_scales(base, model, find_scales(model, choice))
            # fully_shard replaces Parameter objects: a tracked name with a sharded tensor is no new scale.
            if name not in self.warned_of_scales and not hasattr(self.tracker.scales.get(name), "full_tensor")
        ]
        if new_names:
            self.warned_of_scales.update(new_names)
            warnings.warn(
                "the base optimizer does not train these scales, which came after it was built: "
                f"{name_list(new_names)}. Give them to add_param_group()",
                stacklevel=4,  # where step() was called
            )


def all_learning_rates_zero(base: torch.optim.Optimizer) -> bool:
    """Whether every learning rate is 0; one on another device than the CPU counts as not 0, without asking it."""
    rates = [group.get("lr", 1.0) for group in base.param_groups]
    return all(not (isinstance(lr, Tensor) and lr.device.type != "cpu") and bool(lr == 0) for lr in rates)
