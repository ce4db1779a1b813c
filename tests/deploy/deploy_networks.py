"""Small networks for the deployment tests, trained for a few steps so that their codes are used."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaqat_optim import QuantConfig, convert, quantize_model

SAME = QuantConfig(4, 4, first_last_bits="same")


def quantized(model: nn.Module, x: Tensor, config: QuantConfig = SAME) -> nn.Module:
    return quantize_model(model, config, calibration=x).eval()


def run(model: nn.Module, x: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(x, **options)


def norms_in(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def convert_and_warn(model: nn.Module, reason: str = "") -> nn.Module:
    """``convert`` of a model with norms behind layers that stay, which it warns of."""
    with pytest.warns(UserWarning, match="(?s)BatchNorms that follow quantized layers stay.*" + reason):
        return convert(model)


def close(a: Tensor, b: Tensor, layers: int = 1) -> bool:
    """Whether two outputs differ by no more than the rounding of biases: some percent of their range."""
    return bool((a - b).abs().max() <= 0.05 * layers * a.abs().max())


def images(count: int, seed: int = 0) -> Tensor:
    """Images of 3x8x8, and classes that can be learned from them."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(x: Tensor) -> Tensor:
    return (x.mean(dim=(2, 3)) * torch.tensor([31.0, 17.0, 7.0])).sum(1).mul(3).long() % 10


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class Requantized(nn.Module):
    """A layer that is used again: the 8 bits of its output are quantized to the 8 bits of its own input."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        for _ in range(3):
            x = torch.relu(self.again(x))
        return self.last(x)


NETWORKS = {"mlp": mlp, "cnn": cnn, "resnet": ResNet}
CONFIGS = {
    "W8A8": QuantConfig(8, 8),
    "W4A4": QuantConfig(4, 4),
    "W3A3": QuantConfig(3, 3, first_last_bits="same"),
    "W2A2": QuantConfig(2, 2),
    "mixed": QuantConfig(
        3, 8, overrides={"*1*": {"weight_bits": 6, "activation_bits": 2}}, weight_granularity="tensor"
    ),
}


def trained(network: str, config: QuantConfig, steps: int = 15) -> nn.Module:
    """A quantized network after some steps of training in floating point and some with the quantizers."""
    return copy.deepcopy(_trained(network, config, steps))


@functools.cache
def _trained(network: str, config: QuantConfig, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    _train(model, steps)
    model = quantize_model(model, config, calibration=images(128, seed=1))
    _train(model, steps)
    return model.eval()


def _train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        x = images(32, seed=100 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels(x)).backward()
        optimizer.step()


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and an affine map of its own, with gammas of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                if norm.running_mean is not None:
                    norm.running_mean.normal_(generator=generator)
                    norm.running_var.uniform_(0.5, 2, generator=generator)
                if norm.affine:
                    norm.weight.normal_(generator=generator)
                    norm.bias.normal_(generator=generator)
    return model
