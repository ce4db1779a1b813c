"""The networks that people deploy, on few classes and small images, trained until their predictions are decisive."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaqat_optim import QuantConfig, quantize_model, rounded_biases
from torchvision_import import import_torchvision

CLASSES = 4
SIZE = 32

CONFIGS = {
    "W8A8": QuantConfig(8, 8),
    "W4A4": QuantConfig(4, 4),
    "W3A3": QuantConfig(3, 3),
    "W2A2": QuantConfig(2, 2),
    "mixed": QuantConfig(
        3,
        6,
        overrides={
            "*1*": {"weight_bits": 6, "activation_bits": 4},
            "*2*": {"weight_bits": 5, "activation_bits": 8, "weight_granularity": "tensor"},
        },
    ),
    "W4A4 output 8": QuantConfig(4, 4, output_bits=8),
}


class UNet(nn.Module):
    """Encoder and decoder of two levels, up-sampling by transposed convolution, one class per pixel, odd channels."""

    def __init__(self, channels: tuple[int, int, int] = (13, 25, 51)) -> None:
        super().__init__()
        a, b, c = channels
        self.down1, self.down2, self.bottom = _double(3, a), _double(a, b), _double(b, c)
        self.up2, self.up1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.decode2, self.decode1 = _double(2 * b, b), _double(2 * a, a)
        self.head = nn.Conv2d(a, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.up2(self.bottom(F.max_pool2d(second, 2)))
        y = self.up1(self.decode2(torch.cat([second, y], dim=1)))
        return self.head(self.decode1(torch.cat([first, y], dim=1)))


def _double(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _from_torchvision(name: str, **arguments: Any) -> nn.Module:
    import_torchvision()
    import torchvision

    return getattr(torchvision.models, name)(num_classes=CLASSES, **arguments)


def _vit() -> nn.Module:
    """B/16 with a quarter of the layers and an eighth of the width: heads of 16, an MLP four times as wide."""
    import_torchvision()
    import torchvision

    model = torchvision.models.VisionTransformer(SIZE, 4, 3, 6, 96, 384, num_classes=CLASSES)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision's zeros would need longer training.
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": functools.partial(_from_torchvision, "resnet18"),
    "resnet50": functools.partial(_from_torchvision, "resnet50"),
    "mobilenet_v2": functools.partial(_from_torchvision, "mobilenet_v2"),
    "mobilenet_v3_small": functools.partial(_from_torchvision, "mobilenet_v3_small"),
    "vit": _vit,
    "unet": UNet,
}


def batch(network: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of SIZE x SIZE, and the class of each; for the U-Net, that of each of their pixels.

    A class is a colour with stripes of one direction, under noise. An image is of one class, or for the U-Net of two,
    one above the other.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count, 1, 1), generator=generator).expand(count, SIZE, SIZE)
    if network == "unet":
        lower = torch.randint(CLASSES, (count, 1, 1), generator=generator)
        edge = torch.randint(SIZE // 4, 3 * SIZE // 4, (count, 1, 1), generator=generator)
        labels = torch.where(torch.arange(SIZE)[None, :, None] < edge, labels, lower)
    angles = torch.arange(CLASSES) * torch.pi / CLASSES
    place = torch.arange(SIZE, dtype=torch.float32)
    along = place[:, None] * angles.cos()[labels] + place * angles.sin()[labels]
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    colours = torch.tensor([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0], [0.8, 0.8, 0.1]])
    stripes = 0.5 + 0.5 * torch.sin(0.9 * along + phase)
    x = colours[labels].permute(0, 3, 1, 2) * (0.4 + 0.6 * stripes[:, None])
    x = (x + 0.15 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return x, labels if network == "unet" else labels[:, 0, 0]


@functools.cache
def trained_float(network: str, steps: int) -> nn.Module:
    """The network after ``steps`` of training in floating point."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.2  # The statistics of few steps, not of the beginning.
    _train(model, network, steps, seed=0)
    return model


def trained(network: str, config: str, steps: int = 40, float_steps: int = 60) -> nn.Module:
    """The quantized network after ``float_steps`` in floating point and ``steps`` with quantizers.

    The last quarter of the steps is with the biases that are deployed, as the documentation says. A MobileNet with
    2 bits everywhere is at chance after so few steps, where agreement says nothing. So its depthwise convolutions, of
    nine weights a channel, have 4 bits, and it is trained for twice as long.
    """
    torch.manual_seed(1)
    model, settings = copy.deepcopy(trained_float(network, float_steps)), CONFIGS[config]
    if network.startswith("mobilenet") and config == "W2A2":
        depthwise = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        four = {key: {"weight_bits": 4, "activation_bits": 4} for key in depthwise}
        settings, steps = dataclasses.replace(settings, overrides=four), 2 * steps
    model = quantize_model(model, settings, calibration=batch(network, 64, seed=1)[0])
    _train(model, network, steps, seed=1000, rounded=steps // 4)
    return model.eval()


def _train(model: nn.Module, network: str, steps: int, seed: int, rounded: int = 0) -> None:
    """Adam for ``steps``, the last ``rounded`` of them in ``rounded_biases``."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with contextlib.ExitStack() as stack:
        for step in range(steps):
            if rounded and step == steps - rounded:
                stack.enter_context(rounded_biases(model))
            for group in optimizer.param_groups:  # To zero, so that the BatchNorms' statistics are the last ones.
                group["lr"] = 1e-3 * (1 - step / steps)
            x, y = batch(network, 16 if network == "unet" else 32, seed + step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
