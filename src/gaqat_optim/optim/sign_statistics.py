"""Gradient disorder, conflict and opposition of scales, counted over a window of steps.

``SignCounters`` has the counters of all scale elements, on the device: tensor operations update them, so that nothing
waits for the device. ``WindowStatistics`` has the results of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

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


class SignCounters:
    """Counters over the current window of perturbed steps, in one float32 tensor of shape (rows, elements).

    A step without a gradient is compared neither with the step before nor with the step after it. A zero takes the
    sign before it. A window of K steps so makes K comparisons, the first window K - 1, and fewer for a scale that is
    not used in every step. Example, g_task in six steps, NaN for none: 1, 2, -1, 0, NaN, -3 makes three comparisons
    (1 with 2, 2 with -1, -1 with 0) and one flip (2 to -1).

    Args:
        rows: two rows each (g_task and g_smooth) of the last sign (0: none yet), of whether the last step had a
            gradient with a sign, of flips, and of comparisons; one of conflicts; one of steps with two gradients that
            have signs; two of sums.
    """

    ROWS = 12

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> SignCounters:
        """Counters at zero, for ``count`` scale elements."""
        return cls(torch.zeros(cls.ROWS, count, dtype=torch.float32, device=device))

    def update(self, g_task: Tensor, g_smooth: Tensor) -> None:
        """Count one perturbed step.

        Args:
            g_task: gradients of all scale elements in the first pass, shape ``(count,)``; NaN where there is none.
            g_smooth: the same for the second pass.
        """
        sign, known, flips, comparisons, (conflicts, pairs), sums = torch.split(self.rows, 2)
        grads = torch.stack([g_task, g_smooth])
        exists = ~grads.isnan()
        grads = grads.nan_to_num(0.0)
        new_sign = torch.where(grads == 0, sign, grads.sign())
        is_compared = exists & (known > 0)
        comparisons += is_compared
        flips += is_compared & (new_sign != sign)
        sign.copy_(new_sign)
        known.copy_(exists & (new_sign != 0))
        is_pair = (known > 0).all(dim=0)
        pairs += is_pair
        conflicts += is_pair & (new_sign[0] != new_sign[1])
        sums += grads

    def statistics(self) -> WindowStatistics:
        """The statistics of the steps counted so far."""
        _, _, flips, comparisons, (conflicts, pairs), sums = torch.split(self.rows, 2)
        disorder_task, disorder_smooth = flips / comparisons  # 0/0 is NaN: nothing was compared.
        are_opposed = sums[0].sign() * sums[1].sign() < 0
        opposition = torch.where(pairs > 0, are_opposed.to(pairs.dtype), torch.nan)
        return WindowStatistics(disorder_task, disorder_smooth, conflicts / pairs, opposition)

    def reset(self) -> None:
        """Begin the next window. The signs of the last step stay: the next step is compared with them."""
        self.rows[4:].zero_()
