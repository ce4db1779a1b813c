"""Classes with a forward of their own around ``super().forward``: what the code of a forward tells."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F

# What may be asked of a weight without reading its values.
_METADATA = frozenset(("dtype", "device", "shape", "ndim", "size", "dim", "requires_grad", "is_cuda"))
# By these, a forward reaches weights without naming them, or a part of what its base class computes.
_OTHER_WAYS = frozenset(
    ("parameters", "named_parameters", "_parameters", "state_dict", "__dict__", "_conv_forward", "_output_padding")
)
# Products of a forward itself, which no quantizer would see: of torch or of a tensor, and of torch.nn.functional.
_PRODUCTS = frozenset(
    ("matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "einsum", "tensordot", "inner", "dot")
)
_FUNCTIONAL_PRODUCTS = frozenset(
    (
        *("linear", "bilinear", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d", "conv_transpose1d"),
        *("conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"),
    )
)


@dataclass(frozen=True)
class Function:
    """A function that a forward calls by name, or the forward itself.

    Attributes:
        codes: its code, with that of functions inside.
        names: all names of attributes and globals in it.
        values: those of the globals that exist, and of closures.
    """

    codes: list[CodeType]
    names: set[str]
    values: list[Any]

    @property
    def is_functional(self) -> bool:
        """Whether it names ``torch.nn.functional``."""
        return "functional" in self.names or any(value is F for value in self.values)


def functions_of(start: Any, namespaces: Iterable[Mapping[str, Any]]) -> Iterator[Function]:
    """A function and all that it calls by name: globals, functions of modules, and methods in the ``namespaces``.

    Functions of torch are left out.

    >>> import torch
    >>> class Layer(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x)
    >>> [sorted(function.names) for function in functions_of(Layer.forward, [vars(Layer)])]
    [['forward', 'super']]
    """
    waiting, seen = [start], set()
    while waiting:
        function = inspect.unwrap(_function(waiting.pop()))
        if not isinstance(function, FunctionType) or function in seen or _is_torch_s(function.__module__):
            continue
        seen.add(function)
        codes = list(_codes(function.__code__))
        names = {name for code in codes for name in code.co_names}
        values = [function.__globals__[name] for name in names if name in function.__globals__]
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # An empty cell.
                values.append(cell.cell_contents)
        yield Function(codes, names, values)
        modules = [vars(value) for value in values if isinstance(value, ModuleType) and not _is_torch_s(value.__name__)]
        waiting += values
        waiting += [space[name] for space in (*namespaces, *modules) for name in names if name in space]


@functools.cache
def wraps_forward(kind: Any, base: Any, replacement: Any) -> bool:
    """Whether ``kind`` computes what its base class does, with more before and behind it, by its forward's code.

    Each forward between the two calls ``super().forward``. It has no other way to the weight, of which it may ask the
    dtype, device and shape; and no products of its own, which would stay in floating point. So all that computes with
    the weight is the forward of ``base``, or that of a ``replacement`` of which ``kind`` hides no name.

    >>> import torch
    >>> class Scaled(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x.to(self.weight.dtype))
    >>> class Masked(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.weight * self.mask)
    >>> [wraps_forward(kind, torch.nn.Linear, torch.nn.Linear) for kind in (Scaled, Masked)]
    [True, False]
    """
    order = kind.__mro__
    own, passed = order[: order.index(base)], order[order.index(base) : -1]
    annotations = {name for cls in replacement.__mro__ for name in getattr(cls, "__annotations__", ())}
    hidden = {*dir(replacement), *annotations} - {*dir(base)}
    if any((hidden | {"weight", "bias"}) & vars(cls).keys() for cls in own):  # These would be properties.
        return False
    # Each forward for itself: one that does not call the next would leave the layer unused.
    methods = [{name: value for name, value in vars(cls).items() if name != "forward"} for cls in own]
    for forward in [vars(cls)["forward"] for cls in own if "forward" in vars(cls)]:
        calls_next = False
        for function in functions_of(forward, methods):
            if _computes_past(function, passed):
                return False
            names_class = "super" in function.names or any(value in own for value in _classes(function))
            calls_next |= names_class and "forward" in function.names
        if not calls_next:
            return False
    return True


def _computes_past(function: Function, passed: tuple[type, ...]) -> bool:
    """Whether a function may compute with the weight, or with others, past ``super().forward``."""
    # As in nn.Linear.forward(self, x), which is not what stands next in the order of classes.
    if any(cls.__name__ in function.names or cls in _classes(function) for cls in passed):
        return True
    if function.names & (_OTHER_WAYS | _PRODUCTS):
        return True
    if function.is_functional and function.names & _FUNCTIONAL_PRODUCTS:
        return True
    if any(getattr(value, "__name__", "") in _FUNCTIONAL_PRODUCTS for value in function.values):
        return True
    return any(map(_reads_weight_or_multiplies, function.codes))


def _reads_weight_or_multiplies(code: CodeType) -> bool:
    """Whether it names a weight without asking for its metadata, or has the operator ``@``."""
    instructions = list(dis.get_instructions(code))
    for instruction, after in zip(instructions, [*instructions[1:], None], strict=True):
        if "MATRIX_MULTIPLY" in instruction.opname or instruction.argrepr in ("@", "@="):
            return True
        is_variable = "FAST" in instruction.opname or "DEREF" in instruction.opname
        asks = after is not None and after.opname.startswith("LOAD_") and after.argval in _METADATA
        if instruction.argval == "weight" and not (is_variable or asks):
            return True
    return False


def _classes(function: Function) -> list[type]:
    return [value for value in function.values if isinstance(value, type)]


def _is_torch_s(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] == "torch"


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _function(value: Any) -> Any:
    """The function in a method or property; any other value as it is."""
    if isinstance(value, (classmethod, staticmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value
