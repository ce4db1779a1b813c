"""Less memory for activations: backward quantizes each layer's input again."""

from __future__ import annotations

from torch import nn

from .base import QuantizedModule


def recompute_activations(model: nn.Module, enabled: bool = True) -> None:
    """Let the quantized layers of ``model`` save less for backward, at the price of a little time.

    A layer saves its quantized input for the gradient of its weight, and the quantizer saves the input itself: two
    tensors where the floating-point network has one. With this, each layer saves the input alone, and backward
    quantizes it again, to the same bits.

    Not affected are attention projections, quantizers with hooks or of a user's subclass, the transforms of
    ``torch.func``, and compiled models, where the compiler decides what to save.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`.
        enabled: ``False`` saves both tensors again.

    Raises:
        ValueError: ``model`` has no quantized layers.

    Example:
        >>> import torch
        >>> from gaqat_optim import quantize_model, recompute_activations
        >>> model = quantize_model(nn.Linear(4, 2), calibration=torch.rand(8, 4))
        >>> recompute_activations(model)
        >>> model(torch.rand(8, 4)).sum().backward()
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers")
    for layer in layers:
        layer.recompute_input = enabled
