"""One scale on all ranks for activations that training itself initializes, without a collective inside a layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .quantizer import LSQQuantizer


def is_distributed() -> bool:
    """Whether this process is one of several ranks of ``torch.distributed``."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def agree_on_scales(quantizers: Sequence[LSQQuantizer], waiting: Collection[LSQQuantizer]) -> None:
    """Give the quantizers that waited for data the scale of one rank, on all ranks: one collective.

    A layer may not communicate in its forward, since a rank may send it nothing, as to an expert, or not call it. So
    each rank initializes alone, and the ranks agree at the end of the network's forward, which all of them reach. Of
    the ranks with a scale, the one whose codes reach lowest decides, and among those the one with the largest scale.

    Args:
        quantizers: those with one scale, the same list on every rank.
        waiting: those of them that had no scale on this rank before the forward.
    """
    if not quantizers:
        return
    own = torch.stack([_state(quantizer, quantizer in waiting) for quantizer in quantizers])
    ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(ranks, own)
    for quantizer, states in zip(quantizers, torch.stack(ranks, dim=1).tolist(), strict=True):
        candidates = [state for state in states if state[1]]
        if candidates and any(state[0] for state in states):
            _load(quantizer, max(candidates, key=lambda state: (-state[2], state[3]))[4:])


def _state(quantizer: LSQQuantizer, waited: bool) -> Tensor:
    """Whether it waited, whether it has a scale, Qn and s for the choice, and all its tensors."""
    is_set = quantizer.is_initialized
    choice = [float(waited), float(is_set), float(quantizer.qmin if is_set else 0), quantizer.scale.item()]
    values = [v.double().reshape(-1) for v in (quantizer.raw_scale, *quantizer.buffers())]
    return torch.cat([torch.tensor(choice, dtype=torch.float64, device=values[0].device), *values])


def _load(quantizer: LSQQuantizer, values: list[float]) -> None:
    for tensor in (quantizer.raw_scale, *quantizer.buffers()):
        own, values = values[: tensor.numel()], values[tensor.numel() :]
        tensor.copy_(torch.tensor(own, dtype=torch.float64).reshape(tensor.shape))
    quantizer.read_buffers()
