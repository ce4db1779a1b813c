"""The deployed forms of layers of libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...quant.nn.library_layers import (
    QuantConvSame,
    QuantStdConv,
    QuantStdConvSame,
    QuantTransposedLinear,
    pad_same,
    pads_same,
)
from .base import DeployLayer
from .conv import DeployConv
from .linear import DeployLinear
from .registry import DEPLOYED, deploys

DEPLOYED[QuantStdConv] = DeployConv  # The codes are those of the standardized weight.


@deploys(QuantTransposedLinear)
class DeployTransposedLinear(DeployLayer):
    """A linear layer whose weight has the shape (inputs, outputs), on integer codes."""

    channel_axis = 1
    prepare_input = DeployLinear.prepare_input
    restore_shape = DeployLinear.restore_shape

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)


@deploys(QuantConvSame, QuantStdConvSame)
class DeployConvSame(DeployConv):
    """A convolution with TensorFlow's "same" padding on integer codes."""

    kernel_size: tuple[int, ...]
    same_pad: bool

    def copy_hyperparameters(self, source: Any) -> None:
        super().copy_hyperparameters(source)
        self.kernel_size, self.same_pad = source.kernel_size, pads_same(source)

    @classmethod
    def hyperparameters_of(cls, layer: nn.Module) -> dict[str, Any]:
        return {**super().hyperparameters_of(layer), "same_pad": pads_same(layer)}

    def prepare_input(self, x: Tensor) -> Tensor:
        return pad_same(self, x)
