"""What a second pass does to parameters and gradients: displace, restore, combine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .checks import check_radii, is_of_base
from .monitor import ScaleMonitor
from .perturbations import Perturbation

Gradients = Mapping[Parameter, Tensor]


@dataclass(frozen=True)
class Reach:
    """How far a parameter is displaced: by radius ``rho``, downhill if its group maximizes."""

    rho: float
    maximizes: bool


def reaches(
    base: torch.optim.Optimizer, perturbation: Perturbation, monitor: ScaleMonitor
) -> dict[Parameter, Reach | None]:
    """The reach of every parameter of ``base``; ``None`` if it stays, as in a group that sets its ``"rho"`` to 0.

    A ``"rho"`` that is the base's own, such as Adadelta's decay, is no radius. Whether the base maximizes, its own
    setting in the groups says or, of some bases, an attribute.

    Raises:
        ValueError: the ``"rho"`` of a group is no radius.
    """
    check_radii(base)
    found: dict[Parameter, Reach | None] = {}
    stay = set() if perturbation.displaces_scales else set(monitor.scales.values())
    has_radii, has_maximize = not is_of_base(base, "rho"), is_of_base(base, "maximize")
    for group in base.param_groups:
        rho = group.get("rho", perturbation.rho) if has_radii else perturbation.rho
        maximizes = group.get("maximize", False) if has_maximize else getattr(base, "maximize", False)
        reach = None if rho == 0 and has_radii and "rho" in group else Reach(rho, bool(maximizes))
        found.update({p: None if p in stay else reach for p in group["params"]})
    return found


@torch.no_grad()
def displace(
    perturbation: Perturbation,
    reach: Mapping[Parameter, Reach],
    grads: Gradients,
    grad_scale: float | Tensor,
    names: Mapping[Parameter, str],
) -> None:
    """Move the parameters of ``reach`` to where the second pass looks."""
    if not reach:
        return
    params = list(reach)
    rhos = [r.rho for r in reach.values()]
    named = [names.get(p, "") for p in params]
    displacements = perturbation.direction(params, [grads[p] for p in params], rhos, grad_scale, named)
    for (p, r), displacement in zip(reach.items(), displacements, strict=True):
        p.add_(displacement, alpha=-1 if r.maximizes else 1)


@torch.no_grad()
def combine(perturbation: Perturbation, monitor: ScaleMonitor, g_task: Gradients, g_smooth: Gradients) -> None:
    """Write the combined gradients, frozen parts left out, to ``.grad``.

    A parameter with a gradient in one pass only uses the one that it has.
    """
    both = [p for p in g_task if p in g_smooth]
    task = monitor.without_frozen("task", both, [g_task[p] for p in both])
    smooth = monitor.without_frozen("smooth", both, [g_smooth[p] for p in both])
    for p, g in zip(both, perturbation.combine(task, smooth), strict=True):
        if g_smooth[p]._base is not None:  # DistributedDataParallel's buckets stay what .grad is a view of.
            g_smooth[p].copy_(g)
        elif g is not g_smooth[p]:
            p.grad = g
    first = [p for p in g_task if p not in g_smooth]
    second = [p for p in g_smooth if p not in g_task]
    for p, g in zip(first, monitor.without_frozen("task", first, [g_task[p] for p in first]), strict=True):
        p.grad = g
    for p, g in zip(second, monitor.without_frozen("smooth", second, [g_smooth[p] for p in second]), strict=True):
        p.grad = g
