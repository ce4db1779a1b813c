"""Gradient disorder, conflict and opposition of scales, counted over a window of steps.

``SignCounters`` has the counters of all scale elements, on the device: tensor operations update them, so that nothing
waits for the device. ``WindowStatistics`` has the results of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowStatistics:
    """Statistics of a window of perturbed steps, one entry per scale element; NaN where nothing could be compared.

    Attributes:
        disorder_task: fraction of steps in which the sign of g_task flipped, among the steps that had this gradient
            and whose predecessor had it.
        disorder_smooth: the same for g_smooth.
        conflict: fraction of the steps with both gradients in which the signs of g_task and g_smooth differed.
        opposition: 1 where the sums of g_task and of g_smooth over the window have opposite signs, else 0.
    """

    disorder_task: Tensor
    disorder_smooth: Tensor
    conflict: Tensor
    opposition: Tensor


@dataclass
class SignCounters:
    """Counters over the current window of perturbed steps, float32 under every default dtype of torch.

    A step without a gradient is compared neither with the step before nor with the step after it. A zero takes the
    sign before it. A window of K steps so makes K comparisons, the first window K - 1, and fewer for a scale that is
    not used in every step. Example, g_task in six steps, NaN for none: 1, 2, -1, 0, NaN, -3 makes three comparisons
    (1 with 2, 2 with -1, -1 with 0) and one flip (2 to -1).

    ``sign`` is the last sign (0: none yet), ``known`` whether the last step had a gradient with a sign. ``pairs``
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
        """Counters at zero, for ``count`` scale elements."""
        return cls.of_rows(torch.zeros(len(fields(cls)), count, dtype=torch.float32, device=device))

    @classmethod
    def of_rows(cls, rows: Iterable[Tensor]) -> SignCounters:
        """Counters with float32 ``rows`` for their fields, in the order of the fields."""
        pairs = zip(fields(cls), rows, strict=True)
        return cls(*(row > 0 if f.name.startswith("known_") else row.clone() for f, row in pairs))

    def update(self, g_task: Tensor, g_smooth: Tensor) -> None:
        """Count one perturbed step.

        Args:
            g_task: gradients of all scale elements in the first pass, shape ``(count,)``; NaN where there is none.
            g_smooth: the same for the second pass.
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
        """The statistics of the steps counted so far."""
        are_opposed = torch.sign(self.sum_task) * torch.sign(self.sum_smooth) < 0
        return WindowStatistics(
            disorder_task=self.flips_task / self.compared_task,  # 0/0 is NaN: nothing was compared.
            disorder_smooth=self.flips_smooth / self.compared_smooth,
            conflict=self.conflicts / self.pairs,
            opposition=torch.where(self.pairs > 0, are_opposed.to(self.pairs.dtype), torch.nan),
        )

    def reset(self) -> None:
        """Begin the next window. The signs of the last step stay: the next step is compared with them."""
        for f in fields(self):
            if not f.name.startswith(("sign_", "known_")):
                getattr(self, f.name).zero_()


def _signs(gradient: Tensor, last: Tensor) -> Tensor:
    sign = torch.sign(gradient)
    return torch.where(sign == 0, last, sign)


def _count_flips(comparable: Tensor, differs: Tensor, flips: Tensor, compared: Tensor) -> None:
    compared += comparable
    flips += comparable & differs
