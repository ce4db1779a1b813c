"""ResNet-50, MobileNetV2 and ViT-S in plain torch, so that the command needs no other package than torch.

They have the layers of torchvision's and timm's networks of these names, with 1,000 classes. ``shrink`` makes them
small, for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import Block

CLASSES = 1000


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv(inputs, width, 1), *conv(width, width, 3, stride), *conv(width, 4 * width, 1)[:2]
        )
        changes = stride > 1 or inputs != 4 * width
        self.shortcut = nn.Sequential(*conv(inputs, 4 * width, 1, stride)[:2]) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def conv(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, relu: type = nn.ReLU
) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), relu()]


def resnet50(shrink: bool = False) -> nn.Module:
    width, depths = (8, (1, 1)) if shrink else (64, (3, 4, 6, 3))
    layers = [*conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(channels, width * 2**stage, 2 if stage and not block else 1))
            channels = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = conv(inputs, hidden, 1, relu=nn.ReLU6) if expansion > 1 else []
        depthwise = conv(hidden, hidden, 3, stride, groups=hidden, relu=nn.ReLU6)
        self.body = nn.Sequential(*expand, *depthwise, *conv(hidden, outputs, 1)[:2])
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2(shrink: bool = False) -> nn.Module:
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    channels, last = 32, 64 if shrink else 1280
    layers = conv(3, channels, 3, 2, relu=nn.ReLU6)
    for expansion, outputs, depth, stride in stages[:2] if shrink else stages:
        for block in range(depth):
            layers.append(InvertedResidual(channels, outputs, 1 if block else stride, expansion))
            channels = outputs
    layers += [*conv(channels, last, 1, relu=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(last, CLASSES))


class ViT(nn.Module):
    """Patches of 16, a class token, pre-norm blocks."""

    def __init__(self, size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 16) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_small(shrink: bool = False) -> nn.Module:
    return ViT(32, 16, 1, 2) if shrink else ViT(224, 384, 12, 6)
