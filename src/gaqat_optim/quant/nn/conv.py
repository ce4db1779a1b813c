"""Quantized convolutions and transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedModule
from .registry import register_quantized

_CONVOLUTIONS = nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward
# By the number of spatial axes.
_OPERATIONS: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _QuantConv(QuantizedModule):
    """Base of the convolutions: torch's own ``_conv_forward`` takes the weight and knows the padding mode."""

    bias: Tensor | None

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return,operator]

    def linear_part(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        cls: Any = type(self)
        if cls.compute is not _QuantConv.compute or cls._conv_forward not in _CONVOLUTIONS:
            return None  # A user's class may compute something else.
        return lambda x, weight: self._conv_forward(x, weight, None)  # type: ignore[operator]


@register_quantized(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` on a quantized input and weight."""


@register_quantized(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` on a quantized input and weight."""


@register_quantized(nn.Conv3d)
class QuantConv3d(_QuantConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` on a quantized input and weight."""


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
