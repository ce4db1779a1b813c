"""Buffers and gradients, kept from the second pass and from failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter


def buffers_to_keep(model: nn.Module, scales: Iterable[str]) -> list[Tensor]:
    """The buffers of ``model`` that neither a second pass nor a failed one may change: all but those of quantizers.

    A quantizer that took its first scale in such a pass keeps it, in its parameter and in its buffers.

    Args:
        model: the network.
        scales: qualified names of the scales, whose modules are the quantizers.
    """
    quantizers = {name.rpartition(".")[0] for name in scales}
    owners = [m for name, m in model.named_modules() if m._buffers and name not in quantizers]
    return [buffer for module in owners for buffer in module.buffers(recurse=False)]


def gradient_versions(params: Sequence[Parameter]) -> list[tuple[int, int] | None]:
    """For each parameter, which tensor its ``.grad`` is and how often that was written to; ``None`` without one."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in params]


@contextmanager
def undone_on_failure(params: Sequence[Parameter], buffers: Iterable[Tensor]) -> Iterator[None]:
    """If the block raises, ``.grad`` of ``params`` holds the tensors it held, and ``buffers`` have their values."""
    saved = copies(buffers)
    owned = [p.grad for p in params]
    try:
        yield
    except BaseException:
        put_back(saved)
        for p, g in zip(params, owned, strict=True):
            p.grad = g
        raise


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
