"""Quantized layers of libraries, known by the qualified names of their classes: no library is imported."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import QuantizedModule
from .conv import QuantConv2d
from .linear import QuantLinear
from .registry import BY_NAME


class QuantTransposedLinear(QuantizedModule):
    """A linear layer whose weight has the shape (inputs, outputs), as transformers' ``Conv1D``."""

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        bias: Any = self.bias
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])

    def channels_first(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_channels_first(self, weight: Tensor) -> Tensor:
        return weight.t()


class QuantConvSame(QuantConv2d):
    """A convolution with TensorFlow's "same" padding, whose size depends on the input: timm's ``Conv2dSame``."""

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().compute(pad_same(self, x), weight)


class _Standardized(QuantizedModule):
    """A convolution that standardizes its weight in forward. What is quantized, and deployed, is the result."""

    def float_weight(self) -> Tensor:
        layer: Any = self
        gain = getattr(layer, "gain", None)
        scale = None if gain is None else (gain * layer.scale).view(-1)
        rows = layer.weight.reshape(1, layer.out_channels, -1)
        standardized = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0, eps=layer.eps)
        return standardized.reshape_as(layer.weight)


class QuantStdConv(_Standardized, QuantConv2d):
    """timm's ``StdConv2d`` and ``ScaledStdConv2d``."""


class QuantStdConvSame(_Standardized, QuantConvSame):
    """timm's ``StdConv2dSame`` and ``ScaledStdConv2dSame``, transformers' ``WeightStandardizedConv2d`` (BiT)."""


def pads_same(layer: Any) -> bool:
    """Whether a layer of these classes pads by the size of its input, where no fixed padding does the same."""
    same_pad = getattr(layer, "same_pad", None)
    return getattr(layer, "pad", True) is not None if same_pad is None else bool(same_pad)  # BiT pads in a child


def pad_same(layer: Any, x: Tensor) -> Tensor:
    """``x`` with zeros around it, so that the output has ceil(size / stride) positions, the odd zero behind."""
    if not pads_same(layer):
        return x
    pads: list[int] = []
    sizes = reversed(x.shape[-len(layer.stride) :])  # F.pad begins with the last axis
    for size, kernel, stride, dilation in zip(
        sizes, layer.kernel_size[::-1], layer.stride[::-1], layer.dilation[::-1], strict=True
    ):
        missing = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)


_TIMM: dict[str, type[QuantizedModule]] = {
    "linear.Linear": QuantLinear,
    "conv2d_same.Conv2dSame": QuantConvSame,
    "std_conv.StdConv2d": QuantStdConv,
    "std_conv.ScaledStdConv2d": QuantStdConv,
    "std_conv.StdConv2dSame": QuantStdConvSame,
    "std_conv.ScaledStdConv2dSame": QuantStdConvSame,
}
for _folder in ("timm.layers", "timm.models.layers"):  # the second before timm 0.9
    BY_NAME |= {f"{_folder}.{_name}": _class for _name, _class in _TIMM.items()}
BY_NAME |= {
    "transformers.pytorch_utils.Conv1D": QuantTransposedLinear,
    # It adds its bias behind the product; F.linear in the same kernel, with other last bits.
    "transformers.models.falcon.modeling_falcon.FalconLinear": QuantLinear,
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d": QuantStdConvSame,
}
