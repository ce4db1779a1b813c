"""The calls in one module's own forward, by symbolic tracing: its children are single operations."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.fx
from torch import nn

from ..evaluation import device_of, evaluation_mode, isolate_rng

# What torch's BatchNorms ask of the shape of an input, which a symbol cannot answer.
_SHAPE_CHECKS = ("_check_input_dim", "_check_non_zero_input_channels")
_READS = {getattr, operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
_SHAPE_METHODS = {("call_method", name) for name in ("size", "dim", "ndimension")}


class _ForwardTracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def forward_graph(module: nn.Module) -> torch.fx.Graph | None:
    """The graph of the forward of ``module`` in evaluation mode; ``None`` if it cannot be traced.

    >>> [node.op for node in forward_graph(nn.Sequential(nn.ReLU())).nodes]
    ['placeholder', 'call_module', 'output']
    """
    if "forward" in vars(module):  # The tracer would take that of the class.
        return None
    try:
        with traceable(module, [module]):
            return _ForwardTracer().trace(module)
    except Exception:  # The forward may raise anything when its inputs are symbols.
        return None


def remove_shape_checks(graph: torch.fx.Graph) -> None:
    """Remove assertions, and what is computed for them alone."""
    for node in reversed(graph.nodes):
        is_read = node.op == "get_attr" or node.target in _READS or (node.op, node.target) in _SHAPE_METHODS
        if node.target is torch._assert or (is_read and not node.users):
            graph.erase_node(node)


@contextmanager
def traceable(model: nn.Module, norms: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode in which the ``norms`` accept symbols; afterwards ``model`` is as it was."""
    # The tracer leaves the tensors that forward makes on the model, and forward may put symbols into attributes and
    # caches. Its first call may register hooks, and note in an attribute that they are there, as in transformers.
    owners = [vars(module) for module in model.modules()]
    dictionaries = [d for owner in owners for d in (owner, owner["_parameters"], owner["_buffers"], owner["_modules"])]
    values = [dictionary.copy() for dictionary in dictionaries]
    caches = [value for owner in owners for value in owner.values() if type(value) in (dict, list, OrderedDict)]
    entries = [cache.copy() for cache in caches]
    checking = [(norm, check) for norm in norms for check in _SHAPE_CHECKS if hasattr(type(norm), check)]
    try:
        for norm, check in checking:
            vars(norm)[check] = lambda x: None
        with evaluation_mode(model), isolate_rng(device_of(model)):
            yield
    finally:
        for dictionary, before in zip(dictionaries, values, strict=True):
            dictionary.clear()
            dictionary.update(before)
        for cache, before in zip(caches, entries, strict=True):
            cache.clear()
            cache.update(before) if isinstance(cache, dict) else cache.extend(before)
