"""Which quantized class a module type has: registered, known by its name, or made around a forward of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .base import QuantizedModule
from .own_forward import wraps_forward

Q = TypeVar("Q", bound="type[QuantizedModule]")

# Exact type to quantized type, and likewise by the qualified name of a library's type.
QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {}
BY_NAME: dict[str, type[QuantizedModule]] = {}
_WITH_BASE: dict[tuple[type[nn.Module], type[nn.Module]], type[QuantizedModule]] = {}
# A subclass that replaces one of these methods computes something else, and keeps its own forward.
_COMPUTATION = ("forward", "_conv_forward", "_output_padding", "__call__")


def register_quantized(*types: type[nn.Module]) -> Callable[[Q], Q]:
    """Register a class as the quantized version of module types, for :func:`quantize_model`.

    The class derives from :class:`QuantizedModule` and from the type. Its ``compute`` is the layer's forward on a
    quantized input and weight.

    Args:
        types: the types that the class replaces; their subclasses too, if they inherit forward or wrap it.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from gaqat_optim import quantize_model
        >>> class Cosine(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))
        >>> @register_quantized(Cosine)
        ... class QuantCosine(QuantizedModule, Cosine):
        ...     def compute(self, x, weight):
        ...         return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=1))
        >>> net = quantize_model(nn.Sequential(Cosine(4, 2)), calibration=torch.rand(8, 4))
        >>> type(net[0]).__name__
        'QuantCosine'
        >>> del QUANTIZED[Cosine]
    """

    def register(cls: Q) -> Q:
        QUANTIZED.update(dict.fromkeys(types, cls))
        return cls

    return register


def quantized_class(kind: type[nn.Module]) -> type[QuantizedModule] | None:
    """The quantized version of a module type: its own, or that of a base class whose forward it inherits or wraps.

    A class with a forward of its own stands before the quantized one in the order of classes, so that what its
    ``super().forward`` calls is quantized.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> [cls.__name__ for cls in quantized_class(Scaled).__mro__[:3]]
    ['QuantScaled', 'Scaled', 'QuantLinear']
    """
    # Attention reads the weight of the second; a lazy layer has no weight yet, and becomes another type.
    if issubclass(kind, (QuantizedModule, NonDynamicallyQuantizableLinear, LazyModuleMixin)):
        return None
    for base in kind.__mro__:
        quantized = QUANTIZED.get(base) or BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if quantized is not None:
            changed = [name for name in _COMPUTATION if getattr(kind, name, None) is not getattr(base, name, None)]
            if not changed:
                return quantized if kind in QUANTIZED else _with_base(quantized, kind)
            classes: Any = kind, base, quantized  # hashable, which mypy does not see
            if changed == ["forward"] and quantized.can_be_wrapped and wraps_forward(*classes):
                return _with_base(quantized, kind, inner=quantized_class(base))
            return None
    return None


def inner_class(kind: type[nn.Module]) -> type[QuantizedModule] | None:
    """Of a float or quantized type whose own forward wraps another: the quantized class that it wraps."""
    quantized = kind if issubclass(kind, QuantizedModule) else quantized_class(kind)
    return None if quantized is None else quantized.inner_class


def float_class(quantized: type[QuantizedModule]) -> type[nn.Module]:
    """The module type that a quantized type replaces."""
    own: type[nn.Module] | None = vars(quantized).get("float_class")
    return own or next(kind for kind, registered in QUANTIZED.items() if registered is quantized)


def _with_base(
    quantized: type[QuantizedModule], kind: type[nn.Module], inner: type[QuantizedModule] | None = None
) -> type[QuantizedModule]:
    """A class with the quantized computation, and all else of ``kind``: its forward too, if that wraps ``inner``."""
    if (quantized, kind) not in _WITH_BASE:
        attributes = {"float_class": kind, "inner_class": inner, "__reduce_ex__": _reduce, "__doc__": quantized.__doc__}
        bases: tuple[type, ...] = (quantized, kind) if inner is None else (kind, inner)
        _WITH_BASE[quantized, kind] = type(f"Quant{kind.__name__}", bases, attributes)
    return _WITH_BASE[quantized, kind]


def _reduce(self: QuantizedModule, protocol: int) -> tuple[Any, ...]:
    """For pickle, which finds classes by name: the class is made again from that of the float layer."""
    return _empty, (float_class(type(self)),), self.__dict__


def _empty(kind: type[nn.Module]) -> QuantizedModule:
    quantized = quantized_class(kind)
    assert quantized is not None
    return quantized.__new__(quantized)
