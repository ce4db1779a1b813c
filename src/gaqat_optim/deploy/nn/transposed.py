"""Transposed convolutions of a converted network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from ..qdq import dequantize_constant
from .base import DeployLayer

# By the number of axes of the weight.
_OPERATIONS: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class DeployConvTranspose(DeployLayer):
    """:class:`torch.nn.ConvTranspose1d`, ``ConvTranspose2d`` or ``ConvTranspose3d`` on integer codes.

    The codes have the shape (inputs, outputs / groups, ...), as torch and ONNX have the weight. onnxruntime has no
    integer kernel for this operator: it computes the dequantized operands in floating point, which is the same up to
    rounding, and the layers around it run on integers.
    """

    def _copy_hyperparameters(self, source: Any) -> None:
        self.stride, self.dilation, self.groups = source.stride, source.dilation, source.groups
        self.padding, self.output_padding, self.padding_mode = source.padding, source.output_padding, "zeros"
        self.kernel_size = source.kernel_size

    def _linear_op(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        layer: Any = self  # The method is torch's, and takes its output_padding from the layer.
        padding = _ConvTransposeNd._output_padding(
            layer, x, output_size, self.stride, self.padding, self.kernel_size, self._spatial_dims(), self.dilation
        )
        operation = _OPERATIONS[weight.dim()]
        return operation(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)

    def _spatial_dims(self) -> int:
        return len(self.stride)

    def _by_channel(self, weight: Tensor) -> Tensor:
        return torch.unflatten(weight, 0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _from_channels(self, weight: Tensor) -> Tensor:
        return self._by_channel(weight)  # Exchanging the two axes within each group is its own inverse.

    def _emitted_weight(self, codes: Tensor, scale: Tensor) -> Tensor:
        if scale.dim() == 0 or self.groups == 1:
            return dequantize_constant(codes, scale, self.weight_bits, self.shift, axis=1)
        # The scale runs over two axes, the groups in axis 0 and the channels in axis 1, and DequantizeLinear takes one.
        # With a scale of 1 it gives the codes, exactly; the product with the scale is rounded once, as in it.
        values = dequantize_constant(codes, torch.ones((), dtype=torch.float32), self.weight_bits, self.shift)
        by_group = scale.reshape(self.groups, 1, -1, *[1] * self._spatial_dims())
        return (torch.unflatten(values, 0, (self.groups, -1)) * by_group).flatten(0, 1)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"stride={self.stride}", f"padding={self.padding}"]
        if any(p != 0 for p in self.output_padding):
            parts.append(f"output_padding={self.output_padding}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        return ", ".join(parts)
