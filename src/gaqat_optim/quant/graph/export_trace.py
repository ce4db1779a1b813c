"""A network's graph of calls by ``torch.export``, where symbols do not get through its forward."""

from __future__ import annotations

import io
import operator
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ..evaluation import device_of, quantization_disabled
from .forward_graph import traceable
from .fx_trace import Trace

aten = torch.ops.aten
# The attribute of a network that holds the arguments of a forward in calibration, as tensors without data.
_INPUTS = "_calibration_inputs"


def keep_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep on ``model`` the shapes and types of what it is called with, for a trace later on."""
    leaves = tree_leaves((args, kwargs))
    if all(value is None or isinstance(value, Tensor | bool | int | float | str) for value in leaves):
        setattr(model, _INPUTS, tree_map(_without_data, (args, kwargs)))


def forget_inputs(model: nn.Module) -> None:
    """Remove what :func:`keep_inputs` kept."""
    vars(model).pop(_INPUTS, None)


def _without_data(value: Any) -> Any:
    return torch.empty_like(value, device="meta", requires_grad=False) if isinstance(value, Tensor) else value


def export_trace(model: nn.Module, layers: Collection[nn.Module]) -> Trace | None:
    """The trace for inputs like those of the calibration; ``None`` if there was none.

    The control flow may go by shapes, unlike in symbolic tracing, but not by values: ``torch.export`` raises then. A
    module that is not traced into is one node, whose operands are all values that it reads.
    """
    if getattr(model, _INPUTS, None) is None:
        return None
    return _collapsed(model, _exported(model), _leaves(model, layers))


@dataclass(frozen=True)
class _Exported:
    """What ``torch.export`` found, with the graphs of ``with`` blocks in the place of the calls that run them.

    The nodes of the ``graph`` have in their ``meta`` the qualified name of the parameter or buffer that they are, the
    calls of modules that they are in, and the shape and layout of their value. ``returning`` has the names of the
    modules that return one tensor.
    """

    graph: torch.fx.Graph
    returning: frozenset[str]


def _exported(model: nn.Module) -> _Exported:
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.zeros_like(value, device=device, dtype=dtype if value.is_floating_point() else value.dtype)

    args, kwargs = tree_map(zeros, getattr(model, _INPUTS))
    # A quantizer without a scale cannot run, and none changes what is traced.
    quiet, disabled = _without_partial_graph(), quantization_disabled(model)
    with torch.no_grad(), quiet, traceable(model, []), disabled, _types_of_outputs(model) as types:
        program = torch.export.export(model, args, kwargs, strict=False)
    signature = program.graph_signature
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    graph = torch.fx.Graph()

    def copy_nodes(source: torch.fx.GraphModule, copies: dict[torch.fx.Node, Any]) -> Any:
        for node in source.graph.nodes:
            block = _block(node)
            if node in copies:  # An input of a block is what it is called with.
                continue
            if block is not None:
                inner = getattr(source, str(block.target))
                inputs = inner.graph.find_nodes(op="placeholder")
                operands = node.args[node.args.index(block) + 1 :]
                copies[node] = copy_nodes(inner, {i: copies[o] for i, o in zip(inputs, operands, strict=True)})
            elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):
                copies[node] = copies[node.args[0]][node.args[1]]
            elif node.op == "output" and source is not program.graph_module:
                return tuple(map(copies.get, node.args[0]))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta = _facts(node, owned, signature.inputs_to_lifted_tensor_constants)
        return None

    copy_nodes(program.graph_module, {})
    names = {module: name for name, module in model.named_modules()}
    # Of a module under two names, torch.export calls a copy.
    return _Exported(graph, frozenset(names[m] for m, kind in types.items() if kind is Tensor and m in names))


def _facts(node: torch.fx.Node, owned: Mapping[str, str], constants: Collection[str]) -> dict[str, Any]:
    value = node.meta.get("val")
    return {
        "owned": owned.get(node.name) if node.op == "placeholder" else None,
        "constant": node.name in constants,
        "stack": [(key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()],
        "shape": tuple(getattr(value, "shape", ())),
        "layout": (value.dtype, value.device, value.stride()) if isinstance(value, Tensor) else None,
    }


def _block(node: torch.fx.Node) -> Any:
    """The operand that is the graph of a ``with`` block, if ``node`` runs one: without autocast or gradients."""
    if getattr(node.target, "__name__", "") not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
        return None
    return next(operand for operand in node.all_input_nodes if operand.op == "get_attr")


@contextmanager
def _without_partial_graph() -> Iterator[None]:
    """Without the graph as far as it came, which torch prints where an export fails: hundreds of lines."""
    written, graph = io.StringIO(), ""
    try:
        with redirect_stderr(written):
            yield
    except Exception as error:
        graph = str(getattr(error, "partial_fx_graph", ""))
        raise
    finally:
        sys.stderr.write(written.getvalue().replace(f"{graph}\n", "") if graph else written.getvalue())


@contextmanager
def _types_of_outputs(model: nn.Module) -> Iterator[dict[nn.Module, type]]:
    """The types of what the modules return in the block."""
    types: dict[nn.Module, type] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        types[module] = Tensor if isinstance(output, Tensor) else type(output)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield types
    finally:
        for handle in handles:
            handle.remove()


def _collapsed(model: nn.Module, exported: _Exported, leaves: set[nn.Module]) -> Trace:
    """The trace with one node for each call of the ``leaves``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    graph, values, calls = torch.fx.Graph(), {}, {}
    owned: dict[torch.fx.Node, str] = {}
    readers: dict[str, set[Any]] = {}
    called: dict[torch.fx.Node, nn.Module] = {}
    for node in exported.graph.nodes:
        if node.op == "get_attr":  # The graph of a branch.
            continue
        if node.op == "placeholder":
            if node.meta["owned"] is not None:
                owned[node] = node.meta["owned"]
            elif not node.meta["constant"]:
                values[node] = graph.placeholder(node.name)
            continue
        if _returns_operand(node):  # Who reads the operand later reads this node, in whatever module it is.
            operand = node.all_input_nodes[0]
            if operand in owned:
                owned[node] = owned[operand]
            elif operand in values:
                values[node] = values[operand]
            continue
        operands = [values[operand] for operand in node.all_input_nodes if operand in values]
        if node.op == "output":
            graph.output(tuple(operands))
            continue
        stack = node.meta["stack"]
        key, path = next(((key, path) for key, path in stack if modules.get(path) in leaves), (None, ""))
        for operand in node.all_input_nodes:
            if operand in owned:
                owner = modules[owned[operand].rpartition(".")[0]]
                readers.setdefault(owned[operand], set()).add(owner in [modules.get(p) for _, p in stack])
        if key is None:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.get)
            values[node] = graph.create_node("call_function", node.target, args, kwargs)
        else:
            if key not in calls:
                calls[key] = graph.call_module(path)
                called[calls[key]] = modules[path]
            call = values[node] = calls[key]
            call.args = (*call.args, *(o for o in operands if o is not call and o not in call.args))
        values[node].meta["shape"] = node.meta["shape"]
    uses: Counter[nn.Module] = Counter(called.values())
    uses.update(modules[name.rpartition(".")[0]] for name, inside in readers.items() if False in inside)
    names = {module: name for name, module in model.named_modules()}
    returned_by = {call: [module] for call, module in called.items() if names[module] in exported.returning}
    return Trace(list(graph.nodes), called, returned_by, uses, Counter(called.values()), names, {}, True)


def _returns_operand(node: torch.fx.Node) -> bool:
    """Whether an operation returns its operand itself: a dropout, or a conversion to the type that it has already."""
    operation = getattr(node.target, "overloadpacket", None)
    if operation in (aten.dropout, aten.feature_dropout, aten.alpha_dropout):
        return True
    if operation not in (aten.to, aten.contiguous):
        return False
    return bool(node.all_input_nodes[0].meta["layout"] == node.meta["layout"])


def _leaves(model: nn.Module, layers: Collection[nn.Module]) -> set[nn.Module]:
    """The modules that are one node: layers, BatchNorms, and all without one of these inside."""
    ends = {module for module in model.modules() if module in layers or isinstance(module, _BatchNorm)}
    return {module for module in model.modules() if module in ends or ends.isdisjoint(module.modules())}
