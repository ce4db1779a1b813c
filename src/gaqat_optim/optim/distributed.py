"""The ranks of DistributedDataParallel: one all-reduce for both passes, and the check that they freeze alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import Parameter

from .scale_tracker import ScaleTracker


def process_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The group over which ``model`` averages its gradients; ``None`` if it is no DistributedDataParallel."""
    return model.process_group if isinstance(model, DistributedDataParallel) else None


@torch.no_grad()
def defer_all_reduce_to_second_pass(
    params: Sequence[Parameter],
    g_task: Mapping[Parameter, Tensor],
    tracker: ScaleTracker,
    weight: float,
    group: dist.ProcessGroup | None,
) -> dict[Parameter, Tensor]:
    """Leave ``weight`` times g_task in ``.grad``, so that one all-reduce averages both gradients.

    The second backward adds to ``.grad``, and DistributedDataParallel then averages the sum. An example with two ranks
    and SAGM (weight 1): g_task is 1 and 3, g_smooth 5 and 7. ``.grad`` begins as 1 and 3, the second backward makes it
    6 and 10, the all-reduce 8: the mean g_task 2 plus the mean g_smooth 6. With zeros for g_task, SAGM's combined
    gradient is then 8 / 2, as it would be with two all-reduces. The two gradients of the scales are needed apart, and
    are few: their g_task is averaged here.

    ``params`` are in one order on all ranks of ``group``. ``g_task`` is of this rank alone; another rank may have used
    other parameters. Returns the g_task to combine after the second pass, zeros except for the scales, for the same
    parameters on all ranks.
    """
    if any(hasattr(g, "full_tensor") for g in g_task.values()):
        raise ValueError("per_rank is for DistributedDataParallel: no rank of fully_shard has a gradient of its own")
    scale_grads = tracker.gather(g_task, missing=0.0)
    is_used = torch.tensor([p in g_task for p in params], dtype=torch.float32, device=scale_grads.device)
    total = torch.cat([scale_grads, is_used])
    dist.all_reduce(total, group=group)
    means = total / dist.get_world_size(group)
    mean_scale_grads, used_share = tracker.split(means[: len(scale_grads)]), means[len(scale_grads) :]
    # A rank that has all gradients need not wait for the device to learn which ones another rank has.
    used_anywhere = [True] * len(params) if len(g_task) == len(params) else (used_share > 0).tolist()
    remainder = {}
    for p in (p for p, used in zip(params, used_anywhere, strict=True) if used):
        if p in mean_scale_grads:
            remainder[p] = mean_scale_grads[p].to(p)
        else:
            remainder[p] = torch.zeros_like(p)
            if weight and p in g_task:
                p.grad = g_task[p] * weight
    return remainder


def assert_ranks_agree(tracker: ScaleTracker, group: dist.ProcessGroup) -> None:
    """Raise on all ranks of ``group`` if their last judged windows differ: their networks would drift apart.

    The statistics are compared too, not the mask alone, which is the same everywhere if nothing is frozen.
    """
    fingerprint = tracker.fingerprint()
    extremes = torch.stack([fingerprint, -fingerprint])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    differs = (extremes[0] != -extremes[1]).any(dim=0)
    if bool(differs.any()):
        raise RuntimeError(
            f"the ranks saw different gradients of {int(differs.sum())} scale elements: they were not averaged over "
            "the ranks. Run the first pass without no_sync(), or say perturbed(per_rank=True)"
        )
