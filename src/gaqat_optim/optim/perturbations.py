"""Sharpness-aware perturbations: where the second pass looks, and how the two gradients make one.

A perturbation is a frozen dataclass of two pure functions. ``direction`` gives the displacement of each parameter for
the second pass; ``combine`` merges the gradient at the start (``g_task``) with the one at the displaced point
(``g_smooth``). Neither changes its arguments, synchronises with the device, or knows of scales and freezing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .dtensor import inner_product, total_norm


class Perturbation(Protocol):
    """What :class:`GAQATOptimizer` asks of a perturbation."""

    @property
    def rho(self) -> float:
        """Radius of the ascent for parameter groups that set no ``"rho"`` of their own."""

    @property
    def task_weight(self) -> float | None:
        """What ``g_task`` weighs in the combined gradient relative to ``g_smooth``, as far as it is a constant.

        0 where the step does not use ``g_task`` at all, so that freezing it would have no effect; ``None`` where the
        weight depends on the gradients.
        """

    @property
    def displaces_scales(self) -> bool:
        """Whether scales take part in the displacement."""

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> list[Tensor]:
        """Displacement of each parameter, in its shape and dtype.

        Args:
            params: the parameters, as they are.
            grads: their gradients at the start, multiplied by ``grad_scale``.
            rhos: the radius for each.
            grad_scale: the loss scale; every formula is meant for gradients divided by it.
            names: the qualified name of each in the model; empty for one that is no parameter of it.
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
        >>> SAM(rho=0.5).direction([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [0.5], 1.0, ["weight"])
        [tensor([0.3000, 0.4000])]

    Reference: Foret et al., *Sharpness-Aware Minimization*, arXiv 2010.01412.
    """

    rho: float = 0.05
    task_weight: ClassVar[float | None] = 0.0
    displaces_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_non_negative("SAM", "rho", self.rho)

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
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
        >>> sagm.direction([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [0.5], 1.0, ["weight"])
        [tensor([0.2400, 0.3200])]
        >>> sagm.combine([torch.tensor([1.0])], [torch.tensor([3.0])])
        [tensor([2.])]

    Reference: Wang et al., *Sharpness-Aware Gradient Matching for Domain Generalization*, CVPR 2023.
    """

    rho: float = 0.05
    alpha: float = 1e-3
    task_weight: ClassVar[float | None] = 1.0
    displaces_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_non_negative("SAGM", "rho", self.rho)
        _check_non_negative("SAGM", "alpha", self.alpha)

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> list[Tensor]:
        return _ascent(grads, rhos, self.alpha, grad_scale)

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        return [_mean(task, smooth) for task, smooth in zip(g_task, g_smooth, strict=True)]


@dataclass(frozen=True)
class ASAM:
    r"""Adaptive sharpness-aware minimisation: the radius is measured relative to each weight.

    .. math::
        \epsilon = \rho \frac{T^2 g_{task}}{\lVert T g_{task} \rVert}, \qquad g = g_{smooth}, \qquad
        T = \begin{cases} |\theta| + \eta & \text{weights} \\ 1 & \text{all else} \end{cases}

    element by element, so that rescaling a layer does not change how sharp the minimum looks. As in the authors' code,
    a weight is a parameter with "weight" in its name; here in the last component of it: ``fc.weight``,
    ``attention.in_proj_weight``. Scales of quantizers are not displaced: they are no weights, and a log-scale has no
    size that would mean anything.

    Args:
        rho: relative radius of the ascent; about ten times that of :class:`SAM`.
        eta: added to the size of every weight, so that small ones are displaced too.

    Raises:
        ValueError: ``rho`` or ``eta`` is negative or not finite.

    Example:
        >>> w, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
        >>> ASAM(rho=1.0, eta=0.0).direction([w], [g], [1.0], 1.0, ["fc.weight"])
        [tensor([0.6000, 1.6000])]

    Reference: Kwon et al., *ASAM*, arXiv 2102.11600.
    """

    rho: float = 0.5
    eta: float = 0.01
    task_weight: ClassVar[float | None] = 0.0
    displaces_scales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_non_negative("ASAM", "rho", self.rho)
        _check_non_negative("ASAM", "eta", self.eta)

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> list[Tensor]:
        # One parameter after the other, so that none of this is ever there for all of them.
        each = list(zip(params, grads, names, strict=True))
        norm = total_norm([total_norm([self._adapted(g, p, name, 1)]) for p, g, name in each])
        adapted = (self._adapted(g, p, name, 2) for p, g, name in each)
        return [d.to(p.dtype) for p, d in zip(params, _along(adapted, norm, rhos, 0.0, grad_scale), strict=True)]

    def _adapted(self, g: Tensor, p: Tensor, name: str, power: int) -> Tensor:
        """T to the ``power``, times ``g``."""
        return g * (_at_least_float32(p.detach()).abs() + self.eta) ** power if _is_weight(name) else g

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        return list(g_smooth)


@dataclass(frozen=True)
class GSAM:
    r"""Surrogate-gap sharpness-aware minimisation: descend by ``g_smooth``, and close the gap to the loss itself.

    .. math::
        \epsilon = \frac{\rho}{\lVert g_{task} \rVert} g_{task}, \qquad
        g = g_{smooth} - \alpha \Bigl(g_{task} -
            \frac{\langle g_{task}, g_{smooth} \rangle}{\lVert g_{smooth} \rVert^2} g_{smooth}\Bigr)

    The part of ``g_task`` orthogonal to ``g_smooth`` is ascended: that lowers the difference between the loss at the
    displaced point and the loss, and leaves the former as it is, to first order. Frozen parts are left out before.

    Args:
        rho: radius of the ascent, in units of the parameters; at least 0.
        alpha: weight of the orthogonal part; at least 0.

    Raises:
        ValueError: ``rho`` or ``alpha`` is negative or not finite.

    Example:
        >>> GSAM(alpha=0.5).combine([torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 4.0])])
        [tensor([-0.5000,  4.0000])]

    Reference: Zhuang et al., *Surrogate Gap Minimization Improves Sharpness-Aware Training*, arXiv 2203.08065.
    """

    rho: float = 0.05
    alpha: float = 0.4
    task_weight: ClassVar[float | None] = None
    displaces_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_non_negative("GSAM", "rho", self.rho)
        _check_non_negative("GSAM", "alpha", self.alpha)

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> list[Tensor]:
        return _ascent(grads, rhos, 0.0, grad_scale)

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        if not g_smooth:
            return []
        squared = inner_product(g_smooth, g_smooth)
        # A zero g_smooth has no direction: all of g_task is orthogonal to it.
        along = torch.where(squared > 0, inner_product(g_task, g_smooth) / squared, 0.0)
        weight = 1 + self.alpha * along
        return [
            (_at_least_float32(s) * weight.to(s.device)).sub_(t, alpha=self.alpha).to(s.dtype)
            for t, s in zip(g_task, g_smooth, strict=True)
        ]


def _at_least_float32(t: Tensor) -> Tensor:
    """Half precision overflows in sums of large gradients and loses small factors."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(_at_least_float32(a), _at_least_float32(b)).mul_(0.5).to(a.dtype)


def _is_weight(name: str) -> bool:
    return "weight" in name.rpartition(".")[2]


def _check_non_negative(owner: str, name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{owner}: {name} must be a finite number >= 0, got {value!r}")


def _ascent(grads: Sequence[Tensor], rhos: Sequence[float], alpha: float, grad_scale: float | Tensor) -> list[Tensor]:
    """(rho/(norm + 1e-12) - alpha) * g for true gradients g; zero where their norm is not finite."""
    return list(_along(grads, total_norm(grads), rhos, alpha, grad_scale))


def _along(
    directions: Iterable[Tensor], norm: Tensor, rhos: Sequence[float], alpha: float, grad_scale: float | Tensor
) -> Iterator[Tensor]:
    """(rho/(norm + 1e-12) - alpha) * direction, for a true norm and true directions; zero if the norm is not finite."""
    norm = norm / grad_scale
    finite = torch.isfinite(norm)
    # On a CPU the answer is there; to ask another device for it would be to wait for it.
    known_finite = norm.device.type == "cpu" and bool(finite)
    factors: dict[tuple[float, torch.device], Tensor] = {}
    for direction, rho in zip(directions, rhos, strict=True):
        device = direction.device
        if (rho, device) not in factors:
            factors[rho, device] = ((rho / (norm + 1e-12) - alpha) / grad_scale).to(device)
        # A factor rounded to half precision may be zero.
        displacement = _at_least_float32(direction) * factors[rho, device]
        if not known_finite:
            displacement = torch.where(finite.to(device), displacement, 0.0)
        yield displacement.to(direction.dtype)
