"""The second pass, from the gradients of the first to the combined ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .distributed import defer_all_reduce_to_second_pass, process_group
from .gradients import combine_gradients, dropped_on_arrival, first_gradients, perturb_parameters, radii_of, restore
from .rng_state import replayed_rng
from .state_guards import frozen_running_stats, gradient_versions
from .step_state import StepState
from .validation import check_apart, check_gradients, check_pass, check_second_pass


@contextmanager
def second_pass(
    base: torch.optim.Optimizer,
    model: nn.Module,
    state: StepState,
    names: Mapping[Parameter, str],
    *,
    rng: Sequence[Tensor] | None,
    grad_scale: float | Tensor = 1.0,
    per_rank: bool = False,
    holds_g_task: bool = True,
) -> Iterator[None]:
    """Displace the parameters for the block (forward and backward), restore them, and combine both gradients.

    Args:
        base: the base optimizer, whose parameters have the gradients of the first pass.
        model: the network.
        state: the state of the optimizer; it keeps what was seen of the scales until the step.
        names: qualified names of the parameters.
        rng: random states to draw from again; ``None`` to draw on.
        grad_scale: as in :meth:`GAQATOptimizer.perturbed`.
        per_rank: as there.
        holds_g_task: give ``.grad`` back what it held if the block raises. Without it that is left to the caller, and
            a g_task that the step does not use is not held for it.
    """
    if state.in_second_pass:
        raise RuntimeError("perturbed() inside perturbed(): a step has one second pass")
    check_pass(state.perturbation, grad_scale, per_rank)
    state.forget()
    radii = radii_of(base, state.perturbation, state.tracker)
    original_grads = {p: p.grad for p in radii}
    g_task = first_pass_grads = first_gradients(original_grads)
    check_gradients(g_task, names)
    saved_params: list[tuple[Parameter, Tensor]] = []
    state.in_second_pass = True
    try:
        radii_of_perturbed = {p: r for p in g_task if (r := radii[p]) is not None}
        perturb_parameters(state.perturbation, radii_of_perturbed, g_task, grad_scale, names, saved_params)
        for p in radii:
            p.grad = None
        if per_rank:
            weight = state.perturbation.task_weight or 0.0
            g_task = defer_all_reduce_to_second_pass(radii, g_task, state.tracker, weight, process_group(model))
        dispensable: set[Parameter] = set()
        if not holds_g_task:
            original_grads = {}
            if state.perturbation.task_weight == 0:
                dispensable = set(g_task) - set(state.tracker.scales.values())
        before = gradient_versions(list(radii))
        with (
            frozen_running_stats(model, state.buffers),
            replayed_rng(model, rng) if rng is not None else nullcontext(),
            dropped_on_arrival(g_task, dispensable),
        ):
            yield
        check_second_pass(before, gradient_versions(list(radii)))
        restore(saved_params)
        g_smooth = {p: p.grad for p in radii if p.grad is not None}
        check_apart(g_task, g_smooth, names)
        task, smooth = state.tracker.observed(g_task, g_smooth)
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
        restore(saved_params)
        state.in_second_pass = False
