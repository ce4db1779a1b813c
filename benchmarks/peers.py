"""Fake quantization by five packages. Each peer is a module made from one of our quantizers, and computes the same.

All but the floor have our scale, integer bounds and granularity, a learned scale of shape (1,) or (channels,), float32,
and give the same codes (``assert_same_codes``):

``ours``
    ``LSQQuantizer`` as ``quantize_model`` makes it: learns log(s), LSQ's exact gradient, gradient scale 1/sqrt(N Qp).
``built-in``
    ``torch._fake_quantize_learnable_per_{tensor,channel}_affine``, which ``_LearnableFakeQuantize`` of
    ``torch.ao.quantization`` calls. Its observers are left out; the zero point is 0 and not learned; the scale is
    clamped before each call as in that class; the gradient scale goes in as ``grad_factor``.
``torchao``
    ``torchao.quantization.quant_primitives._fake_quantize_affine``, which ``IntxFakeQuantizer`` calls when it learns
    ranges. That class is for 2-dimensional weights in groups and for tokens, so the primitive is called with one block
    for the tensor, or one per channel. It has no gradient scale, which is less work.
``Brevitas``
    ``Int8ActPerTensorFloatMinMaxInit`` or ``Uint8ActPerTensorFloatMaxInit`` with 4 bits for activations, whose scale
    is a parameter from the start; ``Int8WeightPer{Tensor,Channel}Float`` with ``PARAMETER_FROM_STATS`` and the full
    range for weights, whose scale is set to ours after the first call. Without ``BREVITAS_JIT``, its default. It has no
    gradient scale either. Its result for each tensor is unpacked to the value.
``composition``
    LSQ written in torch operators with "detach tricks" for rounding and gradient scale, as the widespread
    implementations do, lsq-net among them; from the formulas of arXiv 1902.08153.
``floor``
    No package: the memory traffic that no quantizer can do without. Forward copies the tensor, backward reads the
    gradient and the tensor and writes a gradient.

In a network, each peer's quantizers have the same place in the same layers (:func:`quantize_like`): a peer's own layer
classes would only add to it.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaqat_optim import LSQQuantizer


class BuiltIn(nn.Module):
    def __init__(self, quantizer: LSQQuantizer) -> None:
        super().__init__()
        self.scale = nn.Parameter(quantizer.scale.detach().clone())
        self.zero_point = nn.Parameter(torch.zeros_like(self.scale), requires_grad=False)
        self.bounds, self.axis = (quantizer.qmin, quantizer.qmax), quantizer.channel_axis

    def forward(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(min=torch.finfo(torch.float32).eps)
        grad_scale = 1 / math.sqrt(v.numel() // self.scale.numel() * self.bounds[1])
        if self.axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(
                v, self.scale, self.zero_point, *self.bounds, grad_scale
            )
        return torch._fake_quantize_learnable_per_channel_affine(
            v, self.scale, self.zero_point, self.axis, *self.bounds, grad_scale
        )


class TorchAO(nn.Module):
    def __init__(self, quantizer: LSQQuantizer) -> None:
        super().__init__()
        from torchao.quantization.quant_primitives import _fake_quantize_affine

        self.primitive = _fake_quantize_affine
        self.scale = nn.Parameter(quantizer.scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros_like(self.scale))
        self.bounds, self.axis = (quantizer.qmin, quantizer.qmax), quantizer.channel_axis

    def forward(self, v: Tensor) -> Tensor:
        block = tuple(1 if axis == self.axis else size for axis, size in enumerate(v.shape))
        return self.primitive(v, block, self.scale, self.zero_point, torch.int32, *self.bounds)


class BrevitasActivation(nn.Module):
    def __init__(self, quantizer: LSQQuantizer) -> None:
        super().__init__()
        import brevitas.nn
        from brevitas.quant import Int8ActPerTensorFloatMinMaxInit, Uint8ActPerTensorFloatMaxInit

        # The scale is the larger bound divided by 2^(bits - 1) or, unsigned, 2^bits - 1.
        bound = quantizer.scale.item() * (-quantizer.qmin or quantizer.qmax)
        act_quant = Int8ActPerTensorFloatMinMaxInit if quantizer.signed else Uint8ActPerTensorFloatMaxInit
        bounds = {"min_val": -bound, "max_val": bound} if quantizer.signed else {"max_val": bound}
        self.layer = brevitas.nn.QuantIdentity(
            act_quant=act_quant, bit_width=quantizer.bits, return_quant_tensor=False, **bounds
        )

    def forward(self, v: Tensor) -> Tensor:
        return self.layer(v)


class BrevitasWeight(nn.Module):
    def __init__(self, quantizer: LSQQuantizer, weight: Tensor) -> None:
        super().__init__()
        import brevitas.nn
        from brevitas.inject.enum import ScalingImplType
        from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat

        layer_class = brevitas.nn.QuantLinear if weight.dim() == 2 else brevitas.nn.QuantConv2d
        sizes = (weight.shape[1], weight.shape[0], *([weight.shape[2]] if weight.dim() == 4 else []))
        layer = layer_class(
            *sizes,
            bias=False,
            weight_quant=Int8WeightPerTensorFloat if quantizer.channel_axis is None else Int8WeightPerChannelFloat,
            weight_bit_width=quantizer.bits,
            weight_narrow_range=False,
            weight_scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS,
        )
        self.proxy = layer.weight_quant
        with torch.no_grad():
            self.proxy(layer.weight)  # Brevitas sets the learned scale in the first forward
            value = next(p for name, p in self.proxy.named_parameters() if name.endswith("scaling_impl.value"))
            value.copy_((quantizer.scale * -quantizer.qmin).view_as(value))

    def forward(self, v: Tensor) -> Tensor:
        return self.proxy(v)[0]


class Composition(nn.Module):
    def __init__(self, quantizer: LSQQuantizer) -> None:
        super().__init__()
        self.scale = nn.Parameter(quantizer.scale.detach().clone())
        self.bounds, self.axis = (quantizer.qmin, quantizer.qmax), quantizer.channel_axis

    def forward(self, v: Tensor) -> Tensor:
        grad_scale = 1 / math.sqrt(v.numel() // self.scale.numel() * self.bounds[1])
        scaled = self.scale * grad_scale
        s = (self.scale - scaled).detach() + scaled
        if self.axis is not None:
            s = s.view([-1 if axis == self.axis else 1 for axis in range(v.dim())])
        u = (v / s).clamp(*self.bounds)
        return ((u.round() - u).detach() + u) * s


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return torch.add(grad, ctx.saved_tensors[0], alpha=0)


class Floor(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return _Floor.apply(v)


OURS, FLOOR = "ours", "floor"
PEERS = ("built-in", "torchao", "Brevitas", "composition")


def missing_peers() -> dict[str, str]:
    """The peers that cannot be imported, with the reason."""
    missing = {}
    for name, package in (("torchao", "torchao.quantization.quant_primitives"), ("Brevitas", "brevitas.nn")):
        try:
            importlib.import_module(package)
        except Exception as error:  # a package that is broken beside this torch is missing as well
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return missing


def peer_quantizer(name: str, quantizer: LSQQuantizer, v: Tensor) -> nn.Module:
    """A package's quantizer that computes for ``v`` what ``quantizer`` computes."""
    if name == FLOOR:
        return Floor()
    if name == "Brevitas":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return BrevitasActivation(quantizer) if quantizer.axis0_is_batch else BrevitasWeight(quantizer, v)
    return {"built-in": BuiltIn, "torchao": TorchAO, "composition": Composition}[name](quantizer)


