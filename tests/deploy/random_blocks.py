"""The blocks that random networks are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "torch.relu": torch.relu,
}


class Function(nn.Module):
    """An activation that a network calls as a function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class Residual(nn.Module):
    """The sum of what its two sides make of the input, perhaps with an activation behind it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class Block(nn.Module):
    """A block as in torchvision: one activation that is called twice, behind a layer and behind the sum."""

    def __init__(self, first: nn.Module, second: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.activation = first, second, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(torch.add(self.second(self.activation(self.first(x))), x))


class Functional(nn.Module):
    """Sums, ReLUs and a concatenation in the middle of a forward, where no module could hold a quantizer."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x) + x)
        z = self.second(y)
        z = z + y
        return torch.cat([F.relu6(z), y, x], dim=1)


class Concat(nn.Module):
    """The input's channels, and those that the body makes of it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


class Twice(nn.Module):
    """One body, used twice."""

    def __init__(self, body: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.body, self.between = body, between

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.between(self.body(x)))


class Mean(nn.Module):
    """Over all axes behind the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Places(nn.Module):
    """What a body makes of the places of the input as a sequence of vectors."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        return self.body(y).transpose(1, 2).reshape(x.shape)


class Attention(nn.Module):
    """Attention from the places to those of a layer's output, beside a shortcut."""

    def __init__(self, source: nn.Module, attention: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.source, self.attention, self.need_weights = source, attention, need_weights

    def forward(self, x: Tensor) -> Tensor:
        source = self.source(x)
        return x + self.attention(x, source, source, need_weights=self.need_weights)[0]
