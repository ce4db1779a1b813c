"""Quantized convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .base import QuantizedModule, register_quantized

_CONVOLUTIONS = nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward


class _QuantConv(QuantizedModule):
    """Base of the convolutions: torch's own ``_conv_forward`` takes the weight and knows the padding mode."""

    bias: Tensor | None

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return,operator]

    def linear_part(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        cls: Any = type(self)
        if cls.compute is not _QuantConv.compute or cls._conv_forward not in _CONVOLUTIONS:
            return None  # A user's class may compute something else.
        return lambda x, weight: self._conv_forward(x, weight, None)  # type: ignore[operator]


@register_quantized(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` on a quantized input and weight."""


@register_quantized(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` on a quantized input and weight."""


@register_quantized(nn.Conv3d)
class QuantConv3d(_QuantConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` on a quantized input and weight."""
