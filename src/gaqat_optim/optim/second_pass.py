"""The second pass, from the gradients of the first to the combined ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .distributed import averaged_with_the_second_pass, process_group
from .gradients import combine, displace, dropped_on_arrival, first_gradients, reaches, restore
from .rng_state import replayed_rng
from .state_guards import gradient_versions, running_statistics_kept
from .step_state import Run
from .validation import check_apart, check_gradients, check_pass, check_second_pass


@contextmanager
def second_pass(
    base: torch.optim.Optimizer,
    model: nn.Module,
    run: Run,
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
        run: the state of the optimizer; it keeps what was seen of the scales until the step.
        names: qualified names of the parameters.
        rng: random states to draw from again; ``None`` to draw on.
        grad_scale: as in :meth:`GAQATOptimizer.perturbed`.
        per_rank: as there.
        holds_g_task: give ``.grad`` back what it held if the block raises. Without it that is left to the caller, and
            a g_task that the step does not use is not held for it.
    """
    if run.in_second_pass:
        raise RuntimeError("perturbed() inside perturbed(): a step has one second pass")
    check_pass(run.perturbation, grad_scale, per_rank)
    run.forget()
    reach = reaches(base, run.perturbation, run.monitor)
    owned = {p: p.grad for p in reach}
    g_task = first = first_gradients(owned)
    check_gradients(g_task, names)
    saved: list[tuple[Parameter, Tensor]] = []
    run.in_second_pass = True
    try:
        displaced = {p: r for p in g_task if (r := reach[p]) is not None}
        displace(run.perturbation, displaced, g_task, grad_scale, names, saved)
        for p in reach:
            p.grad = None
        if per_rank:
            weight = run.perturbation.task_weight or 0.0
            g_task = averaged_with_the_second_pass(reach, g_task, run.monitor, weight, process_group(model))
        unneeded: set[Parameter] = set()
        if not holds_g_task:
            owned = {}
            if run.perturbation.task_weight == 0:
                unneeded = set(g_task) - set(run.monitor.scales.values())
        before = gradient_versions(list(reach))
        with (
            running_statistics_kept(model, run.buffers),
            replayed_rng(model, rng) if rng is not None else nullcontext(),
            dropped_on_arrival(g_task, unneeded),
        ):
            yield
        check_second_pass(before, gradient_versions(list(reach)))
        restore(saved)
        g_smooth = {p: p.grad for p in reach if p.grad is not None}
        check_apart(g_task, g_smooth, names)
        task, smooth = run.monitor.observed(g_task, g_smooth)
        seen = task / grad_scale, smooth / grad_scale
        combine(run.perturbation, run.monitor, g_task, g_smooth)
        run.leave_pending(seen, next(iter(g_smooth)))
    except BaseException:
        for p, g in owned.items():
            if g is not None and g is not first[p]:
                g.copy_(first[p])
            p.grad = g
        raise
    finally:
        restore(saved)
        run.in_second_pass = False
