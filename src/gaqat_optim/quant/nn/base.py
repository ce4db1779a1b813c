"""Quantized versions of torch's modules, and the registry that :func:`quantize_model` swaps by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..lsq.quantizer import LSQQuantizer, is_unmodified
from ..summary import QuantRecord, storage_bytes
from .input_scale_gradient import with_scale_gradient
from .saved import quantized_again

Q = TypeVar("Q", bound="type[QuantizedModule]")

# Exact type to quantized type. A subclass with its own forward is not in it, and so keeps that forward.
QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {}


def register_quantized(*types: type[nn.Module]) -> Callable[[Q], Q]:
    """Register a class as the quantized version of a module type, for :func:`quantize_model` to swap by.

    The class derives from :class:`QuantizedModule` and from the type, and says in ``compute`` what the layer does with
    a quantized input and weight.

    Args:
        types: the exact types that it replaces.

    Example:
        >>> import torch
        >>> from gaqat_optim import quantize_model
        >>> class Cosine(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))
        >>> @register_quantized(Cosine)
        ... class QuantCosine(QuantizedModule, Cosine):
        ...     def compute(self, x, weight):
        ...         return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=1))
        >>> net = quantize_model(nn.Sequential(Cosine(4, 2)), calibration=torch.rand(8, 4))
        >>> type(net[0]).__name__
        'QuantCosine'
        >>> del QUANTIZED[Cosine]
    """

    def register(cls: Q) -> Q:
        QUANTIZED.update(dict.fromkeys(types, cls))
        return cls

    return register


class QuantizedModule(nn.Module):
    """Mixin of the quantized layers: up to three quantizers, each ``None`` where that part stays in floating point.

    A quantized layer is made from a float layer by :meth:`from_float`, never by its constructor. It holds the very
    Parameter objects of the float layer, under their old names, so that optimizers, tied weights and state dicts go on.
    """

    quantizes_input: ClassVar[bool] = True  # whether the input can be quantized; indices cannot
    recompute_input: bool = False  # whether the quantized input is computed again for backward (recompute_activations)

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
        per_channel = {"channels": quantized.channels_first(quantized.weight).shape[0], "channel_axis": 0}
        weight = activation = output = None
        if layer.weight_bits is not None:
            granularity = per_channel if layer.weight_granularity == "channel" else {}
            weight = LSQQuantizer(layer.weight_bits, signed=True, **granularity, **kinds)  # type: ignore[arg-type]
        if layer.activation_bits is not None and cls.quantizes_input:
            signed = None if layer.activation_signed == "auto" else bool(layer.activation_signed)
            activation = LSQQuantizer(layer.activation_bits, signed=signed, axis0_is_batch=True, **kinds)  # type: ignore[arg-type]
        if layer.output_bits is not None:
            output = LSQQuantizer(layer.output_bits, axis0_is_batch=True, **kinds)  # type: ignore[arg-type]
        for quantizer in (weight, activation):
            if quantizer is not None:
                quantizer.save_output_for_backward = True
        quantized.weight_quantizer, quantized.input_quantizer, quantized.output_quantizer = weight, activation, output
        quantized.train(module.training)
        return quantized

    def quantizers(self) -> Iterator[tuple[str, LSQQuantizer]]:
        """The quantizers that exist, by the name of their attribute."""
        for name in ("weight_quantizer", "input_quantizer", "output_quantizer"):
            quantizer = getattr(self, name)
            if quantizer is not None:
                yield name, quantizer

    def initialize_weight(self) -> None:
        """Set the scales of the weight from its values."""
        if self.weight_quantizer is not None and not self.weight.is_meta:  # else by a state dict, or in training
            self.weight_quantizer.initialize(self.channels_first(self.weight))

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if self.weight_quantizer is None:
            return self.weight
        return self.from_channels_first(self.weight_quantizer(self.channels_first(self.weight)))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # named as torch's layers name it
        quantizer = self.input_quantizer
        x = quantizer(input) if quantizer is not None else input
        weight = self.quantized_weight()
        eager = quantizer is not None and x is not input and not torch.compiler.is_compiling()
        known = eager and is_unmodified(quantizer)  # type: ignore[arg-type]  # x is LSQ's of the input
        # Where only the scale before a convolution learns, there is a shorter way to its gradient.
        product = self.product() if known and x.requires_grad and not input.requires_grad else None
        x = x.detach() if product is not None else x
        with quantized_again(quantizer, input, x) if known and self.recompute_input else nullcontext():  # type: ignore[arg-type]
            y = self.compute(x, weight, *args, **kwargs)
        if product is not None:
            y = with_scale_gradient(y, quantizer, input, weight, product)  # type: ignore[arg-type]
        return self.output_quantizer(y) if self.output_quantizer is not None else y

    def quant_record(self, name: str) -> QuantRecord:
        """What :func:`quantization_summary` says of the layer, whose qualified name is ``name``."""
        weight, activation, output = self.weight_quantizer, self.input_quantizer, self.output_quantizer
        scales = sum(q.scale.numel() for q in self._modules.values() if isinstance(q, LSQQuantizer))
        biases = sum(p.numel() for kind, p in self.named_parameters(recurse=False) if "bias" in kind)
        count, bits = self.weight.numel(), None if weight is None else weight.bits
        return QuantRecord(
            name=name,
            type=type(self).__name__,
            weight_bits=bits,
            weight_granularity=None if weight is None else "tensor" if weight.channel_axis is None else "channel",
            weight_scale=_mean_scale(weight),
            weight_snr=self._signal_to_noise(),
            activation_bits=None if activation is None else activation.bits,
            activation_signed=None if activation is None else activation.signed,
            activation_scale=_mean_scale(activation),
            output_bits=None if output is None else output.bits,
            weights=count,
            bytes=storage_bytes(count, bits, scales + biases),
        )

    @torch.no_grad()
    def _signal_to_noise(self) -> float | None:
        """Of the weight, in decibel: infinite where it is represented exactly, NaN for zeros."""
        if self.weight_quantizer is None or not self.weight_quantizer.is_initialized:
            return None
        weight = self.weight.double()
        noise = (self.quantized_weight().double() - weight).square().sum()
        return (10 * torch.log10(weight.square().sum() / noise)).item()

    # -- what the kinds of layers differ in --------------------------------------------------------------------

    def compute(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the float layer computes, on quantized operands; further arguments are those of its forward."""
        raise NotImplementedError

    def product(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """:meth:`compute` without its bias, if it is linear in the input and its gradient worth a shorter way."""
        return None

    def channels_first(self, weight: Tensor) -> Tensor:
        """The weight with its output channels on axis 0, where the quantizer looks for them."""
        return weight

    def from_channels_first(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`channels_first`."""
        return weight


def _mean_scale(quantizer: LSQQuantizer | None) -> float | None:
    return quantizer.scale.mean().item() if quantizer is not None and quantizer.is_initialized else None
