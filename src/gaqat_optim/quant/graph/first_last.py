"""The layers that ``first_last_bits`` means: those that read an input of the network, and those that make an output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from .moves import called
from .network_trace import trace
from .norm import reads_shape

# Functions that compute with a weight, as a layer does: with that of a layer, or with one that stays in floating point.
_aten = torch.ops.aten
_PRODUCTS = {
    *(F.linear, F.bilinear, F.embedding, F.conv1d, F.conv2d, F.conv3d),
    *(_aten.linear, _aten.bilinear, _aten.embedding, _aten.conv1d, _aten.conv2d, _aten.conv3d),
}


def first_and_last(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[set[str], bool]:
    """The names of the first and the last of the quantizable ``layers`` of a network in floating point.

    The second result tells whether it took a calibration to find them, and they are not those by the order of layers.

    A layer is first if its input is computed from an input of the network without another layer, and last if no other
    layer uses its output. There can be several, such as the branches of a stem or two heads. Every module with a weight
    of two or more axes counts as another layer: behind the last one, a classifier in floating point, none is last. A
    module that is not traced into counts as a layer, whose first and last layers go by their order.

    In a network that cannot be traced, the first and the last layer go by the order of ``layers``, with a warning.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    >>> names, _ = first_and_last(net, {str(i): net[i] for i in range(3)})
    >>> sorted(names)
    ['0', '2']
    """
    by_order = [*list(layers)[:1], *list(layers)[-1:]]
    if len(set(layers.values())) == 1 or type(model).forward is nn.Module.forward:  # a container for layers
        return set(by_order), False
    consequence = (
        f"first_last_bits goes by the order of its layers: {' and '.join(dict.fromkeys(by_order))}. "
        "Set the bits of others by overrides"
    )
    traced = trace(model, consequence, set(layers.values()))
    if traced is None:
        return set(by_order), False
    names: dict[nn.Module, str] = {}
    for name, module in layers.items():
        names.setdefault(module, name)
    inside: dict[torch.fx.Node, list[str]] = {}  # of each call with a weight, the layers
    whole: set[torch.fx.Node] = set()  # the calls of layers with layers inside, in a forward of their own
    for node in traced.nodes:
        if node in traced.modules:
            module = traced.modules[node]
            own = [names[child] for child in module.modules() if child in names]
            if own or _has_weight(module):
                inside[node] = own
                whole |= {node} if module in names else set()
        elif called(traced, node) in _PRODUCTS:
            holders = [model.get_submodule(_holder(operand)) for operand in node.all_input_nodes if _holder(operand)]
            inside[node] = [names[holder] for holder in holders if holder in names][:1]
    # By going forward: what the network's inputs reach, and what layers reach. Then back: what reaches layers.
    from_input, from_layer, to_layer = set(), set(), set()
    for node in traced.nodes:
        operands = [] if reads_shape(node) else node.all_input_nodes
        if node.op == "placeholder" or any(operand in from_input for operand in operands):
            from_input.add(node)
        if any(operand in inside or operand in from_layer for operand in operands):
            from_layer.add(node)
    for node in reversed(traced.nodes):
        if any(user in inside or user in to_layer for user in node.users if not reads_shape(user)):
            to_layer.add(node)
    ends: set[str] = set()
    for node, own in inside.items():
        if _reads(node, from_input) and not _reads(node, from_layer | set(inside)):
            ends.update(own if node in whole else own[:1])
        if node not in to_layer:
            ends.update(own if node in whole else own[-1:])
    return ends, traced.by_shapes and ends != set(by_order)


def _reads(node: torch.fx.Node, values: set[torch.fx.Node]) -> bool:
    """Whether the first operand of a layer, which is its input, is one of the ``values``."""
    return any(operand in values for operand in node.all_input_nodes[:1])


def _holder(node: torch.fx.Node) -> str:
    """The name of the module whose parameter a node is, ``""`` for other nodes and the network itself."""
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""


def _has_weight(module: nn.Module) -> bool:
    return not isinstance(module, nn.LayerNorm) and any(parameter.dim() > 1 for parameter in module.parameters())
