"""Which deployed class takes the place of a quantized class, and what all deployed classes offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...quant.graph.norm import Norm
from ...quant.nn.base import QuantizedModule
from ...quant.nn.registry import inner_class

D = TypeVar("D", bound="type[DeployedModule]")

# Quantized class to deployed class.
DEPLOYED: dict[type[nn.Module], type[DeployedModule]] = {}
# A subclass that replaces one of these methods computes something else than the class that is registered.
_COMPUTATION = (
    *("forward", "compute", "quantized_weight", "channels_first", "from_channels_first"),
    *("_conv_forward", "_output_padding"),
)


_PLAIN = (int, float, str, tuple, torch.dtype, type(None))


class DeployedModule(nn.Module):
    """Base class of the modules that take the place of quantized layers. They keep the hooks and plain attributes.

    Around a layer whose class has a forward of its own, a ``ForwardAround`` keeps them.

    Args:
        source: the layer to replace, quantized or float.
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ()  # attributes of the source that the operation needs

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        kept = {} if inner_class(type(source)) is not None else vars(source)
        for attribute, value in kept.items():  # that a forward may read, as kernel_size and in_features
            own = attribute.startswith("_") or attribute.endswith("_quantizer") or hasattr(self, attribute)
            if isinstance(value, _PLAIN) and not own:
                setattr(self, attribute, value)
        self.copy_hyperparameters(source)
        for attribute, value in kept.items():
            if attribute.startswith("_forward_"):  # the registries of hooks
                setattr(self, attribute, value)

    @classmethod
    def from_quantized(cls, name: str, layer: Any, norm: Norm | None = None) -> Self:
        """The deployed form of the quantized layer with the qualified name ``name``, with ``norm`` folded in."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, source: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The module in the place of ``source`` that :meth:`to_dict` describes; its tensors are given by name."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors and the code, for JSON."""
        return {"hyperparameters": self.hyperparameters_of(self)}

    def copy_hyperparameters(self, source: Any) -> None:
        """Copy what the operation needs from the source."""
        for name in self.hyperparameters:
            setattr(self, name, getattr(source, name))

    @classmethod
    def hyperparameters_of(cls, layer: nn.Module) -> dict[str, Any]:
        """The hyperparameters of a float, quantized or deployed layer, for JSON."""
        values = {name: getattr(layer, name) for name in cls.hyperparameters}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def deploys(*types: type[nn.Module]) -> Callable[[D], D]:
    """Register a class as the deployed form of quantized classes, for :func:`~gaqat_optim.convert`."""

    def register(cls: D) -> D:
        DEPLOYED.update(dict.fromkeys(types, cls))
        return cls

    return register


def deployed_class(quantized: type[QuantizedModule]) -> type[DeployedModule] | None:
    """The deployed form of a quantized class, or ``None``.

    It is the class's own ``deployed_as``, or the form of the nearest base class that computes the same; of a class with
    a forward of its own, the form of what that wraps.
    """
    quantized = quantized.inner_class or quantized
    for base in quantized.__mro__:
        deployed: Any = vars(base).get("deployed_as") or DEPLOYED.get(base)
        if deployed is not None:
            same = all(getattr(quantized, name, None) is getattr(base, name, None) for name in _COMPUTATION)
            return deployed if same else None
    return None
