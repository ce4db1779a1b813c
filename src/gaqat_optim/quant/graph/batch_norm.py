"""Which BatchNorm a layer contains when it is deployed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.base import QuantizedModule
from ..nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from ..nn.library_layers import QuantConvSame, QuantTransposedLinear
from ..nn.linear import QuantLinear
from .forward_around import passes_output
from .forward_graph import forward_graph
from .fx_trace import Trace
from .moves import channel_numbers, moves_values
from .norm import (
    Norm,
    affine_map,
    computes_norm,
    has_channel_tensors,
    is_batch_norm,
    is_batch_norm_call,
    is_constant,
    reads_shape,
    value_users,
)
from .output_hook import has_hooks, quantize_output

# The layers that can contain one, and the number of axes that their output has: channels second, or last of any number.
_AXES: dict[type[nn.Module], tuple[int, ...]] = {
    **dict.fromkeys((QuantConv1d, QuantConvTranspose1d), (3,)),
    **dict.fromkeys((QuantConv2d, QuantConvTranspose2d, QuantConvSame), (4,)),
    **dict.fromkeys((QuantConv3d, QuantConvTranspose3d), (5,)),
    **dict.fromkeys((QuantLinear, QuantTransposedLinear), (2, 3, 4)),
}
_CHANNELS_LAST = (QuantLinear, QuantTransposedLinear)
# The BatchNorms that check the number of axes; torch's others take any.
_AXES_OF_NORM = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}

_Node = torch.fx.Node


class NotFoldableError(Exception):
    """Why a normalization stays as it is, in words."""


def fold_norms(traced: Trace) -> tuple[dict[_Node, tuple[Norm, list[_Node]]], dict[nn.Module, str]]:
    """The normalizations that layers contain when they are deployed, and those behind layers that stay.

    A normalization is folded into the layers that made its input, by moves of values alone: a ``torch.cat`` of several
    layers, a ``flatten`` that keeps the axis of channels. Nothing else reads what is between them. It has running
    statistics, and all are called once and have no hooks.

    Returns:
        By the call of each layer, its part of the normalization, and the calls from the layer to the result. Then, by
        the module that computes it, why each other normalization that follows a layer stays.
    """
    folded: dict[_Node, tuple[Norm, list[_Node]]] = {}
    left: dict[nn.Module, str] = {}
    results: dict[_Node, _Node] = {}  # of the norms that are folded, with their inputs
    for module, value, call in _normalizations(traced):
        layers, moves, obstacle = _origins(traced, value, results)
        if not layers:
            continue
        try:
            if obstacle in results:
                raise NotFoldableError(f"the layer contains {_described(traced, obstacle)} already")
            if obstacle is not None:
                raise NotFoldableError(f"its input comes from {_described(traced, obstacle)}, too")
            _check_readers(traced, [*layers, *moves], call)
            _check_hooks(traced, moves)
            parts, calls = _fold(traced, layers, module, value, call)
        except NotFoldableError as reason:
            if any(traced.modules[layer].output_quantizer is not None for layer in layers):
                continue  # the layers have integer kernels without it
            # Other arithmetic with tensors of a module's own need not be a normalization.
            if isinstance(module, _BatchNorm) or is_batch_norm_call(call) or has_channel_tensors(module.buffers()):
                left[module] = str(reason)
            continue
        for layer, part in parts.items():
            folded[layer] = part, [*moves, *calls]
        results[calls[-1]] = value
    return folded, left


def _normalizations(traced: Trace) -> Iterator[tuple[nn.Module, _Node, _Node]]:
    """Each normalization: the module that computes it, its input, and the call that reads the input."""
    begins: dict[nn.Module, bool] = {}  # whether a norm may still come at the begin of a module's own forward
    for node in traced.nodes:
        module, (site, _) = traced.modules.get(node), traced.sites.get(node, (None, 0))
        if module is not None:
            if not isinstance(module, QuantizedModule) and (isinstance(module, _BatchNorm) or computes_norm(module)):
                yield module, node.all_input_nodes[0], node
        elif site is not None and not is_constant(node) and not reads_shape(node):
            if site not in begins:
                begins[site] = computes_norm(site)
            if begins[site] or is_batch_norm_call(node):
                yield site, next(operand for operand in node.all_input_nodes if not is_constant(operand)), node
            begins[site] = False


def _origins(traced: Trace, value: _Node, results: dict[_Node, _Node]) -> tuple[list[_Node], list[_Node], _Node | None]:
    """The layers that made a value by moves, these moves, and another operation that made a part of it.

    A norm that is folded into its layer is such an operation: a layer contains one.
    """
    found: dict[_Node, bool] = {}  # whether it is a layer
    obstacle, waiting = None, [value]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = is_layer = isinstance(traced.modules.get(node), QuantizedModule)
        if is_layer:
            continue
        if moves_values(traced, node):
            waiting += [operand for operand in node.all_input_nodes if node in value_users(operand)]
            continue
        obstacle = obstacle or node
        if node in results:
            waiting.append(results[node])
    order = {node: position for position, node in enumerate(traced.nodes)}
    nodes = sorted(found, key=order.__getitem__)
    layers = [node for node in nodes if found[node]]
    return layers, [node for node in nodes if node not in layers and moves_values(traced, node)], obstacle


def _check_readers(traced: Trace, nodes: list[_Node], call: _Node) -> None:
    for node in nodes:
        for user in value_users(node):
            if user is not call and user not in nodes:
                raise NotFoldableError(f"{_described(traced, node)} is also read by {_described(traced, user)}")


def _check_hooks(traced: Trace, moves: list[_Node]) -> None:
    for node in moves:
        module = traced.modules.get(node)
        # An output quantizer's hook counts too, unlike in has_hooks: the norm comes after its rounding.
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise NotFoldableError(f"{_described(traced, node)} has hooks")


def _described(traced: Trace, node: _Node) -> str:
    if node.op == "output":
        return "the network's output"
    if node in traced.modules:
        return repr(traced.names[traced.modules[node]])
    return str(getattr(node.target, "__name__", node.target))


def _fold(
    traced: Trace, layers: list[_Node], module: nn.Module, value: _Node, call: _Node
) -> tuple[dict[_Node, Norm], list[_Node]]:
    """The part of a normalization for each layer, and the calls that compute it."""
    kinds = [_kind(traced, layer) for layer in layers]
    modules: list[Any] = [traced.modules[layer] for layer in layers]
    channels = [len(layer.channels_first(layer.weight)) for layer in modules]
    axis = [-1 if kind in _CHANNELS_LAST else 1 for kind in kinds]
    numbers: list[int] = []
    fitting = {}  # the number of axes of the layers' output: that of the norm's input
    for axes in _AXES[kinds[0]]:
        found = channel_numbers(traced, value, dict(zip(layers, zip(channels, axis, strict=True), strict=True)), axes)
        if found is not None and sorted(found[0]) == list(range(sum(channels))):
            numbers, fitting[axes] = found
    if not fitting:
        raise NotFoldableError("its axis 1 does not have the channels of a layer's output")
    shapes = [(1, sum(channels), *[1] * (axes - 2)) for axes in fitting.values()]
    norm, calls = _norm(traced, module, value, call, shapes)
    positions = {number: position for position, number in enumerate(numbers)}
    size = sum(channels)
    parts, first = {}, 0
    for layer, count in zip(layers, channels, strict=True):
        own = tuple(positions[number] for number in range(first, first + count))
        parts[layer] = replace(norm, channels=() if own == tuple(range(size)) else own, size=size, axes=tuple(fitting))
        first += count
    return parts, calls


def _kind(traced: Trace, node: _Node) -> type[nn.Module]:
    """Which of the layers that can contain a norm the one at ``node`` is."""
    layer, name = traced.modules[node], _described(traced, node)
    assert isinstance(layer, QuantizedModule)
    kinds = [kind for kind in _AXES if isinstance(layer, kind) and type(layer).compute is kind.compute]  # type: ignore[attr-defined]
    if not kinds:
        raise NotFoldableError(f"{name}, a {type(layer).__name__}, cannot contain one")
    if not passes_output(layer):
        raise NotFoldableError(f"{name} has a forward of its own, which may change its output")
    if traced.uses[layer] != 1:
        raise NotFoldableError(f"{name} is called, or its parameters are read, more than once")
    if any(hook is not quantize_output for hook in layer._forward_hooks.values()):
        raise NotFoldableError(f"a hook reads the output of {name}")
    if layer.output_quantizer is not None:
        raise NotFoldableError(f"the output of {name} is quantized before it")
    return kinds[0]


def _norm(
    traced: Trace, module: nn.Module, value: _Node, call: _Node, shapes: list[tuple[int, ...]]
) -> tuple[Norm, list[_Node]]:
    """The normalization that ``call`` begins, and the calls of it; ``shapes``: of one value a channel."""
    if call not in traced.modules:
        norm, calls = _affine_map(traced, module, value)
    else:
        if traced.uses[module] != 1 or call.all_input_nodes != [value]:
            raise NotFoldableError("it is called, or its tensors are read, more than once")
        if has_hooks(module):
            raise NotFoldableError("it has hooks")
        if is_batch_norm(module):
            return _batch_norm(module, shapes), [call]
        norm, calls = _own_forward(module), [call]
    if not norm.is_output and norm.bias is None:
        # `rounded_biases` needs a bias to add to where a forward goes on with the result.
        norm = replace(norm, bias=_absent_bias(norm))
        if norm.bias is None:
            raise NotFoldableError("its forward goes on with the result, and has no bias")
    if not all(step.acts_by_channel(norm.module, shape) for step in norm.steps for shape in shapes):
        raise NotFoldableError("it does not normalize each channel by one value")
    return norm, calls


def _batch_norm(norm: nn.Module, shapes: list[tuple[int, ...]]) -> Norm:
    """A BatchNorm with torch's forward."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None:
        raise NotFoldableError("it has no running statistics")
    for kind, axes in _AXES_OF_NORM.items():
        if isinstance(norm, kind) and any(len(shape) not in axes for shape in shapes):
            raise NotFoldableError("it is for another number of axes")
    if any(norm.num_features != shape[1] for shape in shapes):
        raise NotFoldableError("it is for another number of channels")
    return Norm(norm)


