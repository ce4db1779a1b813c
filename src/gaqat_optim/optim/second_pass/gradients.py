"""The two gradients of a step: keep the first, perturb and restore the parameters, combine both."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..freezing import FreezeTarget
from ..perturbations import SAGM, GradientPerturbation, Perturbation, is_plain_pair
from ..scale_tracker import ScaleTracker
from ..validation import check_radii
from ..wrapper import has_setting

Gradients = Mapping[Parameter, Tensor]


class Radius(NamedTuple):
    """How far a parameter is perturbed, and in which direction."""

    rho: float
    sign: int  # -1 in a group that maximizes


def radii_of(base: torch.optim.Optimizer, perturbation: Perturbation, tracker: ScaleTracker) -> dict[Parameter, Radius]:
    """The radius of every parameter of ``base`` that is perturbed; those of a group with ``"rho"`` 0 are not.

    A ``"rho"`` that is a setting of the base, such as Adadelta's decay, is no radius. Most bases have ``maximize`` in
    their groups, some as an attribute.
    """
    check_radii(base)
    radii: dict[Parameter, Radius] = {}
    unperturbed = set() if perturbation.perturbs_scales else set(tracker.scales.values())
    groups_have_radii, groups_maximize = not has_setting(base, "rho"), has_setting(base, "maximize")
    for group in base.param_groups:
        if groups_have_radii and group.get("rho") == 0:
            continue
        rho = group.get("rho", perturbation.rho) if groups_have_radii else perturbation.rho
        maximizes = group.get("maximize", False) if groups_maximize else getattr(base, "maximize", False)
        radii.update({p: Radius(rho, -1 if maximizes else 1) for p in group["params"] if p not in unperturbed})
    return radii


# Elements of a parameter from which on giving it other memory takes less time than copying it.
_LARGE = 2**14

# How many objects hold a storage: no public function of torch tells, and CPU builds of older versions have none.
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def first_gradients(grads: Mapping[Parameter, Tensor | None]) -> dict[Parameter, Tensor]:
    """The gradients of the first pass, in memory that the second backward does not write.

    A replayed CUDA graph writes its gradients to the same memory every time, and so does DistributedDataParallel with
    the buckets that ``.grad`` are views of. Such a gradient is copied: something else holds its memory too.
    """
    return {p: g.clone() if _shares_memory(g) else g for p, g in grads.items() if g is not None}


def _shares_memory(t: Tensor) -> bool:
    """Whether something else than ``t`` holds its memory, as far as can be told.

    Two objects hold the memory of a gradient that backward() has just made: ``t`` and, in this function, ``storage``.
    For a view of a bucket the count is 3 or more: the bucket holds the memory too.
    """
    if type(t) not in (Tensor, Parameter) or t.layout != torch.strided:
        return t._base is not None
    if _use_count is None:
        return True
    storage = t.untyped_storage()
    return bool(_use_count(storage._cdata) > 2)


class SavedValue(NamedTuple):
    """A parameter and its value from before it was perturbed."""

    parameter: Parameter
    value: Tensor
    is_in_own_memory: bool  # The value is where it was, and the parameter has been given other memory.


def _save(p: Parameter, saved_values: list[SavedValue]) -> None:
    """Append the value of ``p``: a copy, or its memory, for which ``p`` gets new memory that is not filled yet.

    That saves two passes over memory, one of them to restore. On a CPU alone: a CUDA graph knows addresses.
    """
    if _is_alone_in_large_memory(p):
        value = p.data
        other = torch.empty_like(value)
        if other.stride() == value.stride():
            saved_values.append(SavedValue(p, value, True))  # First: an interrupt must find it.
            p.data = other
            return
    saved_values.append(SavedValue(p, p.detach().clone(), False))


def _is_alone_in_large_memory(p: Parameter) -> bool:
    """Whether ``p`` is a plain tensor of a CPU whose memory nothing else reads, and worth more than its bookkeeping."""
    if not (type(p) is Parameter and p.is_cpu and p.dtype in (torch.float32, torch.float64)):
        return False
    return p.numel() >= _LARGE and not _shares_memory(p) and not p.is_shared()  # type: ignore[no-untyped-call]


@torch.no_grad()
def perturb_parameters(
    perturbation: Perturbation,
    radii: Mapping[Parameter, Radius],
    grads: Gradients,
    grad_scale: float | Tensor,
    names: Mapping[Parameter, str],
    saved_values: list[SavedValue],
) -> None:
    """Move the parameters of ``radii`` to where the second pass looks, and append their values to ``saved_values``."""
    if not radii:
        return
    params = list(radii)
    rhos = [radius.rho for radius in radii.values()]
    signs = [radius.sign for radius in radii.values()]
    param_names = [names.get(p, "") for p in params]
    arguments = [grads[p] for p in params], rhos, grad_scale, param_names
    own_direction = GradientPerturbation.direction
    if isinstance(perturbation, GradientPerturbation) and type(perturbation).direction is own_direction:
        for p in params:
            _save(p, saved_values)
        perturbation.add_direction(params, [saved.value for saved in saved_values], signs, *arguments)
    else:  # a user's own
        deltas = perturbation.direction(params, *arguments)
        deltas.reverse()
        for p, sign in zip(params, signs, strict=True):
            delta = deltas.pop()  # Freed when the copy of p is made: both together are one copy of the model.
            saved_values.append(SavedValue(p, p.detach().clone(), False))
            p.add_(delta, alpha=sign)
    torch.clear_autocast_cache()


@torch.no_grad()
def restore(saved_values: list[SavedValue]) -> None:
    """Restore parameters to the bit; the second call does nothing."""
    if not saved_values:
        return
    for p, value, is_in_own_memory in saved_values:
        if is_in_own_memory and not _shares_memory(p):
            p.data = value
            torch.autograd.graph.increment_version(p)
        else:  # Or something has come to hold the memory that p was given: it sees the value too.
            p.copy_(value)
    saved_values.clear()
    torch.clear_autocast_cache()


@contextmanager
def release_task_gradients(g_task: dict[Parameter, Tensor], params: Iterable[Parameter]) -> Iterator[None]:
    """Within the block (the second backward), free the g_task of each of ``params`` when its g_smooth is there.

    The step of SAM does not use g_task. It so never holds two gradients of all parameters at once.
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
    """Write the combined gradients, without their frozen parts, to ``.grad``.

    A parameter with a gradient in one pass only uses the one that it has.
    """
    shared = [p for p in g_task if p in g_smooth]
    task = tracker.mask_frozen("task", shared, [g_task[p] for p in shared])
    smooth = tracker.mask_frozen("smooth", shared, [g_smooth[p] for p in shared])
    is_mean = type(perturbation).combine is SAGM.combine and _can_be_overwritten(task, smooth)
    combined = _write_mean(task, smooth) if is_mean else perturbation.combine(task, smooth)
    for p, g in zip(shared, combined, strict=True):
        if g_smooth[p]._base is not None:  # .grad stays a view of DistributedDataParallel's bucket.
            g_smooth[p].copy_(g)
        elif g is not g_smooth[p]:
            p.grad = g
    parts: tuple[tuple[FreezeTarget, Gradients, Gradients], ...]
    parts = ("task", g_task, g_smooth), ("smooth", g_smooth, g_task)
    for part, grads, other_grads in parts:
        single = {p: g for p, g in grads.items() if p not in other_grads}
        for p, g in zip(single, tracker.mask_frozen(part, list(single), list(single.values())), strict=True):
            p.grad = g


