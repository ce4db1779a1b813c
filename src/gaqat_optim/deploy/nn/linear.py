"""The deployed linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...quant.nn.linear import QuantLinear
from .base import DeployLayer
from .registry import deploys


@deploys(QuantLinear)
class DeployLinear(DeployLayer):
    """:class:`torch.nn.Linear` on integer codes."""

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def prepare_input(self, x: Tensor) -> Tensor:
        # Runtimes have an integer kernel for the product of two matrices with a bias, and for little else.
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def restore_shape(self, y: Tensor, x: Tensor) -> Tensor:
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
