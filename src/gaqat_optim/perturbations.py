"""Sharpness-aware perturbations: where the second pass looks, and how the two gradients make one.

A perturbation is a frozen dataclass of two pure functions. ``direction`` gives the displacement of each parameter for
the second pass; ``combine`` merges the gradient at the start (``g_task``) with the one at the displaced point
(``g_smooth``). Neither changes its arguments, synchronises with the device, or knows of scales and freezing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class Perturbation(Protocol):
    """What :class:`GAQATOptimizer` asks of a perturbation."""

    @property
    def rho(self) -> float:
        """Radius of the ascent for parameter groups that set no ``"rho"`` of their own."""

    @property
    def has_task_part(self) -> bool:
        """Whether ``g_task`` enters the combined gradient, so that freezing it has an effect."""

    def direction(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], rhos: Sequence[float], grad_scale: float | Tensor
    ) -> list[Tensor]:
        """Displacement of each parameter, in its shape and dtype.

        Args:
            params: the parameters, as they are.
            grads: their gradients at the start, multiplied by ``grad_scale``.
            rhos: the radius for each.
            grad_scale: the loss scale; every formula is meant for gradients divided by it.
        """

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        """The gradient for the base optimizer, one tensor for each pair."""


@dataclass(frozen=True)
class SAM:
    r"""Sharpness-aware minimisation: descend by the gradient at the worst point within a radius.

    .. math::
        \epsilon = \frac{\rho}{\lVert g_{task} \rVert} g_{task}, \qquad g = g_{smooth} = \nabla L(\theta + \epsilon)

    with one norm over all parameters. ``g_task`` is no part of the step, so freezing it alone would do nothing.

    Args:
        rho: radius of the ascent, in units of the parameters; at least 0.

    Raises:
        ValueError: ``rho`` is negative or not finite.

    Example:
        >>> SAM(rho=0.5).direction([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [0.5], 1.0)
        [tensor([0.3000, 0.4000])]

    Reference: Foret et al., *Sharpness-Aware Minimization*, arXiv 2010.01412.
    """

    rho: float = 0.05
    has_task_part: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_non_negative("SAM", "rho", self.rho)

    def direction(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], rhos: Sequence[float], grad_scale: float | Tensor
    ) -> list[Tensor]:
        return _ascent(grads, rhos, 0.0, grad_scale)

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        return list(g_smooth)


@dataclass(frozen=True)
class SAGM:
    r"""Sharpness-aware gradient matching: descend by the mean of both gradients.

    .. math::
        \epsilon = \Bigl(\frac{\rho}{\lVert g_{task} \rVert} - \alpha\Bigr) g_{task}, \qquad
        g = \tfrac12 (g_{task} + g_{smooth}), \qquad g_{smooth} = \nabla L(\theta + \epsilon)

    The paper writes a sum, its released code takes the mean. Under Adam that is the same; under SGD it halves the
    learning rate.

    Args:
        rho: radius of the ascent. The knob that matters, and it depends on the network: 0.05 is published for
            ResNet-50, while a network of 80,000 parameters did best at 0.5 to 1.
        alpha: weight of the gradient matching; at least 0. Where the norm exceeds ``rho / alpha`` the displacement
            goes downhill.

    Raises:
        ValueError: ``rho`` or ``alpha`` is negative or not finite.

    Example:
        >>> sagm = SAGM(rho=0.5, alpha=0.02)
        >>> sagm.direction([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [0.5], 1.0)
        [tensor([0.2400, 0.3200])]
        >>> sagm.combine([torch.tensor([1.0])], [torch.tensor([3.0])])
        [tensor([2.])]

    Reference: Wang et al., *Sharpness-Aware Gradient Matching for Domain Generalization*, CVPR 2023.
    """

    rho: float = 0.05
    alpha: float = 1e-3
    has_task_part: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_non_negative("SAGM", "rho", self.rho)
        _check_non_negative("SAGM", "alpha", self.alpha)

    def direction(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], rhos: Sequence[float], grad_scale: float | Tensor
    ) -> list[Tensor]:
        return _ascent(grads, rhos, self.alpha, grad_scale)

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        return [torch.add(task, smooth).mul_(0.5) for task, smooth in zip(g_task, g_smooth, strict=True)]


def _check_non_negative(owner: str, name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{owner}: {name} must be a finite number >= 0, got {value!r}")


def _ascent(grads: Sequence[Tensor], rhos: Sequence[float], alpha: float, grad_scale: float | Tensor) -> list[Tensor]:
    """(rho/(norm + 1e-12) - alpha) * g for true gradients g; zero where their norm is not finite."""
    norm = get_total_norm(grads) / grad_scale
    finite = torch.isfinite(norm)
    displacements = []
    for g, rho in zip(grads, rhos, strict=True):
        factor = ((rho / (norm + 1e-12) - alpha) / grad_scale).to(g.device)
        dtype = torch.promote_types(g.dtype, torch.float32)  # A factor rounded to half precision may be zero.
        displacements.append(torch.where(finite.to(g.device), g.to(dtype) * factor, 0.0).to(g.dtype))
    return displacements
