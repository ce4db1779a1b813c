"""Which modules compute a normalization by running statistics, found in the graph of their forward."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.base import QuantizedModule
from .forward_graph import forward_graph

_Node = torch.fx.Node
_ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "multiply"),
    **dict.fromkeys((operator.add, torch.add, "add"), "add"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), "subtract"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "divide"),
}
_SHAPE_METHODS = {"size", "dim", "ndimension"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_SHAPE_OF_SECOND = {"reshape_as", "view_as", "expand_as", "type_as"}  # methods that read no more of their argument


@dataclass(frozen=True)
class Expression:
    """A value that a forward computes from the tensors of its module alone.

    ``target`` is a function or the name of a method; without arguments, the name of an attribute of the module.
    """

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def evaluate(self, module: nn.Module) -> Any:
        """The value for the tensors that ``module`` has now, in float64."""
        if not self.args:
            value = getattr(module, self.target)
            return value.detach().to(torch.float64) if isinstance(value, Tensor) else value
        args, kwargs = _evaluate(self.args, module), _evaluate(dict(self.kwargs), module)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


@dataclass(frozen=True)
class Step:
    """One step of an affine map: the ``kind`` is ``"multiply"``, ``"divide"``, ``"add"`` or ``"subtract"``.

    The operand has one value for each channel, if ``by_channel``; otherwise it is broadcast.
    """

    kind: str
    operand: Any
    by_channel: bool = False

    def evaluate(self, module: nn.Module) -> Tensor:
        """The operand for the tensors that ``module`` has now, in float64."""
        return torch.as_tensor(_evaluate(self.operand, module), dtype=torch.float64)

    def acts_by_channel(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether the operand has a value a channel, or one for all; ``shape``: of a value a channel, (1, 8, 1, 1)."""
        own = self.evaluate(module).shape
        if self.by_channel:
            return own == shape[1:2]
        return len(own) <= len(shape) and all(n in (1, m) for n, m in zip(reversed(own), reversed(shape), strict=False))


