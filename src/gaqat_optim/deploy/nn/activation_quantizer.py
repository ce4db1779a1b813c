"""The quantizers of activations in a deployed network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...quant.lsq.functional import integer_bounds, zero_point_form
from ...quant.lsq.quantizer import LSQQuantizer
from ..qdq import is_onnx_export, quantize_clip_dequantize


class ActivationQuantizer(nn.Module):
    """Quantizes activations: ``clamp(round(x / scale), qmin, qmax)``, as float32 tensors of integers.

    Args:
        scale: the step size, float32 of shape ``()``.
        bits: bits of a code.
        zero_point: how many codes are negative, -qmin: 0 for unsigned codes, 2^(bits - 1) for signed ones. A byte in a
            file is a code plus this.
        name: qualified name of the trained quantizer, under which an exported file has its codes.

    Example:
        >>> ActivationQuantizer(torch.tensor(0.5), bits=2, zero_point=2)(torch.tensor([-9.0, 0.25, 0.75]))
        tensor([-2.,  0.,  1.])
    """

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int, zero_point: int, name: str = "") -> None:
        super().__init__()
        self.bits, self.zero_point, self.name = bits, zero_point, name
        self.qmin, self.qmax = integer_bounds(bits, zero_point)
        self.register_buffer("scale", scale)

    @classmethod
    def from_quantizer(cls, quantizer: LSQQuantizer) -> ActivationQuantizer:
        """The deployed form of the quantizer of an activation."""
        scale = quantizer.scale.detach().to(torch.float32, copy=True).reshape(())
        return cls(scale, quantizer.bits, -quantizer.qmin, quantizer.name)

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.zero_point > 0

    def to_dict(self) -> dict[str, Any]:
        """The arguments of the constructor beside the scale, for JSON."""
        return {"bits": self.bits, "zero_point": self.zero_point, "name": self.name}

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.float32) / self.scale).round().clamp(self.qmin, self.qmax)

    def dequantized(self, x: Tensor) -> Tensor:
        """The float32 values of the codes of ``x``."""
        if is_onnx_export():
            return quantize_clip_dequantize(x.to(torch.float32), self.scale, self.bits, self.zero_point, self.name)
        codes: Tensor = self(x)
        return codes * self.scale

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {zero_point_form(self.bits, self.zero_point)}, scale {self.scale.item():.6g}"


class QuantDequant(nn.Module):
    """The output quantizer of a module that is no deployed layer: returns the values of the codes.

    Example:
        >>> values = QuantDequant(ActivationQuantizer(torch.tensor(0.5), bits=2, zero_point=2))
        >>> values(torch.tensor([-9.0, 0.25, 0.75]))
        tensor([-1.0000,  0.0000,  0.5000])
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.dequantized(x).to(x.dtype)
