"""The processes of torchrun: each trains on its part of every batch, and the first one writes the files."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among those of torchrun; without torchrun the only one, and nothing here waits for anybody.

    Attributes:
        rank, world: its number, and how many there are.
    """

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world = dist.get_world_size() if ready else 1

    @property
    def part(self) -> tuple[int, int]:
        """The part of a batch that is this process's, for `endless_batches`."""
        return self.rank, self.world

    def from_first(self, value: Any) -> Any:
        """The value that the first process has."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def raise_first_error(self, error: Exception | None) -> None:
        """An error of the first process, as one on all of them."""
        error = self.from_first(error)
        if error is not None:
            raise error


def start_ranks(device: str) -> torch.device:
    """Join the processes of torchrun, if it started this one. Returns this process's device."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return torch.device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device == "cuda":
        import os

        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return torch.device(device)


def end_ranks() -> None:
    """Leave the processes of torchrun."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
