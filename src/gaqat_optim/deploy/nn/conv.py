"""The deployed convolutions, transposed ones included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from ...quant.nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from ..qdq import dequantize_constant
from .base import DeployLayer
from .registry import deploys

# By the number of axes of the weight.
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class _DeployConvNd(DeployLayer):
    """What all convolutions share."""

    stride: tuple[int, ...]
    padding: Any  # a tuple or, for DeployConv, a name
    dilation: tuple[int, ...]
    groups: int

    @property
    def spatial_dims(self) -> int:
        return len(self.stride)

    def extra_repr(self) -> str:
        descriptions = [super().extra_repr(), f"stride={self.stride}", f"padding={self.padding}"]
        defaults = {"padding_mode": "zeros", "output_padding": 0, "dilation": 1, "groups": 1}
        for name in self.hyperparameters:
            value = getattr(self, name)
            if name in defaults and any(v != defaults[name] for v in (value if isinstance(value, tuple) else [value])):
                descriptions.append(f"{name}={value!r}")
        return ", ".join(descriptions)


@deploys(QuantConv1d, QuantConv2d, QuantConv3d)
class DeployConv(_DeployConvNd):
    """:class:`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d`` on integer codes."""

    padding_mode: str
    hyperparameters = ("stride", "padding", "padding_mode", "dilation", "groups")

    def copy_hyperparameters(self, source: Any) -> None:
        super().copy_hyperparameters(source)
        self._pads = source._reversed_padding_repeated_twice

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding if self.padding_mode == "zeros" else 0
        return _CONVOLUTIONS[weight.dim()](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def prepare_input(self, x: Tensor) -> Tensor:
        # Zeros have the code 0, so the convolution pads with them. Other modes repeat values of the input, and give the
        # same before and after quantization. Before it, they do not stand between the codes and the integer kernel.
        return x if self.padding_mode == "zeros" else F.pad(x, self._pads, mode=self.padding_mode)


@deploys(QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d)
class DeployConvTranspose(_DeployConvNd):
    """:class:`torch.nn.ConvTranspose1d`, ``ConvTranspose2d`` or ``ConvTranspose3d`` on integer codes.

    The codes have the shape (inputs, outputs / groups, ...), which is torch's and ONNX's layout of the weight.
    onnxruntime has no integer kernel for this operator. It computes the dequantized operands in floating point, which
    is the same up to rounding, and the layers around it run on integers.
    """

    output_padding: tuple[int, ...]
    kernel_size: tuple[int, ...]
    hyperparameters = ("stride", "padding", "output_padding", "dilation", "groups", "kernel_size")

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self  # The method is torch's, and takes its output_padding from the layer.
        padding = _ConvTransposeNd._output_padding(
            layer, x, output_size, layer.stride, layer.padding, layer.kernel_size, self.spatial_dims, layer.dilation
        )
        convolve = _TRANSPOSED[weight.dim()]
        return convolve(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)

    def channels_first(self, weight: Tensor) -> Tensor:
        return torch.unflatten(weight, 0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def from_channels_first(self, weight: Tensor) -> Tensor:
        return self.channels_first(weight)  # Exchanging the two axes within each group is its own inverse.

    def dequantize_codes(self, codes: Tensor, scale: Tensor) -> Tensor:
        if scale.dim() == 0 or self.groups == 1:
            return dequantize_constant(codes, scale, self.weight_bits, self.shift, axis=1)
        # The scale runs over two axes, the groups in axis 0 and the channels in axis 1, and DequantizeLinear takes one.
        # With a scale of 1 it gives the codes, exactly. The product with the scale is rounded once, as in it.
        values = dequantize_constant(codes, torch.ones((), dtype=torch.float32), self.weight_bits, self.shift)
        by_group = scale.reshape(self.groups, 1, -1, *[1] * self.spatial_dims)
        return (torch.unflatten(values, 0, (self.groups, -1)) * by_group).flatten(0, 1)
