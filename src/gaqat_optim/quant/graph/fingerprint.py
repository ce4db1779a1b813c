"""What the calls in a network's forward depend on, for a comparison: all that it holds, but the values of weights."""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from ..lsq.quantizer import LSQQuantizer, is_unmodified
from .output_hook import quantize_output

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range)
_CONSTANT = (
    *(type, enum.Enum, types.CodeType, types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, types.MappingProxyType)
_NOTES = ("quant_config", "_float_layers")  # of this package on a network: no forward reads them
_MOST_VALUES = 64  # of a tensor that is neither parameter nor buffer, and that a forward may branch on


class _UnknownError(Exception):
    """An object whose state cannot be seen from Python."""


def fingerprint(model: nn.Module) -> tuple[Any, ...] | None:
    """A description that is equal for two networks if their forwards make the same calls; ``None`` if it is unknown.

    It contains every attribute of every module, the code of functions, and class attributes; of parameters and buffers
    shape, type and whether they need gradients; and which of all these are one object. A copy of a network has the
    same.
    Quantizers are left out: a trace has them off, and then they return their input. It holds no module and no tensor.
    What a forward reads elsewhere, in global variables, is not in it.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(a) == fingerprint(b), fingerprint(a) == fingerprint(b.requires_grad_(False))
    (True, False)
    """
    seen = _Description()
    try:
        seen.add_model(model)
    except (_UnknownError, RecursionError):
        return None
    autocast = [(kind, torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")]
    return (torch.get_default_dtype(), *autocast, *seen.tokens)


class _Description:
    """The tokens of the objects that were added, each object once."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._in_class = False
        self._alive: list[Any] = []  # so that no two objects have one id

    def add_model(self, model: nn.Module) -> None:
        self._add_class(type(model))
        self._number(model)
        self._add_module(model, _NOTES)

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            self.tokens += (type(value), value)
        elif isinstance(value, _CONSTANT):
            self.tokens.append(value)
        elif id(value) in self._numbers:
            self.tokens += ("again", self._numbers[id(value)])
        else:
            self._number(value)
            self._add_content(value)

    def _number(self, value: Any) -> None:
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        self.tokens.append(type(value))

    def _add_content(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
            if not value.is_meta and value.numel() <= _MOST_VALUES:
                self.tokens.append(repr(value.tolist()))
        elif isinstance(value, nn.Module):
            if not self._in_class:
                self._add_class(type(value))
            self._add_module(value)
        elif isinstance(value, _CONTAINERS):
            self._add_items(value)
        elif self._in_class:
            self.tokens.append(_Identity(value))
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            self._add_all(value.__code__, value.__defaults__, value.__kwdefaults__, cells, vars(value))
        elif isinstance(value, types.MethodType):
            self._add_all(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self._add_all(value.func, value.args, value.keywords)
        elif isinstance(value, weakref.ref):
            self.add(value())
        elif type(value).__dictoffset__ and all(_is_python_s(kind) for kind in type(value).__mro__[:-1]):
            self._add_class(type(value))
            self.add(vars(value))
        else:
            raise _UnknownError

    def _add_all(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    def _add_items(self, value: Any) -> None:
        self.tokens.append(len(value))
        if isinstance(value, (dict, types.MappingProxyType)):
            for key, item in value.items():
                self._add_all(key, item)
        else:
            self._add_all(*value)
        if attributes := getattr(value, "__dict__", None):
            self.add(attributes)

    def _add_module(self, module: nn.Module, notes: tuple[str, ...] = ()) -> None:
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    self.tokens.append(key)
                    if tensor is None or id(tensor) in self._numbers:
                        self.add(tensor)
                    else:
                        self._number(tensor)
                        self._add_tensor(tensor)
            elif name == "_forward_hooks":
                self._add_all(*(hook for hook in value.values() if hook is not quantize_output))
            elif name == "_modules":
                self._add_attributes(value)
            elif name != "training" and name not in notes:  # A trace is in evaluation mode.
                self._add_attributes({name: value})
        self.tokens.append("end")

    def _add_attributes(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            is_quantizer = isinstance(value, LSQQuantizer) and is_unmodified(value)
            if not is_quantizer and not (name == "output_quantizer" and value is None):
                self._add_all(name, value)

    def _add_tensor(self, tensor: Tensor) -> None:
        self.tokens += (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.requires_grad, tensor.layout)

    def _add_class(self, kind: type) -> None:
        """What may be changed in a class: its attributes, and functions and other objects by identity."""
        if id(kind) in self._numbers:
            return
        self._numbers[id(kind)] = len(self._numbers)
        for base in kind.__mro__[:-1]:
            if base.__module__.partition(".")[0] == "torch":
                self.tokens += (base, vars(base).get("forward"))
                continue
            for name, value in list(vars(base).items()):
                self.tokens.append(name)
                self._in_class = True
                try:
                    self.add(value)
                finally:
                    self._in_class = False


class _Identity:
    """Equal for the same object of a class, which lives as long as the class does."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_python_s(kind: type) -> bool:
    """Whether objects of a class that was defined in Python have their state in a ``__dict__``, as far as it goes."""
    is_heap_type = bool(kind.__flags__ & (1 << 9))
    return is_heap_type and not vars(kind).get("__slots__") and not type(kind).__name__.startswith("pybind11")
