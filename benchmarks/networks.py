"""The networks of the benchmarks, and batches for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaqat_optim import QuantConfig, quantize_model

CLASSES = 10


def from_torchvision(name: str, classes: int = CLASSES) -> nn.Module:
    """A network of ``torchvision.models`` with random weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from torchvision_import import import_torchvision

    return getattr(import_torchvision().models, name)(num_classes=classes)


def resnet18_cifar() -> nn.Module:
    """ResNet-18 in its CIFAR form: the first convolution is 3x3 with stride 1, and there is no max pooling."""
    model = from_torchvision("resnet18")
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Block(nn.Module):
    """A pre-norm transformer block with four plain linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


class Chain(nn.Module):
    """Linear layers with a ReLU between them."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x


def images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))


def tokens(batch: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, width), torch.randint(CLASSES, (batch,))


def w4a4(model: nn.Module, x: Tensor, **config: object) -> nn.Module:
    """``model`` with 4-bit weights per channel and 4-bit activations per tensor; first and last layer 8 bits."""
    return quantize_model(model, QuantConfig(4, 4, **config), calibration=x).train()


def closure_of(model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None = None) -> Callable[[], Tensor]:
    """A closure that runs forward and backward, the forward in ``autocast`` where a dtype is given."""

    def closure() -> Tensor:
        for p in model.parameters():
            p.grad = None
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure
