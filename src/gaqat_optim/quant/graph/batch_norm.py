"""Which BatchNorm a layer contains when it is deployed."""

from __future__ import annotations

import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.base import QuantizedModule
from ..nn.conv import QuantConv1d, QuantConv2d, QuantConv3d
from ..nn.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from ..nn.linear import QuantLinear
from .fx_trace import Trace
from .output_hook import quantize_output

# The BatchNorm for the number of axes that a layer's output has; torch's others take any number.
_NORM_OF: dict[type[nn.Module], type[_BatchNorm]] = {
    QuantLinear: nn.BatchNorm1d,
    QuantConv1d: nn.BatchNorm1d,
    QuantConv2d: nn.BatchNorm2d,
    QuantConv3d: nn.BatchNorm3d,
    QuantConvTranspose1d: nn.BatchNorm1d,
    QuantConvTranspose2d: nn.BatchNorm2d,
    QuantConvTranspose3d: nn.BatchNorm3d,
}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` computes what torch's BatchNorm does in evaluation mode.

    Subclasses that only check other shapes do, and so does ``nn.SyncBatchNorm``, which differs in training alone. A
    subclass with a forward of its own may not.
    """
    forwards = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, _BatchNorm) and type(module).forward in forwards and "forward" not in vars(module)


def folded_norm(traced: Trace, node: torch.fx.Node) -> _BatchNorm | None:
    """The BatchNorm that the layer at ``node`` contains when it is deployed.

    It is the only user of the layer's output, has running statistics, and both are called once and have no hooks.
    """
    layer, users = traced.modules.get(node), list(node.users)
    norm = traced.modules.get(users[0]) if len(users) == 1 else None
    if not isinstance(layer, QuantizedModule) or type(layer) not in _NORM_OF or layer.output_quantizer is not None:
        return None
    if not isinstance(norm, _BatchNorm) or not is_batch_norm(norm) or not traced.uses[layer] == traced.uses[norm] == 1:
        return None
    of_other_axes = isinstance(norm, tuple(_NORM_OF.values())) and not isinstance(norm, _NORM_OF[type(layer)])
    hooks = [*layer._forward_hooks.values(), *norm._forward_hooks.values(), *norm._forward_pre_hooks.values()]
    if of_other_axes or any(hook is not quantize_output for hook in hooks):
        return None
    fits = norm.running_mean is not None and norm.num_features == layer.channels_first(layer.weight).shape[0]
    return norm if fits else None
