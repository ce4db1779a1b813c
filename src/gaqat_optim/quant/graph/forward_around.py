"""The own forward of a layer's class, around another module in the place of ``super().forward``."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..nn.base import QuantizedModule
from ..nn.registry import float_class, inner_class
from .forward_graph import forward_graph

CHILD = "wrapped_layer"
_CLASSES: dict[type[nn.Module], type[ForwardAround]] = {}
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class ForwardAround(nn.Module):
    """A layer whose own forward wraps ``super().forward``, with that of the child ``wrapped_layer`` in its place.

    The object has a class that derives from this one and from the layer's float class, and all attributes, hooks,
    children and tensors of the layer but its weight, bias and quantizers.
    """

    wrapped_layer: Any
    weight_type: Tensor  # of no values: what a cast of the network makes of it, the weight would be

    @classmethod
    def of(cls, layer: nn.Module, child: nn.Module) -> ForwardAround:
        """The forward of a float or quantized ``layer`` around ``child``."""
        kind = float_class(type(layer)) if isinstance(layer, QuantizedModule) else type(layer)
        around = _class_around(kind).__new__(_class_around(kind))
        around.__dict__ = {k: v for k, v in vars(layer).items() if not k.endswith("_quantizer")}
        for registry in _REGISTRIES:
            around.__dict__[registry] = {
                name: value
                for name, value in vars(layer)[registry].items()
                if name not in ("weight", "bias") and not name.endswith("_quantizer")
            }
        around._modules[CHILD] = child
        around._non_persistent_buffers_set = around._non_persistent_buffers_set.copy()
        like: Any = layer.weight
        around.register_buffer("weight_type", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)
        return around

    @property
    def weight(self) -> Tensor:
        """The weight of the child, in the dtype of the layer's."""
        weight: Tensor = self.wrapped_layer.weight
        return weight.to(self._dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the child, or ``None``."""
        bias: Tensor | None = getattr(self.wrapped_layer, "bias", None)
        return None if bias is None else bias.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        weight_type = self._buffers["weight_type"]  # an attribute would be a symbol where a graph is traced
        assert weight_type is not None
        return weight_type.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_layer(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"the forward of {type(self).__mro__[1].__name__}"


def _class_around(kind: type[nn.Module]) -> type[ForwardAround]:
    """A class in whose order ``kind`` stands first, and :class:`ForwardAround` before what the forward wraps."""
    if kind not in _CLASSES:
        inner = inner_class(kind)
        assert inner is not None
        next_class = type("ForwardAround", (ForwardAround, float_class(inner)), {})
        attributes = {"__reduce_ex__": _reduce, "__doc__": ForwardAround.__doc__}
        _CLASSES[kind] = type(f"Deploy{kind.__name__}", (kind, next_class), attributes)
    return _CLASSES[kind]


def _reduce(self: ForwardAround, protocol: int) -> tuple[Any, ...]:
    """For pickle, which finds classes by name."""
    return _empty, (type(self).__mro__[1],), self.__dict__


def _empty(kind: type[nn.Module]) -> ForwardAround:
    return _class_around(kind).__new__(_class_around(kind))


def layer_name(name: str) -> str:
    """The name of a layer before it was deployed: that of the forward around it, if there is one.

    >>> layer_name("encoder.embed.wrapped_layer"), layer_name("wrapped_layer"), layer_name("fc")
    ('encoder.embed', '', 'fc')
    """
    parent, _, last = name.rpartition(".")
    return parent if last == CHILD else name


def passes_input(layer: QuantizedModule) -> bool:
    """Whether a layer quantizes its first argument as it is, without a step of a forward of its own before."""
    if layer.inner_class is None:
        return True
    call = _wrapped_call(layer)
    return call is not None and len(call.args) > 0 and getattr(call.args[0], "op", "") == "placeholder"


def passes_output(layer: QuantizedModule) -> bool:
    """Whether a layer returns what it computes as it is, without a step of a forward of its own behind.

    >>> from gaqat_optim import quantize_model
    >>> class Padded(nn.Conv1d):
    ...     def forward(self, x):
    ...         return super().forward(nn.functional.pad(x, (2, 0)))
    >>> layer = quantize_model(nn.Sequential(Padded(1, 1, 3)))[0]
    >>> passes_input(layer), passes_output(layer)
    (False, True)
    """
    if layer.inner_class is None:
        return True
    call = _wrapped_call(layer)
    return call is not None and call.graph.output_node().args[0] is call and len(call.users) == 1


def _wrapped_call(layer: QuantizedModule) -> torch.fx.Node | None:
    """The call of what a layer's own forward wraps; ``None`` if there is not exactly one, or no trace."""
    child = nn.Identity()
    vars(child).update(weight=layer.weight.detach(), bias=layer.bias)  # no parameters, which would become symbols
    graph = forward_graph(ForwardAround.of(layer, child))
    calls = [] if graph is None else [n for n in graph.nodes if n.op == "call_module" and n.target == CHILD]
    return calls[0] if len(calls) == 1 else None
