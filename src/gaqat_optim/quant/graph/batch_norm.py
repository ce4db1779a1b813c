"""Which BatchNorm a layer contains when it is deployed."""

from __future__ import annotations

import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.base import QuantizedModule
from ..nn.conv import QuantConv1d, QuantConv2d, QuantConv3d
from ..nn.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from ..nn.linear import QuantLinear
from .forward_graph import forward_graph
from .fx_trace import Trace
from .norm import Norm, affine_map, computes_norm, is_batch_norm, value_users
from .output_hook import quantize_output

# The number of axes that a layer's output has, channels second.
_AXES: dict[type[nn.Module], int] = {
    QuantLinear: 2,
    **dict.fromkeys((QuantConv1d, QuantConvTranspose1d), 3),
    **dict.fromkeys((QuantConv2d, QuantConvTranspose2d), 4),
    **dict.fromkeys((QuantConv3d, QuantConvTranspose3d), 5),
}
# The BatchNorms that check it; torch's others take any number.
_AXES_OF_NORM = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def folded_norm(traced: Trace, node: torch.fx.Node) -> tuple[Norm, list[torch.fx.Node]] | None:
    """The normalization that the layer at ``node`` contains when it is deployed, and the calls that compute it.

    It is the only user of the layer's output, has running statistics, and both are called once and have no hooks.
    """
    layer, users = traced.modules.get(node), value_users(node)
    if not isinstance(layer, QuantizedModule) or type(layer) not in _AXES or layer.output_quantizer is not None:
        return None
    has_hooks = any(hook is not quantize_output for hook in layer._forward_hooks.values())
    if len(users) != 1 or has_hooks or traced.uses[layer] != 1:
        return None
    channels = layer.channels_first(layer.weight).shape[0]
    shape = (1, channels, *[1] * (_AXES[type(layer)] - 2))
    if users[0] not in traced.modules:
        return _affine_map(traced, node, shape)
    module = traced.modules[users[0]]
    if traced.uses[module] != 1 or users[0].all_input_nodes != [node] or _has_hooks(module):
        return None
    norm = _batch_norm(module, shape) if is_batch_norm(module) else _own_forward(module, shape)
    return None if norm is None else (norm, users)


def _batch_norm(norm: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """A BatchNorm with torch's forward, if it fits to a layer; ``shape``: of one value a channel."""
    assert isinstance(norm, _BatchNorm)
    of_other_axes = any(isinstance(norm, kind) and len(shape) not in axes for kind, axes in _AXES_OF_NORM.items())
    fits = norm.running_mean is not None and norm.num_features == shape[1]
    return Norm(norm) if fits and not of_other_axes else None


def _own_forward(module: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """The normalization at the begin of the forward of a module that was not traced into."""
    graph = forward_graph(module) if computes_norm(module) else None
    if graph is None:
        return None
    calls, steps, bias = affine_map(next(iter(graph.nodes)), "", with_arithmetic=True)
    own_calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    is_output = [user.op for user in calls[-1].users] == ["output"]
    norm = Norm(module, tuple(steps), tuple(map(own_calls.index, calls)), is_output, bias)
    return norm if _fits(norm, shape) else None


def _affine_map(traced: Trace, node: torch.fx.Node, shape: tuple[int, ...]) -> tuple[Norm, list[torch.fx.Node]] | None:
    """The normalization of the value at ``node`` that a module's own forward computes; ``shape``: one value a channel.

    That forward is deployed without these calls, so it must have the same calls whatever its inputs are.
    """
    module, _ = traced.sites.get(value_users(node)[0], (None, 0))
    if module is None or traced.called[module] > 1:
        return None
    of_module = [call for call, (site, _) in traced.sites.items() if site is module]
    begins_with_it = computes_norm(module)
    if begins_with_it and _has_hooks(module):
        return None
    name = traced.names[module]
    calls, steps, bias = affine_map(node, f"{name}." if name else "", with_arithmetic=begins_with_it)
    graph = forward_graph(module) if calls else None
    alone = [] if graph is None else [n.target for n in graph.nodes if n.op in ("call_function", "call_method")]
    if not calls or [call.target for call in of_module] != alone or any(c not in of_module for c in calls):
        return None
    is_output = module in traced.returned_by.get(calls[-1], [])
    norm = Norm(module, tuple(steps), tuple(traced.sites[call][1] for call in calls), is_output, bias)
    return (norm, calls) if _fits(norm, shape) else None


def _fits(norm: Norm, shape: tuple[int, ...]) -> bool:
    # Where a forward goes on with the result, `rounded_biases` needs a bias to add to.
    has_place = norm.is_output or norm.bias is not None
    return has_place and all(step.acts_by_channel(norm.module, shape) for step in norm.steps)


def _has_hooks(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(hook is not quantize_output for hook in hooks)
