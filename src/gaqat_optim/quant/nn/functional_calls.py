"""``F.linear(x, self.qkv.weight)``, with the weight of a quantized child, as a call of that child."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import QuantizedModule
from .linear import QuantLinear
from .own_forward import functions_of

# What a subclass of QuantLinear must inherit to compute F.linear of its quantized operands.
_COMPUTATION = ("forward", "compute", "float_weight", "channels_first", "from_channels_first")
# By this private method nn.DataParallel copies a module, with its forward as it is; there is no public way.
_REPLICATE = "_replicate_for_data_parallel"


class RoutedForward:
    """The forward of ``module``, in which ``F.linear`` with the weight of one of the ``names`` calls that layer.

    The layer quantizes input and weight as in a call of its own, and adds the given bias. So window attention is
    quantized that hands the weights of its layers to a function, as torchvision's Swin does. A torch function mode does
    it, while the forward runs. Other uses of the weights are not changed, and stay an error
    (:mod:`~gaqat_optim.quant.weight_reads`).

    The object is an attribute of the module, which survives copies, pickling and conversion. It holds names, since
    ``convert`` replaces the layers.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        self.module, self.names = module, tuple(names)

    @property
    def layers(self) -> list[Any]:
        """The layers whose weights are routed; one that the user has replaced by a float layer is none."""
        layers = [self.module.get_submodule(name) for name in self.names]
        return [layer for layer in layers if hasattr(layer, "input_quantizer")]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Routing(self.layers):
            return type(self.module).forward(self.module, *args, **kwargs)

    def replicate(self) -> nn.Module:
        """A copy of the module for ``nn.DataParallel``, whose forward calls the layers of the copy."""
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)  # type: ignore[no-untyped-call]
        _route(replica, self.names)
        return replica

    @property
    def __code__(self) -> Any:
        """torch.export of torch 2.8 reads it, of the network that it exports."""
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))


class _Routing(TorchFunctionMode):
    """Calls a layer for ``F.linear`` with its weight: the parameter itself, which its own forward never uses."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        for layer in self.layers:
            if weight is layer.weight:
                return layer(input) if bias is layer.bias else layer(input, bias)
        return F.linear(input, weight, bias)


def is_linear(layer: nn.Module) -> bool:
    """Whether a quantized layer computes ``F.linear`` of its quantized operands, and nothing else."""
    return isinstance(layer, QuantLinear) and all(
        getattr(type(layer), name) is getattr(QuantLinear, name) for name in _COMPUTATION
    )


def route_functional_calls(
    model: nn.Module, routable: Callable[[nn.Module], bool] = is_linear, undo: ExitStack | None = None
) -> None:
    """Make each module of ``model`` a :class:`RoutedForward` whose own code calls ``F.linear`` with a child's weight.

    The code of its class tells whether a module does. So the answer is the same for a network that was calibrated, for
    one that is rebuilt from its configuration, and on all ranks; and all other modules run as before.

    Args:
        model: a quantized or a deployed network.
        routable: whether a layer may be called in place of ``F.linear``. Of a weight that several modules hold, it
            cannot be told whose it is: these stay out.
        undo: takes what undoes each change.
    """
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module in model.modules():
        kind: Any = type(module)
        own = vars(module).get("forward")
        is_own = own is not None and not isinstance(own, RoutedForward)
        if is_own or isinstance(module, QuantizedModule) or not reads_weights(kind):
            continue
        names = [
            name
            for name, layer in module.named_modules()
            if layer is not module and routable(layer) and holders[id(layer.weight)] <= 1
        ]
        if names:
            _route(module, names)
            if undo is not None:
                for attribute in ("forward", _REPLICATE):
                    undo.callback(vars(module).pop, attribute)


def _route(module: nn.Module, names: Iterable[str]) -> None:
    forward = RoutedForward(module, names)
    vars(module).update({"forward": forward, _REPLICATE: forward.replicate})


def routed_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules with a :class:`RoutedForward`, each with every layer that it calls."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, RoutedForward):
            for layer in forward.layers:
                yield module, layer


# -- which classes do it -------------------------------------------------------------------------------------------


@functools.cache
def reads_weights(kind: Any) -> bool:
    """Whether the forward of ``kind``, with what it calls by name, names a ``weight`` and calls ``F.linear``.

    A forward with a checkpoint inside does not count. In backward, the checkpoint would run its function again, outside
    of the forward and so without the layers.

    >>> class Reads(nn.Module):
    ...     def forward(self, x):
    ...         return F.linear(x, self.fc.weight)
    >>> reads_weights(Reads), reads_weights(nn.Transformer)
    (True, False)
    """
    reads = calls = False
    for function in functions_of(kind.forward, [vars(owner) for owner in kind.__mro__]):
        if any("checkpoint" in name for name in function.names):
            return False
        reads |= "weight" in function.names
        calls |= "linear" in function.names and function.is_functional
        calls |= any(value is F.linear for value in function.values)
    return reads and calls
