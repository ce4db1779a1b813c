"""Quantized linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedModule
from .registry import register_quantized


@register_quantized(nn.Linear)
class QuantLinear(QuantizedModule, nn.Linear):
    """:class:`torch.nn.Linear` on a quantized input and weight; a second argument takes the place of its bias."""

    def compute(self, x: Tensor, weight: Tensor, *bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, *(bias or (self.bias,)))
