"""The quantized layer: quantizers around what a float layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from ..config import LayerConfig
from ..lsq.functional import lsq_quantize_unchecked
from ..lsq.input_scale_gradient import with_scale_gradient
from ..lsq.quantizer import LSQQuantizer
from ..summary import QuantRecord, storage_bytes


class QuantizedModule(nn.Module):
    """Mixin of the quantized layers: up to three quantizers, each ``None`` where that part stays in floating point.

    A quantized layer is made from a float layer by :meth:`from_float`, never by its constructor. It holds the Parameter
    objects of the float layer under their old names, so that optimizers, tied weights and state dicts stay valid.
    """

    quantizes_input: ClassVar[bool] = (
        True  # False for indices, whose lookup is no product and needs no output quantizer
    )
    # How a class with a compute of its own is deployed: a DeployLayer. A class that inherits its compute needs none.
    deployed_as: ClassVar[type[nn.Module] | None] = None
    can_be_wrapped: ClassVar[bool] = True  # whether weight and bias are all the parameters that it takes from a layer
    inner_class: ClassVar[type[QuantizedModule] | None] = None  # what the own forward of the float class wraps
    recompute_input: bool = False  # whether backward quantizes the input again (recompute_activations)

    weight: Tensor
    weight_quantizer: LSQQuantizer | None
    input_quantizer: LSQQuantizer | None
    output_quantizer: LSQQuantizer | None

    @classmethod
    def from_float(cls, module: nn.Module, layer: LayerConfig) -> Self:
        """A quantized layer that shares parameters, buffers and hooks with ``module``, which stays as it is."""
        quantized = cls._sharing_state(module)
        channels = quantized.channels_first(quantized.float_weight()).shape[0]
        quantizers = build_quantizers(layer, channels, quantized.weight.device)
        quantized.weight_quantizer = quantizers["weight"]
        quantized.input_quantizer = quantizers["input"]
        quantized.output_quantizer = quantizers["output"]
        for _, quantizer in quantized.quantizers():  # not the children of the layer, which have flags of their own
            quantizer.train(module.training)
        return quantized

    @classmethod
    def _sharing_state(cls, module: nn.Module) -> Self:
        """An object of this class with all attributes of ``module``, and registries of its own."""
        quantized = cls.__new__(cls)
        quantized.__dict__ = module.__dict__.copy()
        for registry in ("_parameters", "_buffers", "_modules"):
            quantized.__dict__[registry] = module.__dict__[registry].copy()
        return quantized

    def quantizers(self) -> Iterator[tuple[str, LSQQuantizer]]:
        """The quantizers that exist, by the name of their attribute."""
        for name in ("weight_quantizer", "input_quantizer", "output_quantizer"):
            quantizer = getattr(self, name)
            if quantizer is not None:
                yield name, quantizer

    def share_weight_quantizer(self, owner: QuantizedModule) -> None:
        """Quantize the weight, which is that of ``owner``, by the quantizer of ``owner``.

        The owner holds it. Here it is a plain attribute, so that a state dict has its scale once, as transformers'
        ``save_pretrained`` needs it.
        """
        self._modules.pop("weight_quantizer")
        vars(self)["weight_quantizer"] = owner.weight_quantizer

    def _replicate_for_data_parallel(self) -> Self:  # torch's name: nn.DataParallel copies a module by it
        if "weight_quantizer" in vars(self) and self.weight_quantizer is not None:
            raise NotImplementedError(
                f"{self.weight_quantizer.name!r} quantizes a weight that several layers share, which the replicas of "
                "nn.DataParallel cannot. Use DistributedDataParallel"
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-any-return, no-untyped-call]

    @property
    def has_plain_weight(self) -> bool:
        """Whether what is quantized is the parameter ``weight`` as it is, with the output channels on axis 0."""
        methods = ("float_weight", "channels_first", "from_channels_first", "quantized_weight")
        return all(getattr(type(self), name) is getattr(QuantizedModule, name) for name in methods)

    def initialize_weight(self) -> None:
        """Set the scales of the weight from its values."""
        if self.weight_quantizer is not None and not self.weight.is_meta:  # a state dict or training sets these
            self.weight_quantizer.initialize(self.channels_first(self.float_weight()))

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if self.weight_quantizer is None:
            return self.float_weight()
        return self.from_channels_first(self.weight_quantizer(self.channels_first(self.float_weight())))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # named as torch's layers name it
        weight, quantizer = self.quantized_weight(), self.input_quantizer
        if weight is self.weight:  # The parameter itself marks a use by others: functional_calls.py routes it here.
            weight = weight.view_as(weight)
        if (
            quantizer is None
            or torch.compiler.is_compiling()
            or not (quantizer.enabled and _is_unmodified(quantizer))
            or quantizer.keeps_waiting(input)
        ):
            y = self.compute(input if quantizer is None else quantizer(input), weight, *args, **kwargs)
        else:
            y = self._compute_eagerly(quantizer, input, weight, *args, **kwargs)
        return self.output_quantizer(y) if self.output_quantizer is not None else y

    def _compute_eagerly(self, quantizer: LSQQuantizer, v: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """:meth:`compute` on ``quantizer(v)``, with two ways to save time or memory in backward.

        Both need to know that the quantizer does LSQ and nothing else, and a compiler has better ways of its own.

        1. In a first layer, the input needs no gradient and its scale does. :func:`with_scale_gradient` then computes
           that gradient, and the quantized input is a constant for autograd.
        2. With :attr:`recompute_input`, backward quantizes the input again. The checkpoint ends at the first operation
           of :meth:`compute` that saves its operands, so that no convolution runs twice.
        """
        scale, qmin, qmax, grad_scale, channel_axis = quantizer.lsq_arguments(v)
        constants = qmin, qmax, grad_scale, channel_axis, quantizer.save_output_for_backward
        linear_part = self.linear_part() if scale.requires_grad and not v.requires_grad else None

        def quantize_and_compute(v: Tensor, scale: Tensor, weight: Tensor, *args: Any) -> Tensor:
            return self.compute(lsq_quantize_unchecked(v, scale, *constants), weight, *args, **kwargs)

        # All that backward reads is an argument, in which the checkpoint notices a change in place.
        operands = v, scale if linear_part is None else scale.detach(), weight, *args
        # torch.func forbids what checkpoints are made of.
        if self.recompute_input and torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            y: Tensor = checkpoint(quantize_and_compute, *operands, use_reentrant=False)
        else:
            y = quantize_and_compute(*operands)
        if linear_part is not None:
            y = with_scale_gradient(y, v, scale, weight, linear_part, qmin, qmax, grad_scale)
        return y

    def quant_record(self, name: str) -> QuantRecord:
        """The record of the layer in :func:`quantization_summary`, where its qualified name is ``name``."""
        weight, activation, output = self.weight_quantizer, self.input_quantizer, self.output_quantizer
        own = {weight, *self._modules.values()}  # The weight's may belong to a layer that it is shared with.
        scales = sum(q.scale.numel() for q in own if isinstance(q, LSQQuantizer))
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
            activation_zero_point=None if activation is None else activation.zero_point,
            activation_scale=_mean_scale(activation),
            output_bits=None if output is None else output.bits,
            weights=count,
            bytes=storage_bytes(count, bits, scales + biases),
        )

    @torch.no_grad()
    def _signal_to_noise(self) -> float | None:
        """Signal to noise of the quantized weight in decibel: infinite if it is exact, NaN for zeros."""
        if self.weight_quantizer is None or not self.weight_quantizer.is_initialized:
            return None
        weight = self.float_weight().double()
        noise = (self.quantized_weight().double() - weight).square().sum()
        return (10 * torch.log10(weight.square().sum() / noise)).item()

    # -- what a family of layers defines -----------------------------------------------------------------------

    def compute(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the float layer on quantized operands, with its further arguments."""
        raise NotImplementedError

    def float_weight(self) -> Tensor:
        """The weight that is quantized: the parameter, or what the layer computes of it, as a standardized weight."""
        return self.weight

    def linear_part(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """:meth:`compute` without its bias, if it is linear in the input; ``None`` forgoes :func:`with_scale_gradient`.

        It pays for convolutions, whose gradient of the input is expensive.
        """
        return None

    def channels_first(self, weight: Tensor) -> Tensor:
        """The weight with its output channels on axis 0, where the quantizer expects them."""
        return weight

    def from_channels_first(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`channels_first`."""
        return weight


def build_quantizers(layer: LayerConfig, channels: int, device: torch.device) -> dict[str, LSQQuantizer | None]:
    """The quantizers of ``"weight"``, ``"input"`` and ``"output"``; ``None`` where one stays in floating point."""

    def build(bits: int | None, **options: Any) -> LSQQuantizer | None:
        if bits is None:
            return None
        return LSQQuantizer(bits, init=layer.init, scale_domain=layer.scale_domain, device=device, **options)

    per_channel = {"channels": channels, "channel_axis": 0} if layer.weight_granularity == "channel" else {}
    signed = None if layer.activation_signed == "auto" else bool(layer.activation_signed)
    weight = build(layer.weight_bits, signed=True, **per_channel)
    activation = build(layer.activation_bits, signed=signed, axis0_is_batch=True)
    for quantizer in (weight, activation):
        if quantizer is not None:
            quantizer.save_output_for_backward = True  # the layer saves it too, and does not change it
    return {"weight": weight, "input": activation, "output": build(layer.output_bits, axis0_is_batch=True)}


def _mean_scale(quantizer: LSQQuantizer | None) -> float | None:
    return quantizer.scale.mean().item() if quantizer is not None and quantizer.is_initialized else None


def _is_unmodified(quantizer: LSQQuantizer) -> bool:
    """Whether ``quantizer`` computes LSQ of its input and nothing else.

    A subclass, a hook or a forward that was set on the object may change input and output, or ask for their gradients.
    """
    q = quantizer
    hooks = q._forward_pre_hooks, q._forward_hooks, q._backward_pre_hooks, q._backward_hooks
    is_own = type(q) is LSQQuantizer and "forward" not in vars(q)
    return is_own and not any(hooks) and not _has_any_global_hook()  # type: ignore[no-untyped-call]
