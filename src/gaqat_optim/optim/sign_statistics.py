"""Gradient disorder and conflict of scales, counted over a window of steps.

``SignCounters`` is the state: counters for every scale element, kept on the device and updated for all of them at once,
by tensor operations only, so that nothing waits for the device. ``WindowStatistics`` is what a window showed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowStatistics:
    """What a window of perturbed steps showed, one entry per scale element; NaN where there was nothing to compare.

    Attributes:
        disorder_task: fraction of steps in which the sign of g_task was not that of the step before; of those steps
            that had this gradient, as had the one before.
        disorder_smooth: the same of g_smooth.
        conflict: fraction of the steps with both gradients in which the signs of g_task and g_smooth differed.
        opposition: 1 where the sums of g_task and of g_smooth over the window have opposite signs, else 0.
    """

    disorder_task: Tensor
    disorder_smooth: Tensor
    conflict: Tensor
    opposition: Tensor


@dataclass
class SignCounters:
    """Counters over the current window of perturbed steps, all float32 whatever torch's default is.

    Two gradients are compared where both exist: a step without one counts neither by itself nor for the step after it.
    A zero takes the sign before it; until an element has had a sign, there is nothing to compare. A window of K steps
    so makes K comparisons, K - 1 if it is the first, fewer for a scale that is not used in every step.

    ``sign`` is the last sign (0: none yet), ``known`` whether the last step had a gradient that has a sign, ``pairs``
    counts the steps that had two.
    """

    sign_task: Tensor
    sign_smooth: Tensor
    known_task: Tensor
    known_smooth: Tensor
    flips_task: Tensor
    flips_smooth: Tensor
    compared_task: Tensor
    compared_smooth: Tensor
    conflicts: Tensor
    pairs: Tensor
    sum_task: Tensor
    sum_smooth: Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> SignCounters:
        """A window that has seen nothing, for ``count`` scale elements."""
        return cls.of_rows(torch.zeros(len(fields(cls)), count, dtype=torch.float32, device=device))

    @classmethod
    def of_rows(cls, rows: Iterable[Tensor]) -> SignCounters:
        """The window of which ``rows`` are the fields, in their order, as float32."""
        named = zip(fields(cls), rows, strict=True)
        return cls(*(row > 0 if f.name.startswith("known_") else row.clone() for f, row in named))

    def update(self, g_task: Tensor, g_smooth: Tensor) -> None:
        """Count one perturbed step.

        Args:
            g_task: gradients of all scale elements in the first pass, shape ``(count,)``; NaN where there is none.
            g_smooth: those in the second pass.
        """
        has_task, has_smooth = g_task == g_task, g_smooth == g_smooth  # NaN is not equal to itself.
        g_task, g_smooth = g_task.nan_to_num(0.0), g_smooth.nan_to_num(0.0)
        last, known = self.sign_task, self.known_task
        self.sign_task = _signs(g_task, last)
        self.known_task = has_task & (self.sign_task != 0)
        _count_flips(has_task & known, self.sign_task != last, self.flips_task, self.compared_task)
        last, known = self.sign_smooth, self.known_smooth
        self.sign_smooth = _signs(g_smooth, last)
        self.known_smooth = has_smooth & (self.sign_smooth != 0)
        _count_flips(has_smooth & known, self.sign_smooth != last, self.flips_smooth, self.compared_smooth)
        both = self.known_task & self.known_smooth
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
            opposition=torch.where(self.pairs > 0, opposed.to(self.pairs.dtype), torch.nan),
        )

    def reset(self) -> None:
        """Begin the next window. What is known of the last step stays: the next one is compared with it."""
        for f in fields(self):
            if not f.name.startswith(("sign_", "known_")):
                getattr(self, f.name).zero_()


def _signs(gradient: Tensor, last: Tensor) -> Tensor:
    sign = torch.sign(gradient)
    return torch.where(sign == 0, last, sign)


def _count_flips(comparable: Tensor, other: Tensor, flips: Tensor, compared: Tensor) -> None:
    compared += comparable
    flips += comparable & other
