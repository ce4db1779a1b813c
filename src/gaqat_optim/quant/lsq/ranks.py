"""What all ranks of ``torch.distributed`` agree on, as the same bits on each."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest ``number`` of all ranks."""
    if not _is_distributed():
        return number
    largest = torch.tensor(float(number), device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest.item())


def mean_over_ranks(scale: Tensor) -> Tensor:
    """The mean of ``scale`` over all ranks."""
    if not _is_distributed():
        return scale
    torch.distributed.all_reduce(scale)
    return scale / torch.distributed.get_world_size()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
