"""Sharpness-aware perturbations: where the second pass looks, and how the two gradients make one.

A perturbation is a frozen dataclass with two pure functions. ``direction`` perturbs each parameter for the second pass;
``combine`` merges the gradient at the parameters (``g_task``) with the one at the perturbed parameters (``g_smooth``).
Neither changes its arguments, waits for the device, or knows of scales and freezing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from .dtensor import inner_product, total_norm


class Perturbation(Protocol):
    """What :class:`GAQATOptimizer` asks of a perturbation."""

    @property
    def rho(self) -> float:
        """Radius of the perturbation for parameter groups that set no ``"rho"`` of their own."""

    @property
    def task_weight(self) -> float | None:
        """Weight of ``g_task`` in the combined gradient relative to ``g_smooth``; ``None`` if it is no constant.

        0 says that the step does not use ``g_task``, so that freezing it would have no effect.
        """

    @property
    def perturbs_scales(self) -> bool:
        """Whether scales are perturbed too."""

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> list[Tensor]:
        """The tensor to add to each parameter for the second pass, in its shape and dtype.

        Args:
            params: the parameters as they are.
            grads: their gradients, multiplied by ``grad_scale``.
            rhos: the radius for each.
            grad_scale: the loss scale; every formula is meant for gradients divided by it.
            names: the qualified name of each in the model; empty for a parameter that the model does not have.
        """

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        """The gradient for the base optimizer, one tensor for each pair."""


@dataclass(frozen=True)
class GradientPerturbation:
    """What all methods here share: a step of length ``rho`` along the gradient, and the descent by ``g_smooth``."""

    rho: float = 0.05
    task_weight: ClassVar[float | None] = 0.0
    perturbs_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{type(self).__name__}: {f.name} must be a finite number >= 0, got {value!r}")

    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> list[Tensor]:
        steps = self._steps(params, grads, rhos, grad_scale, names)
        return [_product(*step).to(p.dtype) for p, step in zip(params, steps, strict=True)]

    def add_direction(
        self, params: Sequence[Tensor], values: Sequence[Tensor], signs: Sequence[int], *arguments: Any
    ) -> None:
        """Write ``values`` plus their :meth:`direction`, times ``signs``, to ``params``: the same bits, one by one.

        ``params`` have these ``values``; those of a plain tensor on a CPU may be missing. ``arguments`` are the other
        ones of :meth:`direction`. ``addcmul`` adds ``(factor * direction) * one``: a pass over memory less. A processor
        may fuse that last product with the sum, or round it: either way it is ``factor * direction``, rounded once.
        """
        one = torch.ones((), device="cpu")
        steps = self._steps(values, *arguments)
        for p, value, sign, (direction, factor, is_finite) in zip(params, values, signs, steps, strict=True):
            if is_finite is None and is_plain_pair(value, direction):
                torch.addcmul(value, direction, one, value=sign * factor.item(), out=p)
                continue
            delta = _product(direction, factor, is_finite).to(p.dtype)
            if is_plain_pair(value, delta):
                torch.add(value, delta, alpha=sign, out=p)
            else:
                p.add_(delta, alpha=sign)

    def _steps(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        grad_scale: float | Tensor,
        names: Sequence[str],
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """For each parameter the arguments of :func:`_product`, which makes its direction."""
        norm, directions = self._norm_and_directions(params, grads, names)
        norm = norm / grad_scale
        is_finite = torch.isfinite(norm)
        # Only a CPU answers this without a wait.
        known_finite = norm.device.type == "cpu" and bool(is_finite)
        factors: dict[tuple[float, torch.device], Tensor] = {}
        for direction, rho in zip(directions, rhos, strict=True):
            device = direction.device
            if (rho, device) not in factors:
                factors[rho, device] = (self._step_size(rho, norm) / grad_scale).to(device)
            yield direction, factors[rho, device], None if known_finite else is_finite.to(device)

    def _norm_and_directions(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], names: Sequence[str]
    ) -> tuple[Tensor, Iterable[Tensor]]:
        """The norm that the radius is relative to, and a direction for each parameter, both times ``grad_scale``."""
        return total_norm(grads), grads

    def _step_size(self, rho: float, norm: Tensor) -> Tensor:
        """The factor by which a direction is multiplied."""
        return rho / (norm + 1e-12)

    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        return list(g_smooth)


@dataclass(frozen=True)
class SAM(GradientPerturbation):
    r"""Sharpness-aware minimization: descend by the gradient at the worst point within a radius.

    .. math::
        \epsilon = \frac{\rho}{\lVert g_{task} \rVert} g_{task}, \qquad g = g_{smooth} = \nabla L(\theta + \epsilon)

    with one norm over all parameters. ``g_task`` is no part of the step, so freezing it alone would do nothing.

    Args:
        rho: radius of the perturbation, in units of the parameters; at least 0.

    Raises:
        ValueError: ``rho`` is negative or not finite.

    Example:
        >>> SAM(rho=0.5).direction([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [0.5], 1.0, ["weight"])
        [tensor([0.3000, 0.4000])]

    Reference: Foret et al., *Sharpness-Aware Minimization*, arXiv 2010.01412.
    """


@dataclass(frozen=True)
class SAGM(GradientPerturbation):
    r"""Sharpness-aware gradient matching: descend by the mean of both gradients.

    .. math::
        \epsilon = \Bigl(\frac{\rho}{\lVert g_{task} \rVert} - \alpha\Bigr) g_{task}, \qquad
        g = \tfrac12 (g_{task} + g_{smooth}), \qquad g_{smooth} = \nabla L(\theta + \epsilon)

    The paper writes a sum, its released code takes the mean. Under Adam that is the same; under SGD it halves the
    learning rate.

    Args:
        rho: radius of the perturbation. The setting that matters most, and it depends on the network: 0.05 is
            published for ResNet-50, while a network of 80,000 parameters did best at 0.5 to 1.
        alpha: weight of the gradient matching; at least 0. Where the norm exceeds ``rho / alpha`` the perturbation
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

    alpha: float = 1e-3
    task_weight: ClassVar[float | None] = 1.0

    @override
    def _step_size(self, rho: float, norm: Tensor) -> Tensor:
        return super()._step_size(rho, norm) - self.alpha

    @override
    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        return _means(g_task, g_smooth)


@dataclass(frozen=True)
class ASAM(GradientPerturbation):
    r"""Adaptive sharpness-aware minimization: the radius is measured relative to each weight.

    .. math::
        \epsilon = \rho \frac{T^2 g_{task}}{\lVert T g_{task} \rVert}, \qquad g = g_{smooth}, \qquad
        T = \begin{cases} |\theta| + \eta & \text{weights} \\ 1 & \text{all else} \end{cases}

    element by element, so that rescaling a layer does not change how sharp the minimum looks. As in the authors' code,
    a weight is a parameter with "weight" in its name; here in the last component of it: ``fc.weight``,
    ``attention.in_proj_weight``. Scales of quantizers are not perturbed: they are no weights, and the size of a
    log-scale has no meaning.

    Args:
        rho: relative radius of the perturbation; about ten times that of :class:`SAM`.
        eta: added to the size of every weight, so that small ones are perturbed too.

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
    perturbs_scales: ClassVar[bool] = False

    @override
    def _norm_and_directions(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], names: Sequence[str]
    ) -> tuple[Tensor, Iterable[Tensor]]:
        def adapted(g: Tensor, p: Tensor, name: str, power: int) -> Tensor:
            """T to the ``power``, times ``g``."""
            if "weight" not in name.rpartition(".")[2]:
                return g
            return g * (_at_least_float32(p.detach()).abs() + self.eta) ** power

        # One parameter after the other: T g of all of them would be another copy of the model.
        triples = list(zip(grads, params, names, strict=True))
        norm = total_norm([total_norm([adapted(*triple, 1)]) for triple in triples])
        return norm, (adapted(*triple, 2) for triple in triples)


@dataclass(frozen=True)
class GSAM(GradientPerturbation):
    r"""Surrogate-gap sharpness-aware minimization: descend by ``g_smooth``, and close the gap to the loss itself.

    .. math::
        \epsilon = \frac{\rho}{\lVert g_{task} \rVert} g_{task}, \qquad
        g = g_{smooth} - \alpha \Bigl(g_{task} -
            \frac{\langle g_{task}, g_{smooth} \rangle}{\lVert g_{smooth} \rVert^2} g_{smooth}\Bigr)

    The step ascends by the part of ``g_task`` orthogonal to ``g_smooth``. To first order, that brings the loss closer
    to the loss at the perturbed parameters, and leaves the latter as it is. Frozen parts are left out before.

    Args:
        rho: radius of the perturbation, in units of the parameters; at least 0.
        alpha: weight of the orthogonal part; at least 0.

    Raises:
        ValueError: ``rho`` or ``alpha`` is negative or not finite.

    Example:
        >>> GSAM(alpha=0.5).combine([torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 4.0])])
        [tensor([-0.5000,  4.0000])]

    Reference: Zhuang et al., *Surrogate Gap Minimization Improves Sharpness-Aware Training*, arXiv 2203.08065.
    """

    alpha: float = 0.4
    task_weight: ClassVar[float | None] = None

    @override
    def combine(self, g_task: Sequence[Tensor], g_smooth: Sequence[Tensor]) -> list[Tensor]:
        if not g_smooth:
            return []
        squared_norm = inner_product(g_smooth, g_smooth)
        # A zero g_smooth has no direction: all of g_task is orthogonal to it.
        projection = torch.where(squared_norm > 0, inner_product(g_task, g_smooth) / squared_norm, 0.0)
        weight = 1 + self.alpha * projection
        return [
            (_at_least_float32(s) * weight.to(s.device)).sub_(t, alpha=self.alpha).to(s.dtype)
            for t, s in zip(g_task, g_smooth, strict=True)
        ]


def _product(direction: Tensor, factor: Tensor, is_finite: Tensor | None) -> Tensor:
    """``direction`` times ``factor``, or zeros unless ``is_finite``; ``None`` says that it is."""
    # In half precision the factor itself may round to zero.
    product = _at_least_float32(direction) * factor
    return product if is_finite is None else torch.where(is_finite, product, 0.0)


def is_plain_pair(a: Tensor, b: Tensor) -> bool:
    """Whether both are tensors of a CPU of the same type, float32 or float64, and no subclass, as DTensor is."""
    is_single_or_double = a.dtype == b.dtype in (torch.float32, torch.float64)
    return is_single_or_double and a.is_cpu and b.is_cpu and type(a.data) is type(b) is Tensor


def _at_least_float32(t: Tensor) -> Tensor:
    """Half precision overflows in sums of large gradients and loses small factors."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _means(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each pair."""
    a, b = list(a), list(b)
    if a and all(type(t) is Tensor and t.dtype in (torch.float32, torch.float64) for t in a + b):
        means = torch._foreach_add(a, b)
        torch._foreach_mul_(means, 0.5)
        return list(means)
    pairs = zip(a, b, strict=True)
    return [torch.add(_at_least_float32(x), _at_least_float32(y)).mul_(0.5).to(x.dtype) for x, y in pairs]
