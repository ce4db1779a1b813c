"""Operations that only move values, and where they bring the channels of a layer's output."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from .fx_trace import Trace
from .norm import reads_shape

_aten = torch.ops.aten
# Operations that do nothing in evaluation mode: the value is their first operand.
IDENTITIES = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout, "contiguous", "clone"),
    *(_aten.contiguous, _aten.clone, _aten.dropout, _aten.feature_dropout, _aten.alpha_dropout),
}
# Operations whose result has values of their operands alone, each in another place.
MOVES = {
    *(nn.Flatten, nn.Unflatten, operator.getitem),
    *(torch.flatten, torch.unflatten, torch.reshape, torch.transpose, torch.permute, torch.movedim, torch.moveaxis),
    *(torch.squeeze, torch.unsqueeze, torch.cat, torch.concat, torch.concatenate, torch.split, torch.chunk),
    *("flatten", "unflatten", "reshape", "view", "transpose", "permute", "movedim", "swapaxes", "reshape_as"),
    *("view_as", "squeeze", "unsqueeze", "split", "chunk", "t"),
    *(_aten.flatten, _aten.unflatten, _aten.reshape, _aten.view, _aten._unsafe_view, _aten.transpose, _aten.permute),
    *(_aten.movedim, _aten.squeeze, _aten.unsqueeze, _aten.cat, _aten.concat, _aten.split, _aten.split_with_sizes),
    *(_aten.chunk, _aten.slice, _aten.select, _aten.t, _aten.view_as, _aten.reshape_as),
}
# Sizes of axes that are not known: no two are the same, and none is a usual number of channels.
_SIZES = (2, 3, 5, 7, 11)


def called(traced: Trace, node: torch.fx.Node) -> Any:
    """What a node calls: a function, the name of a method, an operation of torch.export, or the type of a module."""
    if node in traced.modules:
        return type(traced.modules[node])
    return getattr(node.target, "overloadpacket", node.target)


def moves_values(traced: Trace, node: torch.fx.Node) -> bool:
    """Whether a node only moves values of its operands, or does nothing."""
    return node.op.startswith("call_") and called(traced, node) in MOVES | IDENTITIES


def channel_numbers(
    traced: Trace, value: torch.fx.Node, layers: Mapping[torch.fx.Node, tuple[int, int]], axes: int
) -> tuple[list[int], int] | None:
    """Which channels of some layers the channels of ``value`` are, and its number of axes; its axis 1 has channels.

    The moves between run on numbers instead of values: the channels of the first layer are 0, 1, ..., those of the
    next follow.

    Args:
        traced: the network.
        value: is made of the values of the layers, by moves alone.
        layers: the calls of the layers, each with its number of channels and their axis.
        axes: the number of axes of the layers' outputs, where the trace does not have their shapes.

    Returns:
        ``None`` if the channels are elsewhere, or if the moves depend on sizes that are not known.
    """
    values: dict[torch.fx.Node, Any] = {}
    first = 0
    for node, (channels, axis) in layers.items():
        shape = list(node.meta.get("shape", _SIZES[:axes]))
        along_axis = [1] * len(shape)
        shape[axis] = along_axis[axis] = channels
        numbers = torch.arange(first, first + channels, dtype=torch.int32)
        values[node] = numbers.reshape(along_axis).expand(shape)
        first += channels

    def evaluate(node: torch.fx.Node) -> Any:
        if node not in values:
            values[node] = _run(traced, node, evaluate)
        return values[node]

    try:
        result = evaluate(value)
        by_channel = result.movedim(1, 0).flatten(1)
    except Exception:  # Sizes that are not known, or sizes that do not fit to these, raise anything.
        return None
    if not bool((by_channel == by_channel[:, :1]).all()):
        return None
    return by_channel[:, 0].tolist(), result.dim()


def _run(traced: Trace, node: torch.fx.Node, evaluate: Any) -> Any:
    """The value of a node for those of its operands; a LookupError if it is no move and does not read a shape."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), evaluate)
    if moves_values(traced, node):
        if called(traced, node) in IDENTITIES:
            return args[0]
        if node in traced.modules:
            return traced.modules[node](*args, **kwargs)
    elif not (reads_shape(node) or (node.op == "call_function" and _has_numbers((args, kwargs)))):
        raise LookupError
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _has_numbers(value: Any) -> bool:
    """Whether there are no tensors in the arguments of a call."""
    if isinstance(value, Mapping):
        return all(map(_has_numbers, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_has_numbers, value))
    return isinstance(value, (int, float, str, slice, type(None)))
