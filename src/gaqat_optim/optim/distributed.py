"""What the ranks of DistributedDataParallel have to agree on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import Parameter

from .scale_tracker import ScaleTracker


def process_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The group over which ``model`` averages its gradients; ``None`` if it is no DistributedDataParallel."""
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean of ``values`` over the ranks of ``group`` (``None``: all), the same bits on each."""
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@torch.no_grad()
def defer_all_reduce_to_second_pass(
    params: Iterable[Parameter],
    g_task: Mapping[Parameter, Tensor],
    tracker: ScaleTracker,
    weight: float,
    group: dist.ProcessGroup | None,
) -> dict[Parameter, Tensor]:
    """Leave ``g_task`` in ``.grad``: the second backward adds to it, and then averages both over the ranks at once.

    Args:
        params: the parameters that may have a gradient, in one order on all ranks.
        g_task: the gradients of this rank alone. Another one may have used other parameters.
        tracker: the scales; their gradients are few and needed apart, and are averaged here.
        weight: what g_task weighs relative to the gradient of the second pass.
        group: the ranks.

    Returns:
        What is left of g_task to be combined after the second pass, on every rank for the same parameters: zeros, but
        for the scales.

    Raises:
        ValueError: the gradients are shards, which are averaged already.
    """
    if any(hasattr(g, "full_tensor") for g in g_task.values()):
        raise ValueError("per_rank is for DistributedDataParallel: no rank of fully_shard has a gradient of its own")
    params = list(params)
    values = tracker.gather(g_task, missing=0.0)
    used = torch.tensor([p in g_task for p in params], dtype=torch.float32, device=values.device)
    means = mean_over_ranks(torch.cat([values, used]), group)
    scales, used = tracker.split(means[: len(values)]), means[len(values) :]
    # Only who lacks a gradient has to ask the device whether another rank has it.
    anywhere = [True] * len(params) if len(g_task) == len(params) else (used > 0).tolist()
    left = {}
    for p in (p for p, is_used in zip(params, anywhere, strict=True) if is_used):
        if p in scales:
            left[p] = scales[p].to(p)
        else:
            left[p] = torch.zeros_like(p)
            if weight and p in g_task:
                p.grad = g_task[p] * weight
    return left


def assert_ranks_agree(tracker: ScaleTracker, group: dist.ProcessGroup) -> None:
    """A window must have looked the same on all ranks of ``group``, or their networks would drift apart.

    What it showed is compared, not the mask alone: a policy that freezes nothing would never disagree.

    Raises:
        RuntimeError: it has not; on every rank alike.
    """
    fingerprint = tracker.fingerprint()
    extremes = torch.stack([fingerprint, -fingerprint])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    other = (extremes[0] != -extremes[1]).any(dim=0)
    if bool(other.any()):
        raise RuntimeError(
            f"the ranks saw different gradients of {int(other.sum())} scale elements: they were not averaged over the "
            "ranks. Run the first pass without no_sync(), or say perturbed(per_rank=True)"
        )
