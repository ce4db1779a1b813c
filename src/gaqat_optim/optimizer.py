"""``GAQATOptimizer``: two passes around any base optimizer, and frozen scales."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from typing_extensions import override

from .checkpoint import Freezing, merge, separate
from .checks import (
    check_apart,
    check_arguments,
    check_gradients,
    check_pass,
    check_second_pass,
    check_trained,
    needs_closure,
)
from .freezing import DisorderFreeze, FreezePolicy, NeverFreeze
from .kept import BufferGuard, gradient_versions, running_statistics_kept, undone_on_failure
from .monitor import ScaleMonitor, find_scales
from .passes import combine, displace, dropped_on_arrival, first_gradients, reaches, restore
from .perturbations import SAGM, Perturbation
from .ranks import averaged_with_the_second_pass, check_agreement, process_group
from .report import ScaleRecord
from .rng_state import replayed_rng, rng_states
from .run import Run


def _of_base(name: str, doc: str) -> property:
    """A property onto the base's attribute: an alias would go stale when the base loads a state dict."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value), doc=doc)


class GAQATOptimizer(torch.optim.Optimizer):
    r"""Any ``torch.optim`` optimizer under a sharpness-aware objective, with quantizer scales frozen by conflict.

    A step computes two gradients: ``g_task`` at the parameters and ``g_smooth`` at parameters displaced by the
    ``perturbation``. The parameters are restored to the bit, the two gradients combined, the frozen part of each
    frozen scale's gradient left out, and the base optimizer makes its step. Every ``freezing.window`` steps, the sign
    changes of the scales' gradients decide what is frozen next. A model without scales is welcome: the same optimizer
    then trains a flat start in floating point.

    During the second pass BatchNorm normalizes by batch statistics and leaves its running ones alone. A gradient that
    is not finite is no error: nothing is displaced then, and the values stay in ``.grad`` for a GradScaler to see.

    ``param_groups``, ``state`` and ``defaults`` are the base's own. A group's ``"rho"`` overrides the perturbation's;
    0 leaves the group where it is in the second pass.

    Args:
        base: an instance, built on the parameters of ``model`` after :func:`quantize_model`. LBFGS, which evaluates
            its closure as it likes, cannot be wrapped.
        model: the network; an ``nn.Module``, or a wrapper such as DistributedDataParallel. Buffers and BatchNorms are
            kept from the second pass in its modules alone: of two networks in one loss, hand over both, in an
            ``nn.ModuleList``.
        perturbation: :class:`SAGM`, :class:`SAM`, :class:`ASAM` or :class:`GSAM`.
        freezing: a policy such as :class:`DisorderFreeze`; :class:`NeverFreeze` or ``None`` freeze nothing.
        scales: which parameters are scales, if they are not those of this package: the parameters themselves, or a
            predicate on qualified name and parameter.
        interval: make the second pass only in every ``interval``-th step. Only those steps count in the window; the
            others are steps of the base with ``g_task``, left out where it is frozen.
        replay_rng: draw the same random numbers in both passes: the same dropout masks, the same stochastic depth.
            Both gradients are then of the same subnetwork. It holds for the default generators of torch and for
            ``torch.Generator`` attributes of modules; after the step they are where the first pass left them. With
            :meth:`perturbed`, the first pass begins at :meth:`zero_grad`.

    Raises:
        TypeError: an argument of the wrong type, or a base that cannot be wrapped.
        ValueError: a scale that the base does not train, ``scales`` that match nothing, freezing the task part of a
            perturbation that has none, or an ``interval`` below 1.

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
        self._without_hooks()
        freezing = NeverFreeze() if freezing is None else freezing
        check_arguments(base, model, perturbation, freezing, interval)
        self.base = base
        self.model = model
        self.perturbation = perturbation
        self.freezing = freezing
        self.interval = interval
        self.replay_rng = replay_rng
        self._buffers = BufferGuard()
        self._needs_closure = needs_closure(base)
        self._names = {p: name for name, p in model.named_parameters()}
        self._chosen = scales if scales is None or callable(scales) else list(scales)
        found = find_scales(model, self._chosen)
        check_trained(base, model, found)
        self._run = Run(ScaleMonitor(found, freezing, perturbation.task_weight != 0))

    def _without_hooks(self) -> None:
        """What ``Optimizer.__init__`` sets beside groups and state."""
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # -- the base's own ----------------------------------------------------------------------------------------

    param_groups: Any = _of_base("param_groups", "The base optimizer's parameter groups, the very list.")
    state: Any = _of_base("state", "The base optimizer's state.")
    defaults: Any = _of_base("defaults", "The base optimizer's defaults.")

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base optimizer does. A second pass that no step has followed is forgotten."""
        self._run.forget()
        self._run.rng_at_zero_grad = rng_states(self.model) if self.replay_rng else None
        self.base.zero_grad(set_to_none=set_to_none)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. Scales in it are counted, judged and frozen from now on."""
        candidates = find_scales(self.model, self._chosen)
        self.base.add_param_group(param_group)
        self._names = {p: name for name, p in self.model.named_parameters()}
        trained = {p for group in self.base.param_groups for p in group["params"]}
        run = self._run
        monitor = run.monitor.extended({name: p for name, p in candidates.items() if p in trained})
        if run.pending is not None:
            task, smooth = run.pending
            run.pending = run.monitor.rearranged(task, monitor), run.monitor.rearranged(smooth, monitor)
        run.monitor = monitor

    # -- a step ------------------------------------------------------------------------------------------------

    @property
    def perturbs(self) -> bool:
        """Whether the coming step has a second pass."""
        return self._run.steps % self.interval == 0

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
        run = self._run
        if run.in_second_pass:
            raise RuntimeError("step() inside perturbed(): leave the with block first, it restores the parameters")
        loss: Any = None
        if closure is not None:
            loss = self._closure_passes(closure)
        if all(p.grad is None for group in self.base.param_groups for p in group["params"]):
            run.forget()
        if self.interval > 1 and run.pending is None:
            run.monitor.leave_out_frozen_task()
        with torch.no_grad(), run.monitor.held_where_frozen():
            if self._needs_closure:
                self.base.step(lambda: loss)
            else:
                self.base.step()
        torch.clear_autocast_cache()  # It holds the weights as they were before the step.
        run.rng_at_zero_grad = None
        judged = run.count(self.base, due=self.perturbs, given=closure is not None)
        if judged and (group := process_group(self.model)) is not None:
            check_agreement(run.monitor, group)
        return loss

    def _closure_passes(self, closure: Callable[[], Any]) -> Any:
        run = self._run
        pending = run.pending
        params = [p for group in self.base.param_groups for p in group["params"]]
        rng = rng_states(self.model) if self.replay_rng and self.perturbs else None
        try:
            with undone_on_failure(params, self._buffers.save(self.model)), torch.enable_grad():
                before = gradient_versions(params)
                loss = closure()
                if pending is not None and gradient_versions(params) == before:
                    # After perturbed() a closure may have nothing left to compute: Lightning passes such a one.
                    return loss
                run.pending = None
                if self.perturbs:
                    # Of a pass that fails nothing is left: no need to hold g_task for it.
                    with self._second_pass(1.0, per_rank=False, holds_g_task=False, rng=rng):
                        closure()
        except BaseException:
            run.pending = pending
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
        rng = self._run.rng_at_zero_grad
        if self.replay_rng and rng is None:
            raise RuntimeError(
                "replay_rng: perturbed() repeats the random numbers that were drawn since zero_grad(), which was not "
                "called: call it on the optimizer directly before the first forward pass"
            )
        with self._second_pass(grad_scale, per_rank, holds_g_task=True, rng=rng):
            yield

    @contextmanager
    def _second_pass(
        self, grad_scale: float | Tensor, per_rank: bool, holds_g_task: bool, rng: list[Tensor] | None
    ) -> Iterator[None]:
        """:meth:`perturbed`; without ``holds_g_task``, a block that raises leaves ``.grad`` to the caller."""
        run = self._run
        if run.in_second_pass:
            raise RuntimeError("perturbed() inside perturbed(): a step has one second pass")
        check_pass(self.perturbation, grad_scale, per_rank)
        run.forget()
        reach = reaches(self.base, self.perturbation, run.monitor)
        owned = {p: p.grad for p in reach}
        g_task = first = first_gradients(owned)
        check_gradients(g_task, self._names)
        saved: list[tuple[Parameter, Tensor]] = []
        run.in_second_pass = True
        try:
            displace(
                self.perturbation, {p: r for p in g_task if (r := reach[p]) is not None}, g_task, grad_scale, saved
            )
            for p in reach:
                p.grad = None
            if per_rank:
                weight = self.perturbation.task_weight or 0.0
                g_task = averaged_with_the_second_pass(g_task, run.monitor, weight, process_group(self.model))
            unneeded: set[Parameter] = set()
            if not holds_g_task:
                owned = {}
                if self.perturbation.task_weight == 0:
                    unneeded = set(g_task) - set(run.monitor.scales.values())
            before = gradient_versions(list(reach))
            with (
                running_statistics_kept(self.model, self._buffers),
                replayed_rng(self.model, rng) if rng is not None else nullcontext(),
                dropped_on_arrival(g_task, unneeded),
            ):
                yield
            check_second_pass(before, gradient_versions(list(reach)))
            restore(saved)
            g_smooth = {p: p.grad for p in reach if p.grad is not None}
            check_apart(g_task, g_smooth, self._names)
            seen = run.monitor.gather(g_task) / grad_scale, run.monitor.gather(g_smooth) / grad_scale
            combine(self.perturbation, run.monitor, g_task, g_smooth)
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

    # -- reading, saving ---------------------------------------------------------------------------------------

    def scale_report(self) -> list[ScaleRecord]:
        """One :class:`ScaleRecord` for each scale: of the last judged window, or the steps so far before the first."""
        return self._run.monitor.report(self.model)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the freezing state of each scale in that scale's state.

        The counts of steps are in the groups. Everything is a tensor or a number: ``torch.load(weights_only=True)``
        reads it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        freezing = Freezing(self._run.monitor.packed(), self._run.steps, self._run.monitor.steps)
        state_dict = merge(self.base.state_dict(), self.base.param_groups, freezing)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave. A state dict of the base alone starts with nothing counted or frozen.

        Raises:
            ValueError: the groups or the freezing state do not fit this optimizer, which is then as before.
        """
        state_dict = state_dict.copy()  # Hooks may write into it.
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        base, freezing = separate(state_dict, self.base.param_groups)
        monitor = ScaleMonitor(self._run.monitor.scales, self.freezing, self.perturbation.task_weight != 0)
        if freezing is not None:
            monitor.unpack(freezing.scales, freezing.perturbed_steps)
        self.base.load_state_dict(base)
        self._run.monitor, self._run.steps, self._run.pending = monitor, freezing.steps if freezing else 0, None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Not Optimizer's, which would keep groups and state alone. Hooks stay behind, as with torch's optimizers, and
        # so does the step that a scheduler puts on the instance.
        return {key: v for key, v in self.__dict__.items() if key != "step" and not key.startswith("_optimizer_")}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._without_hooks()

    @override
    def __repr__(self) -> str:
        settings = f"{self.perturbation}, {self.freezing}, scales={len(self._run.monitor.scales)}"
        return f"GAQATOptimizer({settings}, base={self.base})"
