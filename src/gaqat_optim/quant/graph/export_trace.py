"""A network's graph of calls by ``torch.export``, where symbols do not get through its forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ..evaluation import device_of
from ..nn.base import QuantizedModule
from .forward_graph import traceable
from .fx_trace import Trace

aten = torch.ops.aten
# The attribute of a network that holds the arguments of a forward in calibration, as tensors without data.
_INPUTS = "_calibration_inputs"


@contextmanager
def record_inputs(model: nn.Module) -> Iterator[None]:
    """Keep on ``model`` the shapes and types of what it is called with first in the block, for a trace later on."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        if all(
            value is None or isinstance(value, Tensor | bool | int | float | str)
            for value in tree_leaves((args, kwargs))
        ):
            setattr(model, _INPUTS, tree_map(_without_data, (args, kwargs)))

    handle = model.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _without_data(value: Any) -> Any:
    return torch.empty_like(value, device="meta", requires_grad=False) if isinstance(value, Tensor) else value


def export_trace(model: nn.Module) -> Trace | None:
    """The trace for inputs like those of the calibration; ``None`` if there was none.

    The control flow may go by shapes, unlike in symbolic tracing, but not by values: ``torch.export`` raises then. A
    module that is not traced into is one node, whose operands are all values that it reads.
    """
    inputs = getattr(model, _INPUTS, None)
    if inputs is None:
        return None
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.zeros_like(value, device=device, dtype=dtype if value.is_floating_point() else value.dtype)

    args, kwargs = tree_map(zeros, inputs)
    with torch.no_grad(), traceable(model, []):
        program = torch.export.export(model, args, kwargs, strict=False)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = _leaves(model)
    graph, values, calls = torch.fx.Graph(), {}, {}
    owned = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    readers: dict[str, set[Any]] = {}
    called: dict[torch.fx.Node, nn.Module] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in owned:
                values[node] = graph.placeholder(node.name)
            continue
        operands = [values[operand] for operand in node.all_input_nodes if operand in values]
        if _returns_operand(node):  # Who reads the operand later reads this node, in whatever module it is.
            operand = node.all_input_nodes[0]
            if operand.name in owned:
                owned[node.name] = owned[operand.name]
            elif operand in values:
                values[node] = values[operand]
            continue
        if node.op == "output":
            graph.output(tuple(operands))
            continue
        stack = [(key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()]
        key, path = next(((key, path) for key, path in stack if modules.get(path) in layers), (None, ""))
        for operand in node.all_input_nodes:
            if operand.name in owned:
                owner = modules[owned[operand.name].rpartition(".")[0]]
                readers.setdefault(owned[operand.name], set()).add(owner in [modules.get(p) for _, p in stack])
        if key is None:
            values[node] = graph.create_node("call_function", node.target, tuple(operands))
        else:
            if key not in calls:
                calls[key] = graph.call_module(path)
                called[calls[key]] = modules[path]
            call = values[node] = calls[key]
            call.args = (*call.args, *(o for o in operands if o is not call and o not in call.args))
    uses: Counter[nn.Module] = Counter(called.values())
    uses.update(modules[name.rpartition(".")[0]] for name, inside in readers.items() if False in inside)
    names = {module: name for name, module in model.named_modules()}
    return Trace(list(graph.nodes), called, {}, uses, Counter(called.values()), names, {})


def _returns_operand(node: torch.fx.Node) -> bool:
    """Whether an operation returns its operand itself: a dropout, or a conversion to the type that it has already."""
    operation = getattr(node.target, "overloadpacket", None)
    if operation in (aten.dropout, aten.feature_dropout, aten.alpha_dropout):
        return True
    if operation not in (aten.to, aten.contiguous):
        return False
    before, after = (n.meta["val"] for n in (node.all_input_nodes[0], node))
    return (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride())


def _leaves(model: nn.Module) -> set[nn.Module]:
    """The modules that are one node: layers, BatchNorms, and all without one of these inside."""
    kinds = (QuantizedModule, _BatchNorm)
    return {m for m in model.modules() if isinstance(m, kinds) or not any(isinstance(c, kinds) for c in m.modules())}
