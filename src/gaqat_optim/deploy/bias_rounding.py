"""Training with the biases that are deployed: ``rounded_biases``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.lsq.quantizer import LSQQuantizer
from ..quant.nn.attention import QuantMultiheadAttention
from ..quant.nn.attention_functional import ROLES
from ..quant.nn.base import QuantizedModule
from .batchnorm_folding import Affine, following_norms
from .nn.activation_quantizer import ActivationQuantizer
from .nn.base import DeployLayer
from .nn.integer_parameters import spare_bits
from .nn.registry import deployed_class

_INT32_MAX = 2**31 - 1
_SMALLEST = torch.finfo(torch.float32).tiny


@contextmanager
def rounded_biases(model: nn.Module) -> Iterator[None]:
    r"""Within the block, let a quantized network compute with the biases that it will be deployed with.

    :func:`~gaqat_optim.convert` rounds every bias to a multiple of the unit u of its layer's sums, because integer
    kernels add it to those. It is the one thing that the deployed network does otherwise than the trained one, and at
    2 or 3 bits a few per cent of the decisions can turn on it. In the block, each layer adds

    .. math:: \mathrm{round}(b / u)\,u - b

    where b is its bias with a following BatchNorm's in it (by the running statistics), for all three as they are at
    that moment. The gradient of the rounding is taken as zero, so that of b is what it was. Train for the last epochs
    in the block, and choose and evaluate there: what is measured in it is what the file computes.

    A copy of the network that is made in the block, such as the best one so far, keeps the rounding for good.

    The BatchNorms are found as for ``convert``, at the begin of the block. Layers whose scales are not set yet, whose
    quantizers are off or whose bias stays in floating point have nothing added.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`; it is as before, but trained, when the block is left.

    Raises:
        ValueError: ``model`` has no quantized layers.

    Example:
        >>> from gaqat_optim import QuantConfig, convert, quantize_model
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        >>> x = torch.rand(256, 64)
        >>> model = quantize_model(net, QuantConfig(3, 3, first_last_bits="same"), calibration=x).eval()
        >>> with rounded_biases(model):
        ...     torch.allclose(model(x), convert(model)(x), atol=1e-5)
        True
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers whose biases could be rounded")
    norms = following_norms(model)
    handles = []
    try:
        for layer in layers:
            if layer in norms:
                # Before the output quantizer that may stand behind the norm.
                handles.append(norms[layer].register_forward_hook(_BehindNorm(layer), prepend=True))
            elif _has_integer_biases(layer):
                handles.append(layer.register_forward_pre_hook(_InLayer()))
                handles.append(layer.register_forward_hook(_AfterLayer(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_integer_biases(layer: QuantizedModule) -> bool:
    if isinstance(layer, QuantMultiheadAttention):
        return True
    deployed = deployed_class(type(layer))
    return deployed is not None and issubclass(deployed, DeployLayer) and deployed.is_linear


def remove_rounding(model: nn.Module) -> None:
    """Take the hooks of :func:`rounded_biases` out of a copy that was made in the block."""
    for module in model.modules():
        for registry in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in registry.items() if isinstance(hook, _Hook)]:
                del registry[key]


@torch.no_grad()
def rounding(
    bias: Tensor, weights: LSQQuantizer | None, inputs: LSQQuantizer | None, gain: Tensor | None = None
) -> Tensor:
    """What rounding adds to the bias of a layer: float64, ``(channels,)``.

    Args:
        bias: with that of a folded BatchNorm in it, ``(channels,)``.
        weights: the quantizer of the layer's weight.
        inputs: the quantizer of its input.
        gain: what a folded BatchNorm multiplies the scale by, float64, ``(channels,)``.
    """
    bias = bias.to(torch.float64)
    if not all(q is not None and q.enabled and q.is_initialized for q in (weights, inputs)):
        return torch.zeros_like(bias)
    assert weights is not None
    assert inputs is not None
    activation, scale = ActivationQuantizer.from_quantizer(inputs), weights.scale.to(torch.float32)
    if gain is not None:
        scale = (scale * gain).to(torch.float32)
    shift = spare_bits(weights.bits, activation)
    accumulator_scale = (activation.scale * (scale * 2.0**-shift)).to(torch.float64)
    codes = (bias / accumulator_scale).round()
    # A channel without a usable scale gets another one when it is deployed, in which its bias is almost exact.
    usable = (accumulator_scale.abs() >= _SMALLEST) & (codes.abs() <= _INT32_MAX)
    return torch.where(usable, codes * accumulator_scale - bias, 0.0)


class _Hook:
    """Base of the hooks, to know them by."""


class _BehindNorm(_Hook):
    """Forward hook of a BatchNorm: adds the rounding of the bias that the norm and its layer have together."""

    def __init__(self, layer: QuantizedModule) -> None:
        self.layer = layer

    def __call__(self, norm: _BatchNorm, args: Any, y: Tensor) -> Tensor:
        affine, layer = Affine.of(norm), self.layer
        bias: Any = layer.bias
        added = rounding(affine.bias(bias).detach(), layer.weight_quantizer, layer.input_quantizer, affine.gain)
        return y + added.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2))


class _InLayer(_Hook):
    """Forward pre-hook of a layer: puts the rounded bias before the parameter, as an attribute of the same name."""

    def __call__(self, layer: Any, args: Any) -> None:
        if isinstance(layer, QuantMultiheadAttention):
            if layer.in_proj_bias is not None:
                biases = zip(ROLES, layer.in_proj_bias.detach().chunk(3), strict=True)
                parts = [
                    rounding(b, getattr(layer, f"{role}_weight_quantizer"), getattr(layer, f"{role}_quantizer"))
                    for role, b in biases
                ]
                vars(layer)["in_proj_bias"] = layer.in_proj_bias + torch.cat(parts).to(layer.in_proj_bias.dtype)
        elif layer.bias is not None:
            added = rounding(layer.bias.detach(), layer.weight_quantizer, layer.input_quantizer)
            vars(layer)["bias"] = layer.bias + added.to(layer.bias.dtype)


class _AfterLayer(_Hook):
    """Forward hook of a layer, which runs after a failure as well: takes that attribute away."""

    def __call__(self, layer: Any, args: Any, y: Any) -> None:
        for name in ("bias", "in_proj_bias"):
            vars(layer).pop(name, None)
