"""A quantized tensor that is quantized again for backward instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..lsq.functional import lsq_quantize
from ..lsq.quantizer import LSQQuantizer


@contextmanager
def quantized_again(quantizer: LSQQuantizer, v: Tensor, x: Tensor) -> Iterator[None]:
    """Within the block, operations that would keep ``x`` or a view of it for backward keep how to make it from ``v``.

    Args:
        quantizer: gave ``x``, and keeps ``v`` for its own backward.
        v: its input.
        x: its output.
    """
    v, scale = v.detach(), quantizer.scale.detach()
    settings, axis = (scale, quantizer.qmin, quantizer.qmax), quantizer.channel_axis

    try:
        count, address = x.numel(), x.data_ptr()
    except RuntimeError:  # torch.func's tensors have no memory of their own, and its transforms refuse these hooks.
        yield
        return
    del x  # The functions below live as long as the graph, and would keep it.

    def keep(tensor: Tensor) -> Any:
        if tensor.numel() != count or tensor.data_ptr() != address or not count:
            return tensor
        return tensor.size(), tensor.stride()

    def give_back(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return lsq_quantize(v, *settings, channel_axis=axis).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        yield
