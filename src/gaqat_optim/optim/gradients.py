"""What a second pass does to parameters and gradients: displace, restore, combine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .perturbations import Perturbation
from .scale_tracker import ScaleTracker
from .validation import check_radii, is_of_base

Gradients = Mapping[Parameter, Tensor]


@dataclass(frozen=True)
class Radius:
    """How far a parameter is displaced: by radius ``rho``, downhill if its group maximizes."""

    rho: float
    maximizes: bool


def radii_of(
    base: torch.optim.Optimizer, perturbation: Perturbation, tracker: ScaleTracker
) -> dict[Parameter, Radius | None]:
    """The reach of every parameter of ``base``; ``None`` if it stays, as in a group that sets its ``"rho"`` to 0.

    A ``"rho"`` that is the base's own, such as Adadelta's decay, is no radius. Whether the base maximizes, its own
    setting in the groups says or, of some bases, an attribute.

    Raises:
        ValueError: the ``"rho"`` of a group is no radius.
    """
    check_radii(base)
    found: dict[Parameter, Radius | None] = {}
    stay = set() if perturbation.displaces_scales else set(tracker.scales.values())
    has_radii, has_maximize = not is_of_base(base, "rho"), is_of_base(base, "maximize")
    for group in base.param_groups:
        rho = group.get("rho", perturbation.rho) if has_radii else perturbation.rho
        maximizes = group.get("maximize", False) if has_maximize else getattr(base, "maximize", False)
        radius = None if rho == 0 and has_radii and "rho" in group else Radius(rho, bool(maximizes))
        found.update({p: None if p in stay else radius for p in group["params"]})
    return found


# How many holders a memory has. torch has no public name for it, and CPU builds of older versions have none at all.
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def first_gradients(grads: Mapping[Parameter, Tensor | None]) -> dict[Parameter, Tensor]:
    """The gradients of the first pass, in memory that the second backward does not write.

    A captured graph or a bucket of DistributedDataParallel gives its gradients in the same memory every time: of such
    a gradient, whose memory something else holds too, this is a copy.
    """
    return {p: g.clone() if _shares_memory(g) else g for p, g in grads.items() if g is not None}


def _shares_memory(g: Tensor) -> bool:
    if type(g) is not Tensor or g.layout != torch.strided:
        return g._base is not None
    if _use_count is None:
        return True
    storage = g.untyped_storage()
    return bool(_use_count(storage._cdata) > 2)  # g and this variable are two


@torch.no_grad()
def perturb_parameters(
    perturbation: Perturbation,
    radii: Mapping[Parameter, Radius],
    grads: Gradients,
    grad_scale: float | Tensor,
    names: Mapping[Parameter, str],
    saved: list[tuple[Parameter, Tensor]],
) -> None:
    """Move the parameters of ``radii`` to where the second pass looks; ``saved`` takes up what they were."""
    if not radii:
        return
    params = list(radii)
    rhos = [r.rho for r in radii.values()]
    named = [names.get(p, "") for p in params]
    displacements = perturbation.direction(params, [grads[p] for p in params], rhos, grad_scale, named)
    displacements.reverse()
    for p, r in radii.items():
        # Each displacement goes as the copy comes: together they are never more than one copy of the model.
        displacement = displacements.pop()
        saved.append((p, p.detach().clone()))
        p.add_(displacement, alpha=-1 if r.maximizes else 1)
    torch.clear_autocast_cache()


@torch.no_grad()
def restore(saved: list[tuple[Parameter, Tensor]]) -> None:
    """Give parameters back what they were, to the bit."""
    if not saved:
        return
    for p, value in saved:
        p.copy_(value)
    saved.clear()
    torch.clear_autocast_cache()


@contextmanager
def dropped_on_arrival(g_task: dict[Parameter, Tensor], params: Iterable[Parameter]) -> Iterator[None]:
    """Within the block (the second backward), g_task of each of ``params`` goes when its other gradient is there.

    A step that does not use g_task so never holds two gradients of all parameters at once.
    """

    def drop(p: Tensor) -> None:
        g_task.pop(p, None)  # type: ignore[call-overload]

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in params]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def combine_gradients(
    perturbation: Perturbation, tracker: ScaleTracker, g_task: Gradients, g_smooth: Gradients
) -> None:
    """Write the combined gradients, frozen parts left out, to ``.grad``.

    A parameter with a gradient in one pass only uses the one that it has.
    """
    both = [p for p in g_task if p in g_smooth]
    task = tracker.mask_frozen("task", both, [g_task[p] for p in both])
    smooth = tracker.mask_frozen("smooth", both, [g_smooth[p] for p in both])
    for p, g in zip(both, perturbation.combine(task, smooth), strict=True):
        if g_smooth[p]._base is not None:  # DistributedDataParallel's buckets stay what .grad is a view of.
            g_smooth[p].copy_(g)
        elif g is not g_smooth[p]:
            p.grad = g
    first = [p for p in g_task if p not in g_smooth]
    second = [p for p in g_smooth if p not in g_task]
    for p, g in zip(first, tracker.mask_frozen("task", first, [g_task[p] for p in first]), strict=True):
        p.grad = g
    for p, g in zip(second, tracker.mask_frozen("smooth", second, [g_smooth[p] for p in second]), strict=True):
        p.grad = g