def _own_forward(module: nn.Module) -> Norm:
    """The normalization at the begin of the forward of a module that was not traced into."""
    graph = forward_graph(module)
    calls, steps, bias = ([], [], None) if graph is None else affine_map(next(iter(graph.nodes)), "")
    if graph is None or not calls:
        raise NotFoldableError("its forward begins with no normalization by running statistics that can be traced")
    own_calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    is_output = [user.op for user in calls[-1].users] == ["output"]
    return Norm(module, tuple(steps), tuple(map(own_calls.index, calls)), is_output, bias)


def _absent_bias(norm: Norm) -> str | None:
    """The parameter that is ``None``, as with ``affine=False``, and that the forward would add last."""
    parameters = norm.module._parameters
    size = max(step.evaluate(norm.module).numel() for step in norm.steps)
    for name in [name for name, parameter in parameters.items() if parameter is None]:
        parameters[name] = nn.Parameter(torch.zeros(size))
        try:
            with_bias = _own_forward(norm.module)
        except NotFoldableError:
            continue
        finally:
            parameters[name] = None
        if with_bias.bias == name and with_bias.positions == norm.positions:
            return name
    return None


def _affine_map(traced: Trace, module: nn.Module, value: _Node) -> tuple[Norm, list[_Node]]:
    """The normalization of ``value`` that the own forward of ``module``, which was traced into, computes.

    That forward is deployed without these calls, so it must have the same calls whatever its inputs are.
    """
    if traced.called[module] > 1:
        raise NotFoldableError("it is called more than once")
    of_module = [call for call, (site, _) in traced.sites.items() if site is module]
    begins_with_it = computes_norm(module)
    if begins_with_it and has_hooks(module):
        raise NotFoldableError("it has hooks")
    name = traced.names[module]
    calls, steps, bias = affine_map(value, f"{name}." if name else "", with_arithmetic=begins_with_it)
    graph = forward_graph(module) if calls else None
    alone = [] if graph is None else [n.target for n in graph.nodes if n.op in ("call_function", "call_method")]
    if not calls or [call.target for call in of_module] != alone or any(c not in of_module for c in calls):
        raise NotFoldableError("its forward is not by running statistics of its own alone, or depends on the input")
    is_output = module in traced.returned_by.get(calls[-1], [])
    return Norm(module, tuple(steps), tuple(traced.sites[call][1] for call in calls), is_output, bias), calls
