"""The kinds of layers that a converted network has, by the quantized layers that they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...quant.nn.base import QuantizedModule
from ...quant.nn.conv import QuantConv1d, QuantConv2d, QuantConv3d
from ...quant.nn.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from ...quant.nn.linear import QuantLinear
from .base import ActivationQuantizer, DeployLayer, QuantDequant, max_accumulator
from .transposed import DeployConvTranspose

__all__ = [
    "DEPLOYED",
    "ActivationQuantizer",
    "DeployConv",
    "DeployConvTranspose",
    "DeployLayer",
    "DeployLinear",
    "QuantDequant",
    "max_accumulator",
]


class DeployLinear(DeployLayer):
    """:class:`torch.nn.Linear` on integer codes."""

    def _prepare_input(self, x: Tensor) -> Tensor:
        # Runtimes have an integer kernel for the product of two matrices with a bias, and for little else.
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def _restore(self, y: Tensor, x: Tensor) -> Tensor:
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])

    def _linear_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _spatial_dims(self) -> int:
        return 0


# By the number of axes of the weight.
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class DeployConv(DeployLayer):
    """:class:`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d`` on integer codes."""

    def _copy_hyperparameters(self, source: Any) -> None:
        self.stride, self.dilation, self.groups = source.stride, source.dilation, source.groups
        self.padding, self.padding_mode = source.padding, source.padding_mode
        self._pads = source._reversed_padding_repeated_twice

    def _prepare_input(self, x: Tensor) -> Tensor:
        # Zeros are code 0, and left to the convolution. Other paddings repeat values, the same before and after
        # quantization; before it, nothing comes between the codes and the integer kernel.
        return x if self.padding_mode == "zeros" else F.pad(x, self._pads, mode=self.padding_mode)

    def _linear_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding if self.padding_mode == "zeros" else 0
        convolve = _CONVOLUTIONS[weight.dim()]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _spatial_dims(self) -> int:
        return len(self.stride)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"stride={self.stride}", f"padding={self.padding}"]
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        return ", ".join(parts)


# Type of the quantized layer to that of the deployed one.
DEPLOYED: dict[type[QuantizedModule], type[DeployLayer]] = {
    QuantLinear: DeployLinear,
    QuantConv1d: DeployConv,
    QuantConv2d: DeployConv,
    QuantConv3d: DeployConv,
    QuantConvTranspose1d: DeployConvTranspose,
    QuantConvTranspose2d: DeployConvTranspose,
    QuantConvTranspose3d: DeployConvTranspose,
}