def _can_be_overwritten(task: Sequence[Tensor], smooth: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors of a CPU, and those of ``smooth`` different ones."""
    return 0 < len(smooth) == len(set(map(id, smooth))) and all(map(is_plain_pair, task, smooth))


def _write_mean(task: Sequence[Tensor], smooth: Sequence[Tensor]) -> list[Tensor]:
    """Write the mean of both gradients, the bits of SAGM's ``combine``, to ``smooth``.

    A new copy of the model would be memory whose pages the system makes anew in each step, unless they are kept.
    """
    means = list(smooth)
    torch._foreach_add_(means, list(task))
    torch._foreach_mul_(means, 0.5)
    return means


def gradient_versions(params: Iterable[Parameter]) -> list[tuple[weakref.ref[Tensor], int] | None]:
    """For each parameter, a weak reference to its ``.grad`` and the version of that tensor; ``None`` without one."""
    return [None if p.grad is None else (weakref.ref(p.grad), p.grad._version) for p in params]


def gradients_changed(params: Iterable[Parameter], versions: list[tuple[weakref.ref[Tensor], int] | None]) -> bool:
    """Whether a ``.grad`` is another tensor, or was written to, since :func:`gradient_versions`.

    torch adds 1 to a tensor's version at each write in place. Say ``.grad`` is tensor a at version 0: ``backward()``
    makes it a at version 1; ``zero_grad()`` and ``backward()`` make it another tensor b. Still a at version 0, nothing
    was computed. Values would not tell: a new gradient may equal the old one.
    """
    for p, version in zip(params, versions, strict=True):
        if p.grad is None or version is None:
            if p.grad is not None or version is not None:
                return True
        elif p.grad is not version[0]() or p.grad._version != version[1]:
            return True
    return False