@dataclass(frozen=True)
class Norm:
    """A normalization by running statistics: in evaluation mode an affine map of each channel.

    Attributes:
        module: the BatchNorm, or the module in whose forward the map is computed.
        steps: the map, in order. There are none if ``module`` is a BatchNorm with torch's forward.
        positions: which calls in the forward of ``module`` they are.
        is_output: whether the forward of ``module`` returns the result of the map.
        bias: the attribute of ``module`` whose values are added last, if it is known. It may be ``None``: no bias yet.
        channels: which channel of the normalization each channel of the layer is; none if they are the same.
        size: the number of channels of the normalization.
        axes: the numbers of axes of the layer's output for which this is so.
    """

    module: nn.Module
    steps: tuple[Step, ...] = ()
    positions: tuple[int, ...] = ()
    is_output: bool = True
    bias: str | None = None
    channels: tuple[int, ...] = ()
    size: int = 0
    axes: tuple[int, ...] = ()


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` has the forward of torch's BatchNorm.

    Subclasses that only check other shapes have, and so has ``nn.SyncBatchNorm``, which differs in training alone.
    """
    forwards = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, _BatchNorm) and type(module).forward in forwards and "forward" not in vars(module)


def computes_norm(module: nn.Module) -> bool:
    """Whether ``module`` begins with a normalization that its own forward computes.

    That is a call of ``F.batch_norm`` or, as in torchvision's FrozenBatchNorm2d, arithmetic with its tensors.

    >>> computes_norm(nn.BatchNorm2d(2))  # is one operation
    False
    """
    if is_batch_norm(module) or type(module).__module__.startswith("torch.nn."):
        return False
    if not has_channel_tensors([*module._parameters.values(), *module._buffers.values()]):
        return False
    if any(isinstance(child, QuantizedModule) for child in module.modules()):
        return False
    graph = forward_graph(module)
    inputs = [] if graph is None else [node for node in graph.nodes if node.op == "placeholder"]
    return bool(inputs) and bool(affine_map(inputs[0], "")[1])


def has_channel_tensors(tensors: Iterable[Tensor | None]) -> bool:
    """Whether two of the ``tensors`` have one axis and the same length, as statistics of channels have.

    >>> has_channel_tensors([torch.ones(3), None, torch.ones(2), torch.ones(3)])
    True
    """
    lengths = [len(tensor) for tensor in tensors if tensor is not None and tensor.dim() == 1]
    return len(lengths) > len(set(lengths))


def affine_map(value: _Node, prefix: str, with_arithmetic: bool = True) -> tuple[list[_Node], list[Step], str | None]:
    """The calls that normalize ``value``, their steps, and the attribute that is added last, as in :class:`Norm`.

    Each call is the only user of the value before it. All other operands come from attributes whose name begins with
    ``prefix``. Without ``with_arithmetic``, only ``F.batch_norm`` counts.
    """
    calls: list[_Node] = []
    steps: list[Step] = []
    bias: str | None = None
    while len(users := value_users(value)) == 1:
        try:
            more, added = _steps(users[0], value, prefix, with_arithmetic)
        except LookupError:
            break
        steps += more
        bias = added if added is not None or any(step.kind in ("multiply", "divide") for step in more) else bias
        value = users[0]
        calls.append(value)
    normalizes = any(is_batch_norm_call(call) for call in calls)
    if not normalizes and not {"multiply", "add"} <= {step.kind for step in steps}:
        return [], [], None
    return calls, steps, bias


def reads_shape(node: _Node) -> bool:
    """Whether a node takes the shape, type or device of a value, and nothing else of it."""
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


def is_constant(node: _Node) -> bool:
    """Whether a value is computed from attributes alone."""
    if node.op in ("placeholder", "call_module"):
        return False
    return all(map(is_constant, node.all_input_nodes))


def value_users(node: _Node) -> list[_Node]:
    """The users of a value that read more of it than its shape."""
    return [user for user in node.users if not reads_shape(user) and not _takes_shape_of(user, node)]


def _takes_shape_of(user: _Node, value: _Node) -> bool:
    operation = getattr(user.target, "overloadpacket", None)  # of torch.export
    name = user.target if operation is None else operation.__name__
    return name in _SHAPE_OF_SECOND and user.args[0] is not value


def _steps(call: _Node, value: _Node, prefix: str, with_arithmetic: bool) -> tuple[list[Step], str | None]:
    """The steps of one call on ``value``, and the attribute added last; a LookupError for other calls."""
    if is_batch_norm_call(call):
        args = _batch_norm_arguments(call)
        mean, var, weight, bias = (
            _expression(args[n], prefix) for n in ("running_mean", "running_var", "weight", "bias")
        )
        if args["input"] is not value or args["training"] is not False or mean is None or var is None:
            raise LookupError
        deviation = Expression(torch.sqrt, (Expression(torch.add, (var, args["eps"])),))
        operands = {"subtract": mean, "divide": deviation, "multiply": weight, "add": bias}
        own = bias.target if isinstance(bias, Expression) and not bias.args else None
        return [Step(kind, operand, True) for kind, operand in operands.items() if operand is not None], own
    if not with_arithmetic or call.kwargs or len(call.args) != 2:
        raise LookupError
    kind, (left, right) = _ARITHMETIC[call.target], call.args
    if left is not value and kind in ("subtract", "divide"):
        raise LookupError
    return [Step(kind, _expression(right if left is value else left, prefix))], None


def is_batch_norm_call(call: _Node) -> bool:
    """Whether a node calls ``F.batch_norm`` or what it calls."""
    return call.target in (F.batch_norm, torch.batch_norm)


def _batch_norm_arguments(call: _Node) -> dict[str, Any]:
    if call.target is F.batch_norm:
        bound = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        return bound.arguments
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def _expression(value: Any, prefix: str) -> Any:
    """``value`` with an :class:`Expression` for each node; a LookupError if one depends on more than attributes."""
    if isinstance(value, _Node):
        if value.op == "get_attr" and str(value.target).startswith(prefix):
            name = str(value.target).removeprefix(prefix)
            if "." not in name:
                return Expression(name)
        elif value.op in ("call_function", "call_method") and value.args:
            kwargs = _expression(value.kwargs, prefix)
            return Expression(value.target, _expression(value.args, prefix), tuple(kwargs.items()))
        raise LookupError
    return _map(lambda item: _expression(item, prefix), value)


def _evaluate(value: Any, module: nn.Module) -> Any:
    if isinstance(value, Expression):
        return value.evaluate(module)
    return _map(lambda item: _evaluate(item, module), value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """A tuple or dict with ``function`` of the items of ``value``; a value without items as it is."""
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    return tuple(map(function, value)) if isinstance(value, (tuple, list)) else value
