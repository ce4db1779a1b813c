"""Weights that are read past their quantized layer: an error at calibration, or at the first training forward."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .nn import functional_calls
from .nn.base import QuantizedModule
from .nn.unsupported import exclude_argument

# What reads no value of a tensor: its shape, dtype and the like.
_METADATA = frozenset(
    (
        *("dim", "size", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "data_ptr"),
        *("__len__", "__hash__", "__repr__", "__format__", "zeros_like"),
        *("ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones"),
        *("new_empty", "new_full", "new_tensor", "requires_grad_", "retain_grad", "register_hook", "untyped_storage"),
        *("__set__", "__delete__"),
    )
)
_METADATA_OF_OTHERS = ("to", "type_as", "expand_as", "view_as", "reshape_as")  # values of the first tensor alone
_VALUES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))  # properties that are the values
_TORCH = Path(torch.__file__).parent
_ROUTING = Path(functional_calls.__file__)


@dataclass(frozen=True)
class _Read:
    """A use of the weight of ``layer`` in the forward of another module, the ``reader``, at ``place``."""

    layer: nn.Module
    reader: nn.Module | None
    place: str


@contextmanager
def refuse_weight_reads(model: nn.Module, exclude: Iterable[str] = ()) -> Iterator[None]:
    """Raise at the end of the block for every weight that it read past a quantized layer of ``model``.

    Such a use, as in ``x @ self.words.weight.T``, trains in floating point what the summary says has bits. A torch
    function mode sees every use of every parameter. The Python stack tells whose it is: the use is legitimate in a
    method of a module that holds the parameter itself, as the layer does and each layer that shares it; where the layer
    has a forward of its own, inside of the one that this wraps. A call of ``F.linear`` that is routed to the layer
    (:mod:`~gaqat_optim.quant.nn.functional_calls`) is the layer's own.

    Raises:
        ValueError: names all such layers, where each is read, and the ``exclude`` that leaves them out.
    """
    observer = _Observer(model)
    with observer:
        yield
    if not observer.reads:
        return
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    lines = ""
    for read in observer.reads.values():
        reader = "a function" if read.reader is None else f"{names.get(read.reader) or 'the model'!r}"
        kind = "" if read.reader is None else f" ({type(read.reader).__name__})"
        lines += f"\n  {names[read.layer]!r} ({type(read.layer).__name__}) by {reader}{kind}, {read.place}"
    advice = exclude_argument(model, (names[layer] for layer in observer.reads), exclude)
    raise ValueError(
        f"the weights of {len(observer.reads)} quantized layers are read past them, in floating point:{lines}\n"
        f"Call the layers there, or leave them in floating point with {advice}"
    )


class _Observer(TorchFunctionMode):
    """Notes the first read past each quantized layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reads: dict[nn.Module, _Read] = {}
        self._layers: dict[int, list[nn.Module]] = {}  # by the parameter, which tied layers share
        for layer in model.modules():
            if isinstance(layer, QuantizedModule):
                for name, parameter in layer.named_parameters(recurse=False):
                    # A forward of its own may use parameters of its own.
                    if parameter.dim() > 1 and (name == "weight" or layer.inner_class is None):
                        self._layers.setdefault(id(parameter), []).append(layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reads_values(func):
            operands = args[:1] if func.__name__ in _METADATA_OF_OTHERS else (*args, *kwargs.values())
            for parameter in _tensors(operands):
                layers = self._layers.get(id(parameter), ())
                if any(layer not in self.reads for layer in layers):
                    self._note(parameter, layers)
        return func(*args, **kwargs)

    def _note(self, parameter: torch.Tensor, layers: Iterable[nn.Module]) -> None:
        reader, place, quantizing = None, "", None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                if frame.f_code is QuantizedModule.forward.__code__:
                    quantizing = module
                wraps = isinstance(module, QuantizedModule) and module.inner_class is not None
                if _holds(module, parameter) and (not wraps or module is quantizing):
                    return
                reader = reader or module
            path = Path(frame.f_code.co_filename)
            if not place and _TORCH not in path.parents and path != _ROUTING:
                place = f"{path}:{frame.f_lineno}"
            frame = frame.f_back
        for layer in layers:
            self.reads.setdefault(layer, _Read(layer, reader, place))


def _reads_values(func: Any) -> bool:
    if func.__name__ == "__get__":  # of a property
        return getattr(func.__self__, "__name__", "") in _VALUES
    return func.__name__ not in _METADATA


def _tensors(operands: Iterable[Any]) -> Iterator[torch.Tensor]:
    for operand in operands:
        if isinstance(operand, torch.Tensor):
            yield operand
        elif isinstance(operand, (tuple, list)):
            yield from _tensors(operand)
        elif isinstance(operand, dict):
            yield from _tensors(operand.values())


def _holds(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` belongs to ``module``, or to a child of it that it quantizes, as attention's projection."""
    own = module.modules() if isinstance(module, QuantizedModule) else (module,)
    return any(value is parameter for owner in own for value in owner._parameters.values())
