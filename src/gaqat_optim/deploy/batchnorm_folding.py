"""Which BatchNorm belongs to which layer, and the affine map that it is in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.graph.batch_norm import folded_norm, is_batch_norm
from ..quant.graph.fx_trace import trace
from ..quant.nn.base import QuantizedModule


def fold_batchnorm(norm: _BatchNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gain and bias of a layer and a BatchNorm together, in evaluation mode: ``gain * (y without bias) + bias``.

    The bias of the layer has the shape ``(channels,)``, and so have the results, which are float64.

    >>> norm = nn.BatchNorm1d(1, eps=0.0)
    >>> norm.running_var.fill_(4.0)
    tensor([4.])
    >>> fold_batchnorm(norm, torch.ones(1))
    (tensor([0.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = norm.running_mean.detach().to(torch.float64)
    gain = (norm.running_var.detach().to(torch.float64) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().to(torch.float64)
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().to(torch.float64)
    return gain, shift + gain * ((0.0 if bias is None else bias.detach().to(torch.float64)) - mean)


def following_norms(model: nn.Module) -> dict[QuantizedModule, _BatchNorm]:
    """The BatchNorms that can be folded, by the layer that each of them follows.

    The network is traced symbolically (``torch.fx``), for analysis alone. A pair counts if the BatchNorm has running
    statistics and torch's forward, is the only user of the layer's output, and both modules are used once. The layer
    has no output quantizer; the BatchNorm may have one behind it.

    In a network that cannot be traced there are none, and a warning says why.
    """
    if isinstance(model, QuantizedModule) or not any(map(is_batch_norm, model.modules())):
        return {}
    traced = trace(model, "its BatchNorms stay separate layers in floating point: correct, but slower")
    if traced is None:
        return {}
    pairs = {layer: folded_norm(traced, node) for node, layer in traced.modules.items()}
    return {layer: norm for layer, norm in pairs.items() if isinstance(layer, QuantizedModule) and norm is not None}
