"""Which BatchNorm belongs to which layer, and the affine map that it is in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantizedModule,
    QuantLinear,
)
from ..quant.outputs import quantize_output
from ..quant.trace import trace

# By exact type: a subclass may have a forward of its own.
_NORM_OF: dict[type[nn.Module], type[_BatchNorm]] = {
    QuantLinear: nn.BatchNorm1d,
    QuantConv1d: nn.BatchNorm1d,
    QuantConv2d: nn.BatchNorm2d,
    QuantConv3d: nn.BatchNorm3d,
    QuantConvTranspose1d: nn.BatchNorm1d,
    QuantConvTranspose2d: nn.BatchNorm2d,
    QuantConvTranspose3d: nn.BatchNorm3d,
}


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
    without output quantizer has one user, a BatchNorm of the matching type with running statistics, and both modules
    are used once in all. The BatchNorm may have an output quantizer behind it.

    Args:
        model: a quantized network in evaluation mode.

    Returns:
        The pairs; none, with a warning that says why, where the network cannot be traced.
    """
    if isinstance(model, QuantizedModule) or not any(type(m) in _NORM_OF.values() for m in model.modules()):
        return {}
    traced = trace(model, "its BatchNorms stay separate layers in floating point: correct, but slower")
    if traced is None:
        return {}
    pairs = {}
    for node, layer in traced.modules.items():
        if not isinstance(layer, QuantizedModule) or len(node.users) != 1:
            continue
        norm = traced.modules.get(next(iter(node.users)))
        if norm is not None and traced.uses[layer] == traced.uses[norm] == 1 and _fits(layer, norm):
            assert isinstance(norm, _BatchNorm)
            pairs[layer] = norm
    return pairs


def _fits(layer: QuantizedModule, norm: nn.Module) -> bool:
    if type(norm) is not _NORM_OF.get(type(layer)) or layer.output_quantizer is not None:
        return False
    hooks = [*layer._forward_hooks.values(), *norm._forward_hooks.values(), *norm._forward_pre_hooks.values()]
    if any(hook is not quantize_output for hook in hooks):
        return False
    return norm.running_mean is not None and norm.num_features == layer.by_channel(layer.weight).shape[0]