@torch.no_grad()
def assert_same_codes(name: str, module: nn.Module, quantizer: LSQQuantizer, v: Tensor) -> None:
    """Raise unless ``module`` gives the codes of ``quantizer``, except a few between two codes."""
    different = ((module(v) - quantizer(v)).abs() > 1e-4 * quantizer.scale.max()).float().mean().item()
    if different > 1e-3:
        raise RuntimeError(f"{name} does not quantize as we do: {different:.2%} of the values differ")


class Layer(nn.Module):
    """A convolution or linear layer with one module that quantizes its input and one that quantizes its weight."""

    def __init__(self, layer: nn.Module, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        super().__init__()
        self.layer, self.input_quantizer, self.weight_quantizer = layer, input_quantizer, weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def quantize_like(quantized: nn.Module, model: nn.Module, name: str) -> nn.Module:
    """A copy of the float ``model`` with a package's quantizers where ``quantized``, made by us, has quantizers."""
    model = copy.deepcopy(model)
    for key, layer in list(model.named_modules()):
        ours = quantized.get_submodule(key)
        if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(ours, "weight_quantizer", None) is not None:
            input_quantizer = peer_quantizer(name, ours.input_quantizer, layer.weight)
            weight_quantizer = peer_quantizer(name, ours.weight_quantizer, layer.weight)
            model.set_submodule(key, Layer(layer, input_quantizer, weight_quantizer))
    return model
