"""Which BatchNorm belongs to which layer, and the affine map that it is in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.graph.batch_norm import fold_norms
from ..quant.graph.network_trace import trace
from ..quant.graph.norm import Norm, computes_norm, has_channel_tensors
from ..quant.nn.base import QuantizedModule
from ..quant.nn.functional_calls import routed_layers


def fold_batchnorm(norm: Norm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gain and bias of a layer and a BatchNorm together, in evaluation mode: ``gain * (y without bias) + bias``.

    The bias of the layer has the shape ``(channels,)``, and so have the results, which are float64.

    >>> batch_norm = nn.BatchNorm1d(1, eps=0.0)
    >>> batch_norm.running_var.fill_(4.0)
    tensor([4.])
    >>> fold_batchnorm(Norm(batch_norm), torch.ones(1))
    (tensor([0.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    if norm.steps:
        return _after_steps(norm, bias)
    module: Any = norm.module
    channels = list(norm.channels) or slice(None)
    mean = _float64(module.running_mean)[channels]
    gain = (_float64(module.running_var)[channels] + module.eps).rsqrt()
    if module.weight is not None:
        gain = gain * _float64(module.weight)[channels]
    shift = torch.zeros_like(mean) if module.bias is None else _float64(module.bias)[channels]
    return gain, shift + gain * ((0.0 if bias is None else _float64(bias)) - mean)


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def _after_steps(norm: Norm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    operands = [step.evaluate(norm.module).reshape(-1) for step in norm.steps]
    size, device = max(len(operand) for operand in operands), operands[0].device
    channels = list(norm.channels) or slice(None)
    gain = torch.ones(size, dtype=torch.float64, device=device)[channels]
    shift = torch.zeros_like(gain) if bias is None else _float64(bias)
    for step, operand in zip(norm.steps, (v.expand(size)[channels] for v in operands), strict=True):
        if step.kind in ("add", "subtract"):
            shift = shift + operand if step.kind == "add" else shift - operand
        else:
            factor = operand if step.kind == "multiply" else 1 / operand
            gain, shift = gain * factor, shift * factor
    return gain, shift


def following_norms(model: nn.Module) -> tuple[dict[QuantizedModule, Norm], dict[nn.Module, str]]:
    """The normalizations that can be folded, by layer, and why others that follow a layer cannot be, by their module.

    The network is traced (``torch.fx`` or ``torch.export``), for analysis alone; see
    :func:`~gaqat_optim.quant.graph.batch_norm.fold_norms`. A layer has no output quantizer; the BatchNorm may have one
    behind it.

    In a network that cannot be traced there are none, and a warning says why.
    """
    if not any(map(_may_normalize, model.modules())):
        return {}, {}
    inside = {
        norm: "the forward of its layer calls it"
        for layer in model.modules()
        if isinstance(layer, QuantizedModule)
        for norm in layer.modules()
        if isinstance(norm, _BatchNorm) or (norm is not layer and computes_norm(norm))
    }
    if isinstance(model, QuantizedModule):
        return {}, inside
    traced = trace(model, "its BatchNorms stay separate layers in floating point: correct, but slower")
    if traced is None:
        return {}, inside
    folded, left = fold_norms(traced)
    read = {layer for _, layer in routed_layers(model)}  # a forward may call them with another bias
    norms: dict[QuantizedModule, Norm] = {}
    for node, (norm, _) in folded.items():
        layer = traced.modules[node]
        assert isinstance(layer, QuantizedModule)
        if layer in read:
            left[norm.module] = "a forward calls F.linear with the weight of its layer"
        else:
            norms[layer] = norm
    return norms, {**left, **inside}


def _may_normalize(module: nn.Module) -> bool:
    """Whether there is something to look for: a network without it need not be traceable."""
    if isinstance(module, _BatchNorm) or computes_norm(module):
        return True
    has_layers = any(isinstance(child, QuantizedModule) for child in module.children())
    return has_layers and has_channel_tensors(module._buffers.values())
