"""LSQ's forward on a CPU in eager mode: piece by piece, so that only the first operator waits for memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_backward import flat_view, takes

# 512 KiB of float32: what a core's own cache holds on most processors, and enough work for four calls of operators.
PIECE = 2**17
# With fewer, all operators find the whole tensor in the shared cache.
WORTHWHILE = 16 * PIECE


def quantized_in_pieces(v: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor | None:
    """``v`` quantized with one scale, to the same bits as in one piece; ``None`` where that gains nothing.

    Args:
        v: any tensor.
        scale: of one entry.
        qmin: lower integer bound.
        qmax: upper integer bound.
    """
    if not takes(v, scale) or v.numel() < WORTHWHILE:
        return None
    flat, s = flat_view(v), scale.reshape(())
    if flat is None:
        return None
    result = torch.empty_like(v)  # in the memory order of v
    to = flat_view(result)
    assert to is not None
    for piece, of_result in zip(torch.split(flat, PIECE), torch.split(to, PIECE), strict=True):
        torch.div(piece, s, out=of_result).clamp_(qmin, qmax).round_().mul_(s)
    return result
