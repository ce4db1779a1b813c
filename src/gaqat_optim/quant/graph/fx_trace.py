"""A network's graph of calls, by symbolic tracing (``torch.fx``). Nothing is rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.base import QuantizedModule
from .forward_graph import remove_shape_checks, traceable
from .norm import computes_norm


@dataclass(frozen=True)
class Trace:
    """The calls in the forward pass of a network in evaluation mode.

    Attributes:
        nodes: all calls, in order.
        modules: the module that a node calls, where it calls one that is not traced into.
        returned_by: the modules that return the value of a node, the innermost first.
        uses: how often each module is called, or a parameter of it read by a forward that is not its own.
        called: how often each module is called, those that are traced into as well.
        names: the qualified name of each module.
        sites: the module in whose own forward a function or method is called, and the position among those calls.
        by_shapes: whether the control flow went by the shapes of some inputs.
    """

    nodes: list[torch.fx.Node]
    modules: dict[torch.fx.Node, nn.Module]
    returned_by: dict[torch.fx.Node, list[nn.Module]]
    uses: Counter[nn.Module]
    called: Counter[nn.Module]
    names: dict[nn.Module, str]
    sites: dict[torch.fx.Node, tuple[nn.Module, int]]
    by_shapes: bool = False


def symbolic_trace(model: nn.Module, layers: Collection[nn.Module]) -> Trace:
    """The calls of ``model``, without those inside of ``layers``; raises whatever its code does with symbols."""
    tracer, graph = traced(model, layers)
    remove_shape_checks(graph)
    modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses: Counter[nn.Module] = Counter(tracer.called)
    # If a forward reads a parameter of another module, that module's call is not its only use.
    for node in graph.nodes:
        if node.op == "get_attr":
            module = model.get_submodule(str(node.target).rpartition(".")[0])
            readers = {tracer.sites[user][0] for user in node.users if user in tracer.sites}
            uses[module] += module not in tracer.norms or readers != {module}
    returned_by: dict[torch.fx.Node, list[nn.Module]] = {}
    for module, node in tracer.returned:
        returned_by.setdefault(node, []).append(module)
    names = {module: name for name, module in model.named_modules()}
    return Trace(list(graph.nodes), modules, returned_by, uses, Counter(tracer.called), names, tracer.sites)


def admit_child(model: nn.Module, modules: Iterable[nn.Module], name: str) -> set[nn.Module]:
    """The ``modules`` in which a new child ``name`` changes nothing that ``model`` computes.

    It changes something where a forward runs over the children of its module, as in ``nn.Sequential``, or counts them.
    The type does not tell: the network is traced again with such a child in each.
    """
    try:
        expected_graph, admitting = str(traced(model)[1]), set(modules)
    except Exception:  # It was traced in another way.
        return set()
    while admitting:
        probes = {module: nn.Identity() for module in admitting}
        for module, probe in probes.items():
            module._modules[name] = probe
        called, graph_with_probes = set(), ""
        try:
            tracer, graph = traced(model)
            called = {module for module, probe in probes.items() if probe in tracer.called}
            graph_with_probes = str(graph)
        except Exception:  # The network's own code fails with such children.
            pass
        finally:
            for module in probes:
                del module._modules[name]
        if not called and graph_with_probes == expected_graph:
            return admitting
        if not called:  # For example, one of them counts its children.
            return {m for m in admitting if len(admitting) > 1 and admit_child(model, [m], name)}
        admitting -= called
    return admitting


def traced(model: nn.Module, layers: Collection[nn.Module] | None = None) -> tuple[Tracer, torch.fx.Graph]:
    """The graph of ``model`` in evaluation mode, which stays as it is; ``layers``: all quantized ones by default."""
    if layers is None:
        layers = {module for module in model.modules() if isinstance(module, QuantizedModule)}
    tracer = Tracer(layers, {module for module in model.modules() if computes_norm(module)})
    with traceable(model, tracer.norms):
        return tracer, tracer.trace(model)


# Modules of torch whose control flow depends on their input. Nothing in them can be folded.
_UNTRACEABLE = (
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
    *(nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer),
)


class Tracer(torch.fx.Tracer):
    """Treats a module without any of the ``layers`` as one operation, so that fewer modules must be traceable.

    ``norms`` are modules with a normalization in their forward, which are traced into.
    """

    proxy_buffer_attributes = True  # A running mean that forward reads appears in the graph, as a parameter does.

    def __init__(self, layers: Collection[nn.Module], norms: Collection[nn.Module]) -> None:
        super().__init__()
        self.layers, self.norms = layers, norms
        self.called: list[nn.Module] = []
        self.returned: list[tuple[nn.Module, torch.fx.Node]] = []
        self.sites: dict[torch.fx.Node, tuple[nn.Module, int]] = {}
        self._running: list[nn.Module] = []  # the modules whose forward is traced, the innermost last
        self._positions: Counter[nn.Module] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.layers or isinstance(m, _UNTRACEABLE) or (isinstance(m, _BatchNorm) and m not in self.norms):
            return True
        return not any(isinstance(c, _BatchNorm) or c in self.layers or c in self.norms for c in m.modules())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._running.append(m)
            try:
                return forward(*args, **kwargs)
            finally:
                self._running.pop()

        result = super().call_module(m, run, args, kwargs)
        self.called.append(m)
        if isinstance(result, torch.fx.Proxy):
            self.returned.append((m, result.node))
        return result

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if kind in ("call_function", "call_method"):
            assert isinstance(self.root, nn.Module)
            module = self._running[-1] if self._running else self.root
            self.sites[node] = (module, self._positions[module])
            self._positions[module] += 1
        return node
