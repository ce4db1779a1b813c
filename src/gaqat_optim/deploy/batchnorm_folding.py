"""Which BatchNorm belongs to which layer, and the affine map that it is in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..quant.graph.batch_norm import folded_norm
from ..quant.graph.network_trace import trace
from ..quant.graph.norm import Norm, computes_norm, has_channel_tensors, is_batch_norm
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
    mean = module.running_mean.detach().to(torch.float64)
    gain = (module.running_var.detach().to(torch.float64) + module.eps).rsqrt()
    if module.weight is not None:
        gain = gain * module.weight.detach().to(torch.float64)
    shift = torch.zeros_like(mean) if module.bias is None else module.bias.detach().to(torch.float64)
    return gain, shift + gain * ((0.0 if bias is None else bias.detach().to(torch.float64)) - mean)


def _after_steps(norm: Norm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    operands = [step.evaluate(norm.module).reshape(-1) for step in norm.steps]
    channels, device = max(len(operand) for operand in operands), operands[0].device
    gain = torch.ones(channels, dtype=torch.float64, device=device)
    shift = torch.zeros_like(gain) if bias is None else bias.detach().to(torch.float64)
    for step, operand in zip(norm.steps, operands, strict=True):
        if step.kind in ("add", "subtract"):
            shift = shift + operand if step.kind == "add" else shift - operand
        else:
            factor = operand if step.kind == "multiply" else 1 / operand
            gain, shift = gain * factor, shift * factor
    return gain, shift


def following_norms(model: nn.Module) -> dict[QuantizedModule, Norm]:
    """The normalizations that can be folded, by the layer that each of them follows.

    The network is traced (``torch.fx`` or ``torch.export``), for analysis alone. A pair counts if the normalization has
    running statistics, is the only user of the layer's output, and both modules are used once. No forward calls
    ``F.linear`` with the weight of the layer, which has no output quantizer; the BatchNorm may have one behind it.

    In a network that cannot be traced there are none, and a warning says why.
    """
    if isinstance(model, QuantizedModule) or not any(map(_may_normalize, model.modules())):
        return {}
    traced = trace(model, "its BatchNorms stay separate layers in floating point: correct, but slower")
    if traced is None:
        return {}
    read = {layer for _, layer in routed_layers(model)}  # They may be called with another bias.
    folded = {layer: folded_norm(traced, node) for node, layer in traced.modules.items() if layer not in read}
    return {layer: pair[0] for layer, pair in folded.items() if isinstance(layer, QuantizedModule) and pair is not None}


def _may_normalize(module: nn.Module) -> bool:
    """Whether there is something to look for: a network without it need not be traceable."""
    if is_batch_norm(module) or computes_norm(module):
        return True
    has_layers = any(isinstance(child, QuantizedModule) for child in module.children())
    return has_layers and has_channel_tensors(module._buffers.values())
