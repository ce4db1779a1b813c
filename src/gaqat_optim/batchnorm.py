"""Running statistics and other buffers, kept from the second pass and from failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def running_statistics_kept(model: nn.Module, buffers: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, layers in training mode normalize by batch statistics and leave the running ones untouched.

    BatchNorm layers do so with ``track_running_stats=False``: unlike momentum 0, that counts no batches and is right
    for ``momentum=None``. InstanceNorm updates whatever that flag says, and other modules may count what they like: of
    these the values are put back when the block ends in any way.

    Args:
        model: the network.
        buffers: what the block must not change; those of BatchNorm layers may be among them.
    """
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    tracked = {buffer for m in batch_norms for buffer in m.buffers(recurse=False)}
    saved = copies(buffer for buffer in buffers if buffer not in tracked)
    try:
        for module in batch_norms:
            module.track_running_stats = False
        yield
    finally:
        for module in batch_norms:
            module.track_running_stats = True
        put_back(saved)


def copies(buffers: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each of ``buffers`` with a copy of its value."""
    return [(buffer, buffer.clone()) for buffer in buffers]


@torch.no_grad()
def put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    """Undo whatever happened to the buffers since :func:`copies`."""
    for buffer, value in saved:
        buffer.copy_(value)
