"""Running statistics of normalization layers, kept from the second pass and from failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within the block, layers in training mode normalize by batch statistics and leave the running ones untouched.

    BatchNorm layers do so with ``track_running_stats=False``: unlike momentum 0, that counts no batches and is right
    for ``momentum=None``. InstanceNorm updates whatever that flag says, so there the values are put back.
    """
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    others = [m for m in model.modules() if isinstance(m, _NormBase) and not isinstance(m, _BatchNorm)]
    try:
        for module in batch_norms:
            module.track_running_stats = False
        with restored_on_exit(others):
            yield
    finally:
        for module in batch_norms:
            module.track_running_stats = True


@contextmanager
def restored_on_exit(modules: list[_NormBase]) -> Iterator[None]:
    """Put the buffers of ``modules`` back, by copy, when the block ends in any way."""
    saved = copies(modules)
    try:
        yield
    finally:
        put_back(saved)


def copies(modules: list[_NormBase]) -> list[tuple[Tensor, Tensor]]:
    """Each running statistic of ``modules`` with a copy of its value."""
    return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]


@torch.no_grad()
def put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    """Undo whatever happened to the buffers since :func:`copies`."""
    for buffer, value in saved:
        buffer.copy_(value)
