"""Gradient disorder and conflict of scales, and the policies that freeze by them.

``SignWindow`` is the state: counters for every scale element, kept on the device and updated for all of them at once.
A policy is a frozen dataclass with a pure function from the counters of a window to a mask. Judging and counting use
tensor operations only, so that nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

FreezeTarget = Literal["task", "smooth", "both"]


@dataclass(frozen=True)
class WindowStatistics:
    """What a window of perturbed steps showed, one entry per scale element; NaN where there was no gradient.

    Attributes:
        disorder_task: fraction of steps in which the sign of g_task was not that of the step before.
        disorder_smooth: the same of g_smooth.
        conflict: fraction of steps in which the signs of g_task and g_smooth differed.
        opposition: 1 where the sums of g_task and of g_smooth over the window have opposite signs, else 0.
    """

    disorder_task: Tensor
    disorder_smooth: Tensor
    conflict: Tensor
    opposition: Tensor


@dataclass
class SignWindow:
    """Counters over the current window of perturbed steps.

    A zero gradient (or NaN) takes the sign before it. An element that has had no sign yet is not compared: a window
    of K steps so makes K comparisons, K - 1 if it is the first, and none for a scale that is never used.
    """

    sign_task: Tensor
    sign_smooth: Tensor
    flips_task: Tensor
    flips_smooth: Tensor
    compared_task: Tensor
    compared_smooth: Tensor
    conflicts: Tensor
    pairs: Tensor
    sum_task: Tensor
    sum_smooth: Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> SignWindow:
        """A window that has seen nothing, for ``count`` scale elements."""
        return cls(*(torch.zeros(count, device=device) for _ in fields(cls)))

    def observe(self, g_task: Tensor, g_smooth: Tensor) -> None:
        """Count one perturbed step.

        Args:
            g_task: gradients of all scale elements in the first pass, shape ``(count,)``.
            g_smooth: those in the second pass.
        """
        self.sign_task = _count_flips(self.sign_task, g_task, self.flips_task, self.compared_task)
        self.sign_smooth = _count_flips(self.sign_smooth, g_smooth, self.flips_smooth, self.compared_smooth)
        both = (self.sign_task != 0) & (self.sign_smooth != 0)
        self.pairs += both
        self.conflicts += both & (self.sign_task != self.sign_smooth)
        self.sum_task += g_task
        self.sum_smooth += g_smooth

    def statistics(self) -> WindowStatistics:
        """What the steps counted so far show."""
        opposed = torch.sign(self.sum_task) * torch.sign(self.sum_smooth) < 0
        return WindowStatistics(
            disorder_task=self.flips_task / self.compared_task,  # 0/0 is NaN: nothing to compare.
            disorder_smooth=self.flips_smooth / self.compared_smooth,
            conflict=self.conflicts / self.pairs,
            opposition=torch.where(self.pairs > 0, opposed.float(), torch.nan),
        )

    def restart(self) -> None:
        """Begin the next window. The last signs stay: its first step is compared with them."""
        for f in fields(self):
            if not f.name.startswith("sign_"):
                getattr(self, f.name).zero_()


def _count_flips(previous: Tensor, gradient: Tensor, flips: Tensor, compared: Tensor) -> Tensor:
    """Count ``gradient`` against the ``previous`` signs, in place; returns the signs for the next step."""
    sign = torch.sign(gradient).nan_to_num(0.0)
    sign = torch.where(sign == 0, previous, sign)
    comparable = previous != 0  # then sign is not 0 either
    compared += comparable
    flips += comparable & (sign != previous)
    return sign


class FreezePolicy(Protocol):
    """What :class:`GAQATOptimizer` asks of a freeze policy."""

    @property
    def window(self) -> int:
        """Number K of perturbed steps after which ``judge`` decides."""

    @property
    def freeze(self) -> FreezeTarget | None:
        """Which part is frozen; ``None`` for the task part where the step has one, else both."""

    def judge(self, statistics: WindowStatistics) -> Tensor:
        """The elements (boolean mask) that are frozen for the next window."""


@dataclass(frozen=True)
class NeverFreeze:
    """Never freeze: with :class:`SAGM`, the direct integration LSQ+SAGM. Disorder and conflict are still measured.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 3))
        >>> NeverFreeze().judge(statistics).tolist()
        [False, False, False]
    """

    window: ClassVar[int] = 100
    freeze: ClassVar[FreezeTarget | None] = None

    def judge(self, statistics: WindowStatistics) -> Tensor:
        return torch.zeros_like(statistics.disorder_task, dtype=torch.bool)


@dataclass(frozen=True)
class DisorderFreeze:
    """GAQAT's rule: every ``window`` perturbed steps, freeze the scales whose gradient disorder is low, thaw the rest.

    The disorder of a gradient is the fraction of steps in which its sign flips. A g_task of low disorder keeps pushing
    one way and may hold a g_smooth that pushes the other way in balance; without it the scale goes where flatness
    asks. Nothing is frozen in the first window. Scales with one entry per channel are judged entry by entry; an entry
    that had no gradient is not frozen.

    The public record leaves ``window``, ``threshold`` and the three keywords open: the defaults are our reading.

    Args:
        window: number K of perturbed steps between judgements, at least 2.
        threshold: disorder below (or above) which a scale is frozen, from 0 to 1.
        quantile: freeze this fraction of the scales instead, those of the lowest (highest) disorder; ``threshold``
            then has no effect.
        measure: whose disorder is judged, ``"task"`` or ``"smooth"``.
        freeze: what is frozen: ``"task"``, ``"smooth"`` or ``"both"`` parts of the gradient; ``None`` for the task
            part where the step has one, else both. With ``"both"`` the scale does not move at all; with one part
            frozen, the other part, momentum and weight decay still move it.
        when: ``"below"`` or ``"above"`` the threshold.

    Raises:
        ValueError: an argument outside these ranges.

    Example:
        >>> statistics = WindowStatistics(torch.tensor([0.1, 0.5, torch.nan]), *torch.zeros(3, 3))
        >>> DisorderFreeze(threshold=0.3).judge(statistics).tolist()
        [True, False, False]

    Reference: *GAQAT*, arXiv 2412.05551.
    """

    window: int = 100
    threshold: float = 0.3
    quantile: float | None = field(default=None, kw_only=True)
    measure: Literal["task", "smooth"] = field(default="task", kw_only=True)
    freeze: FreezeTarget | None = field(default=None, kw_only=True)
    when: Literal["below", "above"] = field(default="below", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"DisorderFreeze: window must be an integer >= 2, got {self.window!r}")
        for name in ("threshold", "quantile"):
            value = getattr(self, name)
            if not (value is None and name == "quantile") and not 0 <= value <= 1:
                raise ValueError(f"DisorderFreeze: {name} must be from 0 to 1, got {value!r}")
        choices = {
            "measure": ("task", "smooth"),
            "freeze": (None, "task", "smooth", "both"),
            "when": ("below", "above"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"DisorderFreeze: {name} must be one of {allowed}, got {getattr(self, name)!r}")

    def judge(self, statistics: WindowStatistics) -> Tensor:
        disorder = statistics.disorder_task if self.measure == "task" else statistics.disorder_smooth
        if self.quantile is None:
            return disorder < self.threshold if self.when == "below" else disorder > self.threshold
        order = (disorder if self.when == "below" else -disorder).nan_to_num(torch.inf)
        rank = order.argsort(stable=True).argsort()
        return (rank < self.quantile * disorder.isfinite().sum()) & disorder.isfinite()
