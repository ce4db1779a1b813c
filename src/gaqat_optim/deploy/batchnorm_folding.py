"""Which BatchNorm belongs to which layer, and the affine map that it is in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.graph.batch_norm import folded_norm, is_batch_norm
from ..quant.graph.fx_trace import trace
from ..quant.nn.base import QuantizedModule


@dataclass(frozen=True)
class Affine:
    """What a BatchNorm computes in evaluation mode: ``gain * (y - mean) + shift``, float64 of shape ``(channels,)``."""

    gain: Tensor
    mean: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm) -> Affine:
        """The map of ``norm``, which has running statistics.

        >>> norm = nn.BatchNorm1d(1, eps=0.0)
        >>> norm.running_var.fill_(4.0)
        tensor([4.])
        >>> Affine.of(norm).gain
        tensor([0.5000], dtype=torch.float64)
        """
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = norm.running_mean.detach().to(torch.float64)
        gain = (norm.running_var.detach().to(torch.float64) + norm.eps).rsqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.detach().to(torch.float64)
        shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().to(torch.float64)
        return cls(gain, mean, shift)

    def bias(self, bias: Tensor | None) -> Tensor:
        """The bias of layer and norm together."""
        return self.shift + self.gain * ((0.0 if bias is None else bias.to(torch.float64)) - self.mean)


def following_norms(model: nn.Module) -> dict[QuantizedModule, _BatchNorm]:
    """The BatchNorms that can be folded, by the layer that each of them follows.

    The network is traced symbolically (``torch.fx``), for analysis alone. A pair is found where the output of a layer
    without output quantizer has one user, a BatchNorm that can be folded into it (running statistics, no forward of its
    own), and both modules are used once in all. The BatchNorm may have an output quantizer behind it.

    Args:
        model: a quantized network in evaluation mode.

    Returns:
        The pairs; none, with a warning that says why, where the network cannot be traced.
    """
    if isinstance(model, QuantizedModule) or not any(map(is_batch_norm, model.modules())):
        return {}
    traced = trace(model, "its BatchNorms stay separate layers in floating point: correct, but slower")
    if traced is None:
        return {}
    found = {layer: folded_norm(traced, node) for node, layer in traced.modules.items()}
    return {layer: norm for layer, norm in found.items() if isinstance(layer, QuantizedModule) and norm is not None}
