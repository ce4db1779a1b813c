"""The GAQAT step as the paper has it, in plain loops, for readers and as a judge in the tests.

:class:`~gaqat_optim.GAQATOptimizer` computes the same. It adds what training loops need: any perturbation and policy,
accumulated and scaled gradients, several devices and ranks, BatchNorm, recovery from errors, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.parameter import Parameter


class ReferenceGAQAT:
    """SAGM around ``base``, without the task gradient of those ``scales`` where it keeps its sign.

    Args:
        base: the optimizer that moves the parameters.
        scales: the scales among its parameters.
        rho: radius of the perturbation.
        alpha: weight of SAGM's gradient matching.
        window: number of steps between two judgements.
        threshold: disorder of the task gradient below which it is frozen.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        scales: Iterable[Parameter],
        *,
        rho: float = 0.05,
        alpha: float = 1e-3,
        window: int = 100,
        threshold: float = 0.3,
    ) -> None:
        self.base, self.rho, self.alpha, self.window, self.threshold = base, rho, alpha, window, threshold
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.sign = {s: torch.zeros_like(s) for s in scales}  # of the task gradient, one step ago
        self.flips = {s: torch.zeros_like(s) for s in self.sign}
        self.comparisons = {s: torch.zeros_like(s) for s in self.sign}
        self.frozen = {s: torch.zeros_like(s, dtype=torch.bool) for s in self.sign}
        self.steps = 0

    def step(self, loss_of: Callable[[], Tensor]) -> Tensor:
        """One step on the loss that ``loss_of`` computes; returns that loss."""
        # Two gradients: at the parameters, and at the point to which the first one leads uphill.
        loss = loss_of()
        g_task = torch.autograd.grad(loss, self.params)
        norm = torch.sqrt(sum((g.square().sum() for g in g_task), torch.zeros(())))
        theta = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, g in zip(self.params, g_task, strict=True):
                p += (self.rho / (norm + 1e-12) - self.alpha) * g
        g_smooth = torch.autograd.grad(loss_of(), self.params)
        with torch.no_grad():
            for p, value in zip(self.params, theta, strict=True):
                p.copy_(value)

        # The base's step on their mean. A frozen scale has only the half that comes from flatness.
        for p, task, smooth in zip(self.params, g_task, g_smooth, strict=True):
            frozen = self.frozen.get(p, torch.zeros((), dtype=torch.bool))
            p.grad = (task.masked_fill(frozen, 0.0) + smooth) / 2
        self.base.step()

        # Disorder: how often the sign of a scale's task gradient is not that of the step before.
        for p, task in zip(self.params, g_task, strict=True):
            if p in self.sign:
                sign = torch.where(task == 0, self.sign[p], task.sign())
                known = self.sign[p] != 0
                self.flips[p] += known & (sign != self.sign[p])
                self.comparisons[p] += known
                self.sign[p] = sign

        # At the end of a window: freeze where disorder is low, unfreeze the rest.
        self.steps += 1
        if self.steps % self.window == 0:
            for s in self.sign:
                self.frozen[s] = self.flips[s] / self.comparisons[s] < self.threshold
                self.flips[s].zero_()
                self.comparisons[s].zero_()
        return loss.detach()
