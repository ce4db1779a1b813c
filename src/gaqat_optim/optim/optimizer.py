"""``GAQATOptimizer``: two passes around any base optimizer, and frozen scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from typing_extensions import override

from .distributed import assert_ranks_agree, process_group
from .freezing import DisorderFreeze, FreezePolicy, NeverFreeze
from .perturbations import SAGM, Perturbation
from .report import ScaleRecord
from .rng_state import rng_states
from .scale_tracker import ScaleTracker, find_scales
from .second_pass import second_pass
from .state_dict import FreezingState, embed, extract, policy_number
from .state_guards import gradient_versions, restore_on_error
from .step_state import StepState
from .validation import (
    check_arguments,
    check_interval,
    check_method,
    check_radius,
    check_scales,
    check_trained,
    needs_closure,
    refuse_accumulation,
    untrained_scales,
    warn_of_untrained,
)
from .wrapper import OptimizerAroundBase


class GAQATOptimizer(OptimizerAroundBase):
    r"""Any ``torch.optim`` optimizer under a sharpness-aware objective, with quantizer scales frozen by conflict.

    A step computes two gradients: ``g_task`` at the parameters and ``g_smooth`` at parameters displaced by the
    ``perturbation``. The parameters are restored to the bit, the two gradients combined, the frozen part of each
    frozen scale's gradient left out, and the base optimizer makes its step. Every ``freezing.window`` steps, the sign
    changes of the scales' gradients decide what is frozen next. A model without scales is welcome: the same optimizer
    then trains a flat start in floating point.

    During the second pass BatchNorm normalizes by batch statistics and leaves its running ones alone. A gradient that
    is not finite is no error: nothing is displaced then, and the values stay in ``.grad`` for a GradScaler to see.

    ``param_groups``, ``state`` and ``defaults`` are the base's own. A group's ``"rho"`` overrides the perturbation's;
    0 leaves the group where it is in the second pass. Where the base has a ``"rho"`` of its own, as Adadelta has, the
    key means that, and all groups have the perturbation's radius.

    Args:
        base: an instance, built on the parameters of ``model`` after :func:`quantize_model`. LBFGS, which evaluates
            its closure as it likes, cannot be wrapped.
        model: the network; an ``nn.Module``, or a wrapper such as DistributedDataParallel. Buffers and BatchNorms are
            kept from the second pass in its modules alone: of two networks in one loss, hand over both, in an
            ``nn.ModuleList``.
        perturbation: :class:`SAGM`, :class:`SAM`, :class:`ASAM` or :class:`GSAM`.
        freezing: a policy such as :class:`DisorderFreeze`; :class:`NeverFreeze` or ``None`` freeze nothing.
        scales: which parameters are scales, if they are not those of this package: the parameters themselves, or a
            predicate on qualified name and parameter. ``()`` for none: nothing is counted or frozen, and the scales may
            be trained elsewhere.
        interval: make the second pass only in every ``interval``-th step. Only those steps count in the window; the
            others are steps of the base with ``g_task``, left out where it is frozen.
        replay_rng: draw the same random numbers in both passes: the same dropout masks, the same stochastic depth.
            Both gradients are then of the same subnetwork. It holds for the default generators of torch and for
            ``torch.Generator`` attributes of modules; after the step they are where the first pass left them. With
            :meth:`perturbed`, the first pass begins at :meth:`zero_grad`.

    Raises:
        TypeError: an argument of the wrong type, or a base that cannot be wrapped.
        ValueError: a scale that the base does not train although it trains the weight of its layer, ``scales`` that
            match nothing, freezing the task part of a perturbation that has none, a ``"rho"`` that is no radius, or an
            ``interval`` below 1.

    Example:
        The closure form. ``step`` calls the closure twice and returns its first loss:

        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> bool(optimizer.step(closure) > optimizer.step(closure))
        True

        The explicit form, for accumulation, clipping, GradScaler:

        >>> first = closure()
        >>> with optimizer.perturbed():
        ...     second = closure()
        >>> optimizer.step()

    Reference: *GAQAT*, arXiv 2412.05551, on SAGM (CVPR 2023) and LSQ (arXiv 1902.08153).
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: nn.Module,
        *,
        perturbation: Perturbation = SAGM(),  # noqa: B008 (immutable)
        freezing: FreezePolicy | None = DisorderFreeze(),  # noqa: B008 (immutable)
        scales: Iterable[Parameter] | Callable[[str, Parameter], bool] | None = None,
        interval: int = 1,
        replay_rng: bool = False,
    ) -> None:
        # Not super().__init__: the groups and the state are the base's, by property.
        self._init_hook_registries()
        freezing = NeverFreeze() if freezing is None else freezing
        check_arguments(base, model, perturbation, freezing, interval)
        self._base = base
        self._model = model
        self.replay_rng = replay_rng
        self._needs_closure = needs_closure(base)
        self._names = {p: name for name, p in model.named_parameters()}
        self._chosen = scales if scales is None or callable(scales) else tuple(scales)
        found = find_scales(model, self._chosen)
        if self._chosen is not None:
            check_scales(model, self._chosen, found)
        check_trained(base, model, found, elsewhere=self._chosen == ())
        tracker = ScaleTracker(self._in_groups(found), freezing, perturbation.task_weight != 0)
        self._step_state = StepState(tracker, perturbation, interval)

    # -- settings ----------------------------------------------------------------------------------------------

    @property
    def perturbation(self) -> Perturbation:
        """Where the second pass looks. Another may be assigned between steps."""
        return self._step_state.perturbation

    @perturbation.setter
    def perturbation(self, perturbation: Perturbation) -> None:
        self._check_between_passes("perturbation")
        check_method(perturbation, self.freezing)
        self._step_state.perturbation = perturbation
        self._step_state.tracker.has_task_part = perturbation.task_weight != 0

    @property
    def freezing(self) -> FreezePolicy:
        """What freezes scales. Another policy may be assigned between steps.

        What was counted goes on. What is frozen is then the new policy's judgement of the last window or, before the
        first, what it freezes from the start. The window that has begun ends where the number of perturbed steps is a
        multiple of the new length.
        """
        return self._step_state.tracker.policy

    @freezing.setter
    def freezing(self, freezing: FreezePolicy | None) -> None:
        self._check_between_passes("freezing")
        freezing = NeverFreeze() if freezing is None else freezing
        check_method(self.perturbation, freezing)
        self._step_state.tracker.judge_by(freezing)

    @property
    def interval(self) -> int:
        """Of how many steps one has a second pass: those whose number is a multiple of it."""
        return self._step_state.interval

    @interval.setter
    def interval(self, interval: int) -> None:
        check_interval(interval)
        self._step_state.interval = interval

    def _check_between_passes(self, name: str) -> None:
        if self._step_state.in_second_pass:
            raise RuntimeError(f"{name} cannot be replaced inside perturbed(): leave the with block first")

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return self._step_state.steps

    @property
    def perturbed_steps(self) -> int:
        """Number of steps made with a second pass, which are those that count in the windows."""
        return self._step_state.tracker.steps

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base optimizer does. A second pass that no step has followed is forgotten."""
        self._step_state.forget()
        self._step_state.rng_at_zero_grad = rng_states(self.model) if self.replay_rng else None
        self.base.zero_grad(set_to_none=set_to_none)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. Scales in it are counted, judged and frozen from now on.

        Raises:
            ValueError: its ``"rho"`` is no radius, or the base refuses it.
        """
        candidates = find_scales(self.model, self._chosen)
        check_radius(self.base, param_group, len(self.base.param_groups))
        self.base.add_param_group(param_group)
        self._names.update({p: name for name, p in self.model.named_parameters()})
        state = self._step_state
        tracker = state.tracker.with_scales(self._in_groups(candidates))
        if state.uncommitted_scale_grads is not None:
            task, smooth = state.uncommitted_scale_grads
            state.uncommitted_scale_grads = (
                state.tracker.reindexed(task, tracker),
                state.tracker.reindexed(smooth, tracker),
            )
        state.tracker = tracker

    def _in_groups(self, scales: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """Those of ``scales`` that the base has, whether or not they need a gradient now."""
        params = {p for group in self.base.param_groups for p in group["params"]}
        return {name: p for name, p in scales.items() if p in params}

    def _warn_of_new_scales(self, judged: bool) -> None:
        """Once for each scale that came, without a group for it, to a layer whose weight the base trains.

        They are looked for where the number of modules has changed, and at the end of a window.
        """
        state, tracked = self._step_state, self._step_state.tracker.scales
        before, state.module_count = state.module_count, sum(1 for _ in self.model.modules())
        if state.module_count == before and not judged:
            return
        names = untrained_scales(self.base, self.model, find_scales(self.model, self._chosen))
        # fully_shard may have lent another object for one that is known.
        new = [n for n in names if n not in state.warned_of_scales and not hasattr(tracked.get(n), "full_tensor")]
        if new:
            state.warned_of_scales.update(new)
            warn_of_untrained(new)

    # -- a step ------------------------------------------------------------------------------------------------

    @property
    def perturbs(self) -> bool:
        """Whether the coming step has a second pass."""
        return self.steps % self.interval == 0

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss. It is called
                twice (once in steps without a second pass). Without it, the base makes a step with the gradients as
                they are, which after :meth:`perturbed` are the combined ones.

        Returns:
            The first loss; ``None`` without a closure.

        Raises:
            RuntimeError: the closure computed no gradient, or ``step`` is called inside :meth:`perturbed`. Whatever
                the closure raises comes through; parameters, buffers and the tensors that ``.grad`` held are then as
                before the step.
        """
        state = self._step_state
        if state.in_second_pass:
            raise RuntimeError("step() inside perturbed(): leave the with block first, it restores the parameters")
        loss: Any = None
        if closure is not None:
            loss = self._run_closure_twice(closure)
        if all(p.grad is None for group in self.base.param_groups for p in group["params"]):
            state.forget()
        if self.interval > 1 and state.uncommitted_scale_grads is None:
            state.tracker.zero_frozen_task_grads()
        with torch.no_grad(), state.tracker.hold_frozen_scales():
            if self._needs_closure:
                self.base.step(lambda: loss)
            else:
                self.base.step()
        torch.clear_autocast_cache()  # It holds the weights as they were before the step.
        state.rng_at_zero_grad = None
        judged = state.record_step(self.base, second_pass_due=self.perturbs, has_closure=closure is not None)
        if judged and (group := process_group(self.model)) is not None:
            assert_ranks_agree(state.tracker, group)
        self._warn_of_new_scales(judged)
        return loss

    def _run_closure_twice(self, closure: Callable[[], Any]) -> Any:
        state = self._step_state
        before_step = state.uncommitted_scale_grads
        params = [p for group in self.base.param_groups for p in group["params"]]
        rng = rng_states(self.model) if self.replay_rng and self.perturbs else None
        try:
            with restore_on_error(params, state.buffers.save(self.model)), torch.enable_grad():
                before = gradient_versions(params)
                with refuse_accumulation(params) if self.perturbs else nullcontext():
                    loss = closure()
                if before_step is not None and gradient_versions(params) == before:
                    # After perturbed() a closure may have nothing left to compute: Lightning passes such a one.
                    return loss
                state.uncommitted_scale_grads = None
                if self.perturbs:
                    # Of a pass that fails nothing is left: no need to hold g_task for it.
                    with second_pass(self.base, self.model, state, self._names, rng=rng, holds_g_task=False):
                        closure()
        except BaseException:
            state.uncommitted_scale_grads = before_step
            raise
        return loss

    @contextmanager
    def perturbed(self, *, grad_scale: float | Tensor = 1.0, per_rank: bool = False) -> Iterator[None]:
        """The second pass: within the block the parameters are displaced, and gradients start from none.

        Call it with the first pass's gradients in ``.grad``, run the second forward and backward in the block, and
        call :meth:`step` after it. On leaving, the parameters are what they were, to the bit, and ``.grad`` holds the
        combined gradient, frozen parts left out. If the block raises, everything is as before it, ``.grad`` included.

        Args:
            grad_scale: the factor on the loss, as from ``GradScaler.get_scale()``: the displacement needs the true
                gradient. ``.grad`` stays scaled.
            per_rank: say that the first pass ran under DistributedDataParallel's ``no_sync()``: each rank is displaced
                by the gradient of its own batch, and the gradients of both passes are averaged over the ranks at once,
                in the second backward.

        Raises:
            RuntimeError: no parameter has a gradient, or none got one in the block; a gradient is sparse, or was
                overwritten by the block; the block is nested in another; or, with ``replay_rng``, no
                :meth:`zero_grad` has said where the first pass began.
            ValueError: ``grad_scale`` is not positive and finite, or ``per_rank`` with a perturbation that needs both
                averaged gradients (:class:`GSAM`) or under ``fully_shard``.
        """
        rng = self._step_state.rng_at_zero_grad
        if self.replay_rng and rng is None:
            raise RuntimeError(
                "replay_rng: perturbed() repeats the random numbers that were drawn since zero_grad(), which was not "
                "called: call it on the optimizer directly before the first forward pass"
            )
        with second_pass(
            self.base, self.model, self._step_state, self._names, rng=rng, grad_scale=grad_scale, per_rank=per_rank
        ):
            yield

    # -- reading, saving ---------------------------------------------------------------------------------------

    def scale_report(self) -> list[ScaleRecord]:
        """One :class:`ScaleRecord` for each scale: of the last judged window, or the steps so far before the first."""
        return self._step_state.tracker.report(self.model)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the freezing state of each scale in that scale's state.

        The counts of steps are in the groups. Everything is a tensor or a number: ``torch.load(weights_only=True)``
        reads it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state, tracker = self._step_state, self._step_state.tracker
        freezing = FreezingState(
            tracker.state_tensors(), state.steps, tracker.steps, tracker.windows, policy_number(tracker.policy)
        )
        state_dict = embed(self.base.state_dict(), self.base.param_groups, freezing)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave. A state dict of the base alone starts with nothing counted or frozen.

        A state dict that was saved under another policy is taken up as if this one had been assigned to ``freezing``
        then.

        Raises:
            ValueError: the groups or the freezing state do not fit this optimizer, which is then as before.
        """
        state_dict = state_dict.copy()  # Hooks may write into it.
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        base, freezing = extract(state_dict, self.base.param_groups)
        tracker = ScaleTracker(self._step_state.tracker.scales, self.freezing, self.perturbation.task_weight != 0)
        if freezing is not None:
            tracker.load_state_tensors(freezing.scales, freezing.perturbed_steps, freezing.windows)
            if freezing.policy != policy_number(self.freezing):
                tracker.judge_by(self.freezing)
        self.base.load_state_dict(base)
        self._step_state.forget()
        self._step_state.tracker, self._step_state.steps = tracker, freezing.steps if freezing else 0
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @override
    def __repr__(self) -> str:
        settings = f"{self.perturbation}, {self.freezing}, scales={len(self._step_state.tracker.scales)}"
        return f"{type(self).__name__}({settings}, base={self.base})"
