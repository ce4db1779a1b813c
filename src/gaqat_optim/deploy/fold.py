"""Which BatchNorm belongs to which layer, and the affine map that it is in evaluation mode."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
import torch.fx
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
    are used once in all.

    Args:
        model: a quantized network in evaluation mode.

    Returns:
        The pairs; none, with a warning that says why, where the network cannot be traced.
    """
    if isinstance(model, QuantizedModule) or not any(type(m) in _NORM_OF.values() for m in model.modules()):
        return {}
    before = set(vars(model))
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # Whatever the network's own code raises when its inputs are symbols.
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        warnings.warn(
            f"{type(model).__name__} cannot be traced symbolically, so its BatchNorms stay separate layers in floating "
            f"point: correct, but slower. {reason}",
            stacklevel=3,
        )
        return {}
    finally:
        for constant in set(vars(model)) - before:  # The tracer leaves the tensors that forward makes on the model.
            delattr(model, constant)
    called = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = Counter(id(module) for module in called.values())
    # A parameter that forward reads by itself: the module's call is then not its only use.
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    uses.update(id(model.get_submodule(target.rpartition(".")[0])) for target in read)
    pairs = {}
    for node, layer in called.items():
        if not isinstance(layer, QuantizedModule) or len(node.users) != 1:
            continue
        norm = called.get(next(iter(node.users)))
        if norm is not None and uses[id(layer)] == uses[id(norm)] == 1 and _fits(layer, norm):
            assert isinstance(norm, _BatchNorm)
            pairs[layer] = norm
    return pairs


def _fits(layer: QuantizedModule, norm: nn.Module) -> bool:
    if type(norm) is not _NORM_OF.get(type(layer)) or layer.output_quantizer is not None:
        return False
    hooked = any((layer._forward_hooks, norm._forward_hooks, norm._forward_pre_hooks))
    channels = layer.by_channel(layer.weight).shape[0]
    return norm.running_mean is not None and norm.num_features == channels and not hooked


class _Tracer(torch.fx.Tracer):
    """Takes every module for one operation that holds nothing to fold: fewer of them have to be traceable."""

    proxy_buffer_attributes = True  # A running mean that forward reads appears in the graph, as a parameter does.

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (QuantizedModule, _BatchNorm)
        return isinstance(m, kinds) or not any(isinstance(child, kinds) for child in m.modules())
