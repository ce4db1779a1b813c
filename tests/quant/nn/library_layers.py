"""Layers as timm has them, under its names: the tests need no timm."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from torchvision_import import import_torchvision


def named(name):
    def rename(cls):
        cls.__module__, _, cls.__qualname__ = name.rpartition(".")
        return cls

    return rename


def pad_same(x, kernel_size, stride, dilation):
    pads = [
        max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True)
    ]
    (top, left) = (pads[0] // 2, pads[1] // 2)
    return F.pad(x, (left, pads[1] - left, top, pads[0] - top))


def standardized(layer, scale=None):
    rows = layer.weight.reshape(1, layer.out_channels, -1)
    weight = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0, eps=layer.eps)
    return weight.reshape_as(layer.weight)


@named("timm.layers.linear.Linear")
class Linear(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


@named("timm.layers.conv2d_same.Conv2dSame")
class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


@named("timm.layers.std_conv.StdConv2d")
class StdConv2d(nn.Conv2d):
    eps = 1e-6

    def forward(self, x):
        return self._conv_forward(x, standardized(self), self.bias)


@named("timm.layers.std_conv.ScaledStdConv2dSame")
class ScaledStdConv2dSame(nn.Conv2d):
    eps = 1e-6

    def __init__(self, *args, same_pad=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale, self.same_pad = self.weight[0].numel() ** -0.5, same_pad
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return self._conv_forward(x, standardized(self, (self.gain * self.scale).view(-1)), self.bias)


def bit_conv(*args, **options):
    import_torchvision()  # modeling_bit imports it
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    return WeightStandardizedConv2d(*args, **options)


@named("timm.models.layers.conv2d_same.Conv2dSame")
class OldConv2dSame(Conv2dSame):
    """Where timm had it before 0.9."""

    def forward(self, x):
        return super().forward(x)


def falcon_linear(*args, **options):
    import_torchvision()  # modeling_falcon imports it
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(*args, **options)


class Renamed(StdConv2d):
    """Inherits its forward from a layer that is known by name."""


class Flat(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x).relu())


class Convolved(Flat):
    def forward(self, x):
        return self.head(self.layer(x).relu().flatten(2).mean(2))


CASES = {
    "Linear": (Flat, lambda: Linear(4, 6), (8, 4)),
    "Conv1D": (Flat, lambda: Conv1D(6, 4), (8, 5, 4)),
    "Falcon": (Flat, lambda: falcon_linear(4, 6), (8, 5, 4)),
    "Conv2dSame": (Convolved, lambda: Conv2dSame(4, 6, (3, 4), stride=(2, 3), dilation=(2, 1), groups=2), (8, 4, 9, 8)),
    "StdConv2d": (Convolved, lambda: StdConv2d(4, 6, 3, padding=1, bias=False), (8, 4, 5, 5)),
    "ScaledStdConv2dSame": (Convolved, lambda: ScaledStdConv2dSame(4, 6, 3, stride=2), (8, 4, 7, 6)),
    "static": (Convolved, lambda: ScaledStdConv2dSame(4, 6, 3, padding=1, same_pad=False), (8, 4, 7, 6)),
    "before timm 0.9": (Convolved, lambda: OldConv2dSame(4, 6, 3, stride=2), (8, 4, 8, 7)),
    "BiT": (Convolved, lambda: bit_conv(4, 6, 3, stride=2), (8, 4, 8, 7)),
    "BiT static": (Convolved, lambda: bit_conv(4, 6, 3, padding="SAME", bias=True), (8, 4, 8, 7)),
    "BiT symmetric": (Convolved, lambda: bit_conv(4, 6, 3, 2, padding=None), (8, 4, 8, 7)),
    "Renamed": (Convolved, lambda: Renamed(4, 6, 3, padding=1), (8, 4, 5, 5)),
    "video": (Convolved, lambda: import_torchvision().models.video.resnet.Conv3DSimple(4, 6), (8, 4, 3, 5, 5)),
}
