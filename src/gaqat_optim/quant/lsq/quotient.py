"""Values divided by their scale."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(v: Tensor, scale: Tensor) -> torch.dtype:
    """float32, or float64 if an input is: half precision divided by a scale changes up to 7 % of 8-bit codes."""
    return torch.promote_types(torch.promote_types(v.dtype, scale.dtype), torch.float32)


def divide_by_scale(v: Tensor, scale: Tensor, channel_axis: int | None) -> tuple[Tensor, Tensor]:
    """v/s as a new tensor, and s in the shape that broadcasts against v, both in :func:`compute_dtype`.

    >>> divide_by_scale(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 2.0]), channel_axis=0)
    (tensor([[2.0000, 4.0000],
            [1.5000, 2.0000]]), tensor([[0.5000],
            [2.0000]]))
    """
    dtype = compute_dtype(v, scale)
    shape = [-1 if axis == channel_axis else 1 for axis in range(v.dim())] if channel_axis is not None else []
    s = scale.to(dtype).reshape(shape)
    return v.to(dtype) / s, s
