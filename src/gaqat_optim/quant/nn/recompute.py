"""Less memory for activations: quantized inputs are not kept for backward, but quantized again."""

from __future__ import annotations

from torch import nn

from .base import QuantizedModule


def recompute_activations(model: nn.Module, enabled: bool = True) -> None:
    """Let the quantized layers of ``model`` keep less for backward, at the price of a little time.

    A layer keeps its quantized input for the gradient of its weight, and the quantizer keeps the input itself: two
    tensors where the floating-point network has one. With this, each layer keeps the input alone, and quantizes it
    again when backward asks for it, to the same bits. (The projections of an ``nn.MultiheadAttention`` go on as they
    were; so do layers whose input quantizer has hooks or is of a class of one's own, the transforms of ``torch.func``,
    and a compiled network, where the compiler decides what is kept.)

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`.
        enabled: ``False`` goes back to keeping both.

    Raises:
        ValueError: ``model`` has no quantized layers.

    Example:
        >>> from gaqat_optim import quantize_model
        >>> import torch
        >>> from gaqat_optim.quant.nn.recompute import recompute_activations
        >>> model = quantize_model(nn.Linear(4, 2), calibration=torch.rand(8, 4))
        >>> recompute_activations(model)
        >>> model(torch.rand(8, 4)).sum().backward()
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers")
    for layer in layers:
        layer.recompute_input = enabled
        if layer._modules.get("input_quantizer") is not None:
            layer.input_quantizer.save_output_for_backward = not enabled  # type: ignore[union-attr]
