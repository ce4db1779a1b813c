"""``GAQATOptimizer``: two passes around any base optimizer, and frozen scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from typing_extensions import override

from .distributed import assert_ranks_agree, process_group
from .freezing import DisorderFreeze, FreezePolicy, NeverFreeze
from .perturbations import SAGM, Perturbation
from .report import ScaleRecord
from .scale_tracker import ScaleTracker, find_scales
from .second_pass.rng_state import rng_states
from .second_pass.second_pass import run_closure, second_pass
from .second_pass.step_state import StepState
from .state_dict import FreezingState, embed, extract, policy_number
from .validation import check_arguments, check_interval, check_method, check_radius, check_scales
from .wrapper import OptimizerAroundBase, StateDict, needs_closure, parameters_of


class GAQATOptimizer(OptimizerAroundBase):
    r"""Any ``torch.optim`` optimizer under a sharpness-aware objective, with quantizer scales frozen by conflict.

    A step computes two gradients: ``g_task`` at the parameters and ``g_smooth`` at parameters perturbed by the
    ``perturbation``. The parameters are restored to the bit, the two gradients combined without the frozen part of
    each frozen scale's gradient, and the base optimizer makes its step. Every ``freezing.window`` steps, the sign
    changes of the scales' gradients decide which scales are frozen next. A model without scales is welcome: the same
    optimizer then trains a flat start in floating point.

    During the second pass BatchNorm normalizes by batch statistics and leaves its running ones alone. A gradient that
    is not finite is no error: nothing is perturbed then, and the values stay in ``.grad`` for a GradScaler to see.

    ``param_groups``, ``state`` and ``defaults`` are the base's own. A group's ``"rho"`` overrides the perturbation's;
    0 leaves the group unperturbed. Where the base has a ``"rho"`` of its own, as Adadelta has, the key means that, and
    all groups have the perturbation's radius.

    Args:
        base: an instance, built on the parameters of ``model`` after :func:`quantize_model`. LBFGS, which decides
            itself how often it calls the closure, cannot be wrapped.
        model: the network; an ``nn.Module``, or a wrapper such as DistributedDataParallel. The second pass leaves
            buffers and BatchNorms of its modules alone: if two networks share a loss, pass both in an
            ``nn.ModuleList``.
        perturbation: :class:`SAGM`, :class:`SAM`, :class:`ASAM` or :class:`GSAM`.
        freezing: a policy such as :class:`DisorderFreeze`; :class:`NeverFreeze` or ``None`` freeze nothing.
        scales: which parameters are scales, if they are not those of this package: the parameters themselves, or a
            predicate on qualified name and parameter. ``()`` for none: nothing is counted or frozen, and the scales may
            be trained elsewhere.
        interval: make the second pass only in every ``interval``-th step. Only those steps count in the window; the
            others are steps of the base with ``g_task``, except for its frozen parts.
        replay_rng: draw the same random numbers in both passes, for dropout masks and stochastic depth: both gradients
            are then of the same subnetwork. It holds for the default generators of torch and for ``torch.Generator``
            attributes of modules; after the step they are where the first pass left them. With :meth:`perturbed`, the
            first pass begins at :meth:`zero_grad`.

    Raises:
        TypeError: an argument of the wrong type, or a base that cannot be wrapped.
        ValueError: a scale that the base does not train although it trains the weight of its layer, ``scales`` that
            match nothing, freezing of the task part under a perturbation without one, a ``"rho"`` that is no radius, or
            an ``interval`` below 1.

    Example:
        The closure form. ``step`` calls the closure twice and returns its first loss:

        >>> import torch
        >>> _ = torch.manual_seed(0)
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
        self._scale_choice = scales if scales is None or callable(scales) else tuple(scales)
        check_scales(base, model, self._scale_choice, find_scales(model, self._scale_choice))
        tracker = ScaleTracker(self._scales_in_groups(), freezing, perturbation.task_weight != 0)
        names = {p: name for name, p in model.named_parameters()}
        self._step_state = StepState(tracker, perturbation, interval, names)

    def _scales_in_groups(self) -> dict[str, Parameter]:
        """The scales that the base has in its groups, whether or not they need a gradient now."""
        params = set(parameters_of(self.base))
        return {name: p for name, p in find_scales(self.model, self._scale_choice).items() if p in params}

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
        """The policy that freezes scales. Another may be assigned between steps.

        Counts stay. The new policy judges the last window again; before the end of the first, it freezes what it
        freezes initially. The current window ends where the number of perturbed steps is a multiple of the new length.
        """
        return self._step_state.tracker.policy

    @freezing.setter
    def freezing(self, freezing: FreezePolicy | None) -> None:
        self._check_between_passes("freezing")
        freezing = NeverFreeze() if freezing is None else freezing
        check_method(self.perturbation, freezing)
        self._step_state.tracker.judge_by(freezing)

    def _check_between_passes(self, name: str) -> None:
        if self._step_state.in_second_pass:
            raise RuntimeError(f"{name} cannot be replaced inside perturbed(): leave the with block first")

    @property
    def interval(self) -> int:
        """Steps whose number is a multiple of this have a second pass."""
        return self._step_state.interval

    @interval.setter
    def interval(self, interval: int) -> None:
        check_interval(interval)
        self._step_state.interval = interval

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return self._step_state.steps

    @property
    def perturbed_steps(self) -> int:
        """Number of steps made with a second pass, which are those that count in the windows."""
        return self._step_state.tracker.steps

    @property
    def perturbs(self) -> bool:
        """Whether the coming step has a second pass."""
        return self._step_state.perturbs

    # -- a step ------------------------------------------------------------------------------------------------

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base optimizer does. A second pass that no step has followed is forgotten."""
        self._step_state.forget()
        self._step_state.rng_at_zero_grad = rng_states(self.model) if self.replay_rng else None
        self.base.zero_grad(set_to_none=set_to_none)

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
            RuntimeError: the closure computed no gradient, or ``step`` is called inside :meth:`perturbed`. Errors of
                the closure are passed on; parameters, buffers and the tensors that ``.grad`` held are then as before
                the step.
        """
        state = self._step_state
        if state.in_second_pass:
            raise RuntimeError("step() inside perturbed(): leave the with block first, it restores the parameters")
        loss = None if closure is None else run_closure(self.base, self.model, state, closure, self.replay_rng)
        if all(p.grad is None for p in parameters_of(self.base)):
            state.forget()
        if self.interval > 1 and state.uncommitted_scale_grads is None:
            state.tracker.zero_frozen_task_grads()
        with torch.no_grad(), state.tracker.hold_frozen_scales():
            if self._needs_closure:
                self.base.step(lambda: loss)
            else:
                self.base.step()
        torch.clear_autocast_cache()  # It holds the weights from before the step.
        state.rng_at_zero_grad = None
        window_ended = state.record_step(self.base, has_closure=closure is not None)
        if window_ended and (group := process_group(self.model)) is not None:
            assert_ranks_agree(state.tracker, group)
        state.warn_of_new_scales(self.base, self.model, self._scale_choice, window_ended)
        return loss

    @contextmanager
    def perturbed(self, *, grad_scale: float | Tensor = 1.0, per_rank: bool = False) -> Iterator[None]:
        """The second pass: within the block the parameters are perturbed, and gradients start from none.

        Call it with the first pass's gradients in ``.grad``, run the second forward and backward in the block, and
        call :meth:`step` after it. At the end of the block the parameters are restored to the bit, and ``.grad`` holds
        the combined gradient without its frozen parts. If the block raises, ``.grad`` and buffers are restored too.

        Args:
            grad_scale: the factor on the loss, as from ``GradScaler.get_scale()``: the perturbation needs the true
                gradient. ``.grad`` stays scaled.
            per_rank: set this if the first pass ran under DistributedDataParallel's ``no_sync()``. The gradient of its
                own batch perturbs each rank, and the second backward averages the gradients of both passes at once.

        Raises:
            RuntimeError: no parameter has a gradient, or none got one in the block; a gradient is sparse, or was
                overwritten by the block; the block is nested in another; or, with ``replay_rng``, :meth:`zero_grad`
                was not called before the first pass.
            ValueError: ``grad_scale`` is not positive and finite, or ``per_rank`` with a perturbation that needs both
                averaged gradients (:class:`GSAM`) or under ``fully_shard``.
        """
        rng = self._step_state.rng_at_zero_grad
        if self.replay_rng and rng is None:
            raise RuntimeError(
                "replay_rng: perturbed() repeats the random numbers that were drawn since zero_grad(), which was not "
                "called: call it on the optimizer directly before the first forward pass"
            )
        with second_pass(self.base, self.model, self._step_state, rng=rng, grad_scale=grad_scale, per_rank=per_rank):
            yield

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. Scales in it are counted, judged and frozen from now on.

        Raises:
            ValueError: its ``"rho"`` is no radius, or the base refuses it.
        """
        check_radius(self.base, param_group, len(self.base.param_groups))
        self.base.add_param_group(param_group)
        self._step_state.names.update({p: name for name, p in self.model.named_parameters()})
        self._step_state.track(self._scales_in_groups())

    # -- reading, saving ---------------------------------------------------------------------------------------

    def scale_report(self) -> list[ScaleRecord]:
        """One :class:`ScaleRecord` for each scale: of the last judged window, or the steps so far before the first."""
        return self._step_state.tracker.report(self.model)

    @override
    def state_dict(self) -> StateDict:
        """The base's state dict, with the freezing state of each scale in that scale's state.

        The counts of steps are in the groups. Everything is a tensor or a number: ``torch.load(weights_only=True)``
        reads it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state, tracker = self._step_state, self._step_state.tracker
        policy = policy_number(tracker.policy)
        freezing = FreezingState(tracker.state_tensors(), state.steps, tracker.steps, tracker.windows, policy)
        state_dict = embed(self.base.state_dict(), self.base.param_groups, freezing)
        return self._through_hooks(self._optimizer_state_dict_post_hooks, state_dict)

    @torch.no_grad()
    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a :meth:`state_dict`. After a state dict of the base alone, nothing is counted or frozen.

        If it was saved under another policy, this optimizer's policy judges its last window again, as if it had been
        assigned to ``freezing`` then.

        Raises:
            ValueError: the groups or the freezing state do not fit this optimizer, which is not changed.
        """
        # Hooks may write into the copy.
        state_dict = self._through_hooks(self._optimizer_load_state_dict_pre_hooks, state_dict.copy())
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
        method = f"{self.perturbation}, {self.freezing}, scales={len(self._step_state.tracker.scales)}"
        return f"{type(self).__name__}({method}, base={self.base})"
