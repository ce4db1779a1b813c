"""Quantized transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedModule, register_quantized

# By the number of spatial axes.
_OPERATIONS: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _QuantConvTranspose(QuantizedModule):
    """Base of the transposed convolutions.

    Their weight has the shape (inputs, outputs / groups, ...): the output channels of group g are axis 1 of the g-th
    part of axis 0.
    """

    def compute(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self  # with the attributes of torch's class
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation
        )
        arguments = (layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return _OPERATIONS[len(layer.kernel_size)](x, weight, *arguments)

    def channels_first(self, weight: Tensor) -> Tensor:
        groups: Any = self.groups
        return torch.unflatten(weight, 0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def from_channels_first(self, weight: Tensor) -> Tensor:
        return self.channels_first(weight)  # Exchanging the two axes within each group is its own inverse.


@register_quantized(nn.ConvTranspose1d)
class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` on a quantized input and weight."""


@register_quantized(nn.ConvTranspose2d)
class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on a quantized input and weight."""


@register_quantized(nn.ConvTranspose3d)
class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` on a quantized input and weight."""
