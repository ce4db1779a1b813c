"""Quantized versions of torch's modules, and the registry that :func:`quantize_model` swaps by."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from .config import LayerConfig
from .quantizer import LSQQuantizer


class QuantizedModule(nn.Module):
    """Mixin of the quantized layers: up to three quantizers, each ``None`` where that part stays in floating point.

    A quantized layer is made from a float layer by :meth:`from_float`, never by its constructor. It holds the very
    Parameter objects of the float layer, under their old names, so that optimizers, tied weights and state dicts go on.
    """

    weight: Tensor
    weight_quantizer: LSQQuantizer | None
    input_quantizer: LSQQuantizer | None
    output_quantizer: LSQQuantizer | None

    @classmethod
    def from_float(cls, module: nn.Module, layer: LayerConfig) -> QuantizedModule:
        """A quantized layer that shares parameters, buffers and hooks with ``module``, which stays as it is."""
        quantized = cls.__new__(cls)
        quantized.__dict__ = module.__dict__.copy()
        for registry in ("_parameters", "_buffers", "_modules"):
            quantized.__dict__[registry] = module.__dict__[registry].copy()
        device = quantized.weight.device
        kinds = {"init": layer.init, "scale_domain": layer.scale_domain, "device": device}
        per_channel = {"channels": quantized.weight.shape[0], "channel_axis": 0}
        weight = activation = output = None
        if layer.weight_bits is not None:
            granularity = per_channel if layer.weight_granularity == "channel" else {}
            weight = LSQQuantizer(layer.weight_bits, signed=True, **granularity, **kinds)  # type: ignore[arg-type]
        if layer.activation_bits is not None:
            signed = None if layer.activation_signed == "auto" else bool(layer.activation_signed)
            activation = LSQQuantizer(layer.activation_bits, signed=signed, batched=True, **kinds)  # type: ignore[arg-type]
        if layer.output_bits is not None:
            output = LSQQuantizer(layer.output_bits, batched=True, **kinds)  # type: ignore[arg-type]
        quantized.weight_quantizer, quantized.input_quantizer, quantized.output_quantizer = weight, activation, output
        quantized.train(module.training)
        return quantized

    def quantizers(self) -> Iterator[tuple[str, LSQQuantizer]]:
        """The quantizers that exist, by the name of their attribute."""
        for name in ("weight_quantizer", "input_quantizer", "output_quantizer"):
            quantizer = getattr(self, name)
            if quantizer is not None:
                yield name, quantizer

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x) if self.input_quantizer is not None else x
        weight = self.weight_quantizer(self.weight) if self.weight_quantizer is not None else self.weight
        y = self._layer(x, weight)
        return self.output_quantizer(y) if self.output_quantizer is not None else y

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the float layer computes, on quantized operands."""
        raise NotImplementedError


class QuantLinear(QuantizedModule, nn.Linear):
    """:class:`torch.nn.Linear` on a quantized input and weight."""

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class _QuantConv(QuantizedModule):
    """What the convolutions share: torch's own ``_conv_forward`` takes the weight and knows the padding mode."""

    bias: Tensor | None

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return,operator]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` on a quantized input and weight."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` on a quantized input and weight."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` on a quantized input and weight."""


# Exact type to quantized type. A subclass with its own forward is not in it, and so keeps that forward.
QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}
