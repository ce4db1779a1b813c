"""Training with the biases that are deployed: ``rounded_biases``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.modules import QuantizedModule
from .convert import _activation, _room
from .fold import Affine, BiasHook, following_norms
from .layers import DEPLOYED

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
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule) and type(m) in DEPLOYED]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers whose biases could be rounded")
    norms = following_norms(model)
    handles = []
    try:
        for layer in layers:
            norm = norms.get(layer)
            if norm is not None:
                # Before the output quantizer that may stand behind the norm.
                handles.append(norm.register_forward_hook(_BehindNorm(layer), prepend=True))
            elif layer.bias is not None:
                handles.append(layer.register_forward_pre_hook(_InLayer()))
                handles.append(layer.register_forward_hook(_AfterLayer(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def rounding(layer: QuantizedModule, norm: _BatchNorm | None) -> Tensor | None:
    """What rounding adds to the bias of ``layer`` and ``norm``: float64, ``(channels,)``; ``None`` for nothing."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if (
        weights is None
        or inputs is None
        or not (weights.enabled and inputs.enabled and weights.is_set and inputs.is_set)
    ):
        return None
    activation = _activation(inputs, "")
    scale, bias = weights.scale.to(torch.float32), layer.bias
    if norm is not None:
        affine = Affine.of(norm)
        scale, bias = (scale * affine.gain).to(torch.float32), affine.bias(bias)  # type: ignore[arg-type]
    assert isinstance(bias, Tensor)
    bias = bias.to(torch.float64)
    unit = (activation.scale * (scale * 2.0 ** -_room(weights.bits, activation))).to(torch.float64)
    codes = (bias / unit).round()
    # A channel without a usable unit has one of its own when it is deployed, in which its bias is almost exact.
    usable = (unit.abs() >= _SMALLEST) & (codes.abs() <= _INT32_MAX)
    return torch.where(usable, codes * unit - bias, 0.0)


class _BehindNorm(BiasHook):
    """Forward hook of a BatchNorm: adds the rounding of the bias that the norm and its layer have together."""

    def __init__(self, layer: QuantizedModule) -> None:
        self.layer = layer

    def __call__(self, norm: Any, args: Any, y: Tensor) -> Tensor:
        added = rounding(self.layer, norm)
        return y if added is None else y + added.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2))


class _InLayer(BiasHook):
    """Forward pre-hook of a layer: puts the rounded bias before the parameter, as an attribute of the same name."""

    def __call__(self, layer: Any, args: Any) -> None:
        added = rounding(layer, None)
        if added is not None:
            vars(layer)["bias"] = layer.bias + added.to(layer.bias.dtype)


class _AfterLayer(BiasHook):
    """Forward hook of a layer, which runs after a failure as well: takes that attribute away."""

    def __call__(self, layer: Any, args: Any, y: Any) -> None:
        vars(layer).pop("bias", None)
