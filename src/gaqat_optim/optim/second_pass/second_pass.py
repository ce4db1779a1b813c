"""The two passes of a step, from the gradients of the first to the combined ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..distributed import defer_all_reduce_to_second_pass, process_group
from ..validation import check_first_gradients, check_pass, check_separate, refuse_accumulation
from ..wrapper import parameters_of
from .gradients import (
    SavedValue,
    combine_gradients,
    first_gradients,
    gradient_versions,
    gradients_changed,
    perturb_parameters,
    radii_of,
    release_task_gradients,
    restore,
)
from .rng_state import replayed_rng, rng_states
from .state_guards import frozen_running_stats, restore_on_error
from .step_state import StepState


def run_closure(
    base: torch.optim.Optimizer, model: nn.Module, state: StepState, closure: Callable[[], Any], replay_rng: bool
) -> Any:
    """Call ``closure`` and, in a step that perturbs, call it again at the perturbed parameters; the first loss."""
    earlier_grads = state.uncommitted_scale_grads
    params = parameters_of(base)
    rng = rng_states(model) if replay_rng and state.perturbs else None
    try:
        with restore_on_error(params, state.buffers.save(model)), torch.enable_grad():
            versions = gradient_versions(params)
            with refuse_accumulation(params) if state.perturbs else nullcontext():
                loss = closure()
            if earlier_grads is not None and not gradients_changed(params, versions):
                # Lightning's manual optimization makes both passes with perturbed(), and then calls step() with a
                # closure that computes nothing.
                return loss
            state.uncommitted_scale_grads = None
            if state.perturbs:
                # restore_on_error restores .grad: nothing has to hold g_task for that.
                with second_pass(base, model, state, rng=rng, restores_grad=False):
                    closure()
    except BaseException:
        state.uncommitted_scale_grads = earlier_grads
        raise
    return loss


@contextmanager
def second_pass(
    base: torch.optim.Optimizer,
    model: nn.Module,
    state: StepState,
    *,
    rng: Sequence[Tensor] | None,
    grad_scale: float | Tensor = 1.0,
    per_rank: bool = False,
    restores_grad: bool = True,
) -> Iterator[None]:
    """Perturb the parameters for the block (forward and backward), restore them, and combine both gradients.

    The parameters of ``base`` have the gradients of the first pass. ``state`` keeps the scales' gradients until the
    step. The block draws random numbers from the states ``rng`` again, if given. If it raises, ``.grad`` is restored;
    without ``restores_grad`` the caller does that, and a g_task that the step does not use is freed during the second
    backward. ``grad_scale`` and ``per_rank`` are those of :meth:`GAQATOptimizer.perturbed`.
    """
    if state.in_second_pass:
        raise RuntimeError("perturbed() inside perturbed(): a step has one second pass")
    check_pass(state.perturbation, grad_scale, per_rank)
    state.forget()
    radii = radii_of(base, state.perturbation, state.tracker)
    params = parameters_of(base)
    original_grads = {p: p.grad for p in params}
    g_task = first_pass_grads = first_gradients(original_grads)
    check_first_gradients(g_task, state.names)
    saved_values: list[SavedValue] = []
    state.in_second_pass = True
    try:
        perturbed_radii = {p: radii[p] for p in g_task if p in radii}
        perturb_parameters(state.perturbation, perturbed_radii, g_task, grad_scale, state.names, saved_values)
        for p in params:
            p.grad = None
        if per_rank:
            weight = state.perturbation.task_weight or 0.0
            g_task = defer_all_reduce_to_second_pass(params, g_task, state.tracker, weight, process_group(model))
        unused_in_step: set[Parameter] = set()
        if not restores_grad:
            original_grads = {}
            if state.perturbation.task_weight == 0:
                unused_in_step = set(g_task) - set(state.tracker.scales.values())
        versions = gradient_versions(params)
        with (
            frozen_running_stats(model, state.buffers),
            replayed_rng(model, rng) if rng is not None else nullcontext(),
            release_task_gradients(g_task, unused_in_step),
        ):
            yield
        if not gradients_changed(params, versions):
            raise RuntimeError(
                "no parameter of the base optimizer received a gradient in the second pass: perturbed() is the block "
                "around the second forward and backward(), and a closure must call backward() each time it is called"
            )
        restore(saved_values)
        g_smooth = {p: p.grad for p in params if p.grad is not None}
        check_separate(g_task, g_smooth, state.names)
        task, smooth = state.tracker.gather_both(g_task, g_smooth)
        scale_grads = task / grad_scale, smooth / grad_scale
        combine_gradients(state.perturbation, state.tracker, g_task, g_smooth)
        state.keep_until_step(scale_grads, next(iter(g_smooth)))
    except BaseException:
        for p, g in original_grads.items():
            if g is not None and g is not first_pass_grads[p]:
                g.copy_(first_pass_grads[p])
            p.grad = g
        raise
    finally:
        restore(saved_values)
        state.in_second_pass = False
