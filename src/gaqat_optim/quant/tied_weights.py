"""Weights that several layers share, as an embedding and a language model's head: one quantizer for each."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from .nn.base import QuantizedModule


def share_weight_quantizers(model: nn.Module, asked: Collection[nn.Module] = ()) -> None:
    """Give layers of ``model`` that share a weight one quantizer for it, where they quantize it in the same way.

    The first layer holds it. So its codes are the same in all of them, and a file has them once. Layers with other
    bits, another granularity, or the output channels on another axis keep a quantizer of their own, with a warning:
    their codes differ. So do those that the weight is in floating point for, but for the modules in ``asked``.

    >>> from gaqat_optim import quantize_model
    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    >>> net[1].weight = net[0].weight
    >>> quantized = quantize_model(net)
    >>> quantized[1].weight_quantizer is quantized[0].weight_quantizer
    True
    """
    holders: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(weight, {})[name] = module
    for sharing in holders.values():
        owners: dict[object, QuantizedModule] = {}
        names: dict[object, list[str]] = {}
        for name, module in sharing.items():
            if isinstance(module, QuantizedModule):
                owner = owners.setdefault(_form(module), module)
                if owner is not module and module.weight_quantizer is not None:
                    module.share_weight_quantizer(owner)
            elif module in asked:
                continue
            names.setdefault(_form(module), []).append(f"{name!r} {_described(module)}")
        if owners and len(names) > 1:
            warnings.warn(
                f"one weight is quantized in {len(names)} ways, so that files hold it {len(names)} times: "
                f"{'; '.join(', '.join(group) for group in names.values())}. Set the same weight_bits and "
                "weight_granularity for these layers in overrides to hold it once",
                stacklevel=3,
            )


def _form(module: nn.Module) -> object:
    """Equal for layers whose weight one quantizer can quantize."""
    quantizer = module.weight_quantizer if isinstance(module, QuantizedModule) else None
    if quantizer is None:
        return None
    layout = None if isinstance(module, QuantizedModule) and module.has_plain_weight else module
    return layout, quantizer.bits, quantizer.channel_axis, quantizer.init, quantizer.scale_domain


def _described(module: nn.Module) -> str:
    quantizer = module.weight_quantizer if isinstance(module, QuantizedModule) else None
    if quantizer is None:
        return f"({type(module).__name__}, floating point)"
    granularity = "tensor" if quantizer.channel_axis is None else "channel"
    return f"({type(module).__name__}, {quantizer.bits} bits per {granularity})"
