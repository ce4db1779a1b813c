"""Weights of linear and convolutional work that stay in floating point without the user's wish: a warning."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from .nn.base import QuantizedModule
from .nn.unsupported import exclude_argument
from .summary import count_macs

# A warning appears when a larger share of the weights stays in floating point.
TOLERATED_SHARE = 0.1
_MOST_NAMES = 5  # in the warning

_NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NO_FACTOR = re.compile(r"embed|token|table|bias|(^|_)pos(_|$|ition)|^(query|queries|latents?|probe)$")


def product_weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` itself that multiply activations, as far as names and shapes can tell.

    They have two axes or more that are longer than 1, which a class token or a scale per channel has not. Tables,
    normalizations, and what is called a position, token, bias or query are none.

    >>> [tuple(weight.shape) for weight in product_weights(nn.Bilinear(2, 3, 4))]
    [(4, 2, 3)]
    >>> product_weights(nn.Embedding(4, 3))
    []
    """
    if isinstance(module, _NO_PRODUCTS) or type(module).__name__.endswith(("Embedding", "Embeddings")):
        return []
    named = [(name, p) for name, p in module.named_parameters(recurse=False) if not is_lazy(p)]
    return [p for name, p in named if sum(n > 1 for n in p.shape) >= 2 and not _NO_FACTOR.search(name.lower())]


def remember_float_layers(model: nn.Module) -> None:
    """Note on the quantized ``model`` which of its modules multiply in floating point, for a later comparison."""
    model._float_layers = tuple(_float_layers(model))  # type: ignore[assignment]


def warn_of_new_float_layers(model: nn.Module) -> None:
    """Warn of modules that multiply in floating point and did not when ``quantize_model`` was called.

    So it is after the ``reparameterize`` or ``fuse`` of a re-parameterizable network, which replaces branches of
    quantized convolutions by one that nothing quantizes.
    """
    new: dict[str, nn.Module] = {}
    for root, part in model.named_modules():
        known = vars(part).get("_float_layers")
        if known is not None:
            prefix = f"{root}." if root else ""
            new |= {prefix + name: module for name, module in _float_layers(part).items() if name not in known}
    if new:
        warnings.warn(
            f"{len(new)} layers came after quantize_model, and stay in floating point: {_named(new)}. If "
            "reparameterize or fuse made them of quantized layers, call it before quantize_model",
            stacklevel=4,
        )


def _float_layers(model: nn.Module) -> dict[str, nn.Module]:
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    inside = {inner for module in quantized for inner in module.modules()}
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if module not in inside and product_weights(module)}


def _named(modules: Mapping[str, nn.Module]) -> str:
    named = [f"{name or 'the model'} ({type(module).__name__})" for name, module in modules.items()]
    more = f" and {len(named) - _MOST_NAMES} more" if len(named) > _MOST_NAMES else ""
    return f"{', '.join(named[:_MOST_NAMES])}{more}"


class FloatWeights:
    """The weights of a quantized network that stay in floating point without the user's wish.

    Args:
        model: the quantized network.
        asked: the modules that the user leaves in floating point.
    """

    def __init__(self, model: nn.Module, asked: Collection[nn.Module]) -> None:
        self.model = model
        self._weights: dict[nn.Module, dict[int, int]] = {}  # numbers by parameter, so that tied weights count once
        self._left: dict[str, nn.Module] = {}
        self._macs: Counter[nn.Module | None] = Counter()
        for name, module in model.named_modules():
            numbers = {id(weight): weight.numel() for weight in product_weights(module)}
            if numbers:
                self._weights[module] = numbers
                if not isinstance(module, QuantizedModule) and module not in asked:
                    self._left[name] = module

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the multiply-accumulates of the block, if any weights stay; it runs the network."""
        if not self._left:
            yield
            return
        with count_macs(self.model, self._weights) as self._macs:
            yield

    def warn(self, exclude: Iterable[str]) -> None:
        """Warn if more than a tenth of the weights, or of the multiply-accumulates that were counted, is such.

        Products count for a module that multiplies a matrix by its weight, but not those of a weight of three axes.

        Args:
            exclude: the patterns of the configuration, which the advice repeats.
        """
        quantized = {key for module, w in self._weights.items() if isinstance(module, QuantizedModule) for key in w}
        left = {key: n for m in self._left.values() for key, n in self._weights[m].items() if key not in quantized}
        total = {key: n for numbers in self._weights.values() for key, n in numbers.items()}
        shares = {"weights": sum(left.values()) / max(sum(total.values()), 1)}
        macs = sum(self._macs[module] for module in self._weights)
        mac_share = sum(self._macs[module] for module in self._left.values()) / max(macs, 1)
        if mac_share > TOLERATED_SHARE:  # A small one may lack the products of weights of three axes.
            shares["multiply-accumulates"] = mac_share
        if max(shares.values()) <= TOLERATED_SHARE:
            return
        # Those that compute most come first; without a calibration all are equal. An attention's projection is its own.
        named = {
            name: module
            for name, module in sorted(self._left.items(), key=lambda item: -self._macs[item[1]])
            if not isinstance(module, NonDynamicallyQuantizableLinear)
        }
        types = ", ".join(sorted({type(module).__name__ for module in named.values()}))
        instead = ""
        if any(isinstance(module, nn.MultiheadAttention) for module in named.values()):
            instead = "in place of a class that derives from nn.MultiheadAttention, hold one in a module; "
        warnings.warn(
            f"{' and '.join(f'{share:.1%} of the {what}' for what, share in shares.items())} of linear and "
            f"convolutional layers stay in floating point: {_named(named)}. No quantized class is registered for "
            f"{types}: {instead}register one with gaqat_optim.register_quantized, or accept it with "
            f"{exclude_argument(self.model, self._left, exclude)}",
            stacklevel=3,
        )
