"""Gradient disorder and conflict of scales, counted over a window of steps.

``SignWindow`` is the state: counters for every scale element, kept on the device and updated for all of them at once,
by tensor operations only, so that nothing waits for the device. ``WindowStatistics`` is what a window showed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


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
