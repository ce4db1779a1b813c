"""Training with the biases that are deployed: ``rounded_biases``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.graph.norm import Norm
from ..quant.lsq.quantizer import LSQQuantizer
from ..quant.nn.attention import QuantMultiheadAttention
from ..quant.nn.attention_functional import ROLES
from ..quant.nn.base import QuantizedModule
from ..quant.nn.functional_calls import routed_layers
from .batchnorm_folding import fold_batchnorm, following_norms
from .nn.base import DeployLayer
from .nn.integer_parameters import spare_bits
from .nn.registry import deployed_class

_INT32_MAX = 2**31 - 1
_READER = "_bias_reader"  # of a layer: the module that runs, reads its bias and has hidden it
_SMALLEST = torch.finfo(torch.float32).tiny


@contextmanager
def rounded_biases(model: nn.Module) -> Iterator[None]:
    r"""Within the block, let a quantized network compute with the biases that it will be deployed with.

    :func:`~gaqat_optim.convert` rounds every bias to a multiple of the accumulator scale u of its layer, because
    integer kernels add the bias to a sum of integers. This rounding is the only numerical difference between training
    and deployment; at 2 or 3 bits it can change a few percent of the predictions. In the block, each layer adds

    .. math:: \mathrm{round}(b / u)\,u - b

    where b is its bias, with a following BatchNorm's in it (by the running statistics), and b and u have the values of
    the moment. The rounding has no gradient of its own, so the gradient of b stays as it was. Train for the last epochs
    in the block, and choose and evaluate there: the network in the block computes what the file computes.

    A copy of the network that is made in the block, such as the best one so far, keeps the rounding for good.

    The BatchNorms are found as for ``convert``, at the begin of the block. Nothing is added to a layer whose scales are
    not set yet, whose quantizers are off, or whose bias stays in floating point. A forward that reads the bias of a
    quantized layer for an ``F.linear`` of its own, as window attention does, reads the rounded one.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`; after the block it is as before, but trained.

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
    norms, _ = following_norms(model)
    handles = []
    try:
        for layer in layers:
            if layer in norms and norms[layer].is_output:
                # Before the output quantizer that may stand behind the norm.
                add = partial(_add_behind_norm, layer, norms[layer])
                handles.append(norms[layer].module.register_forward_hook(add, prepend=True))
            elif layer in norms:
                norm = norms[layer]
                handles.append(norm.module.register_forward_pre_hook(partial(_shadow_norm_bias, layer, norm)))
                restore = partial(_restore_norm_bias, norm)
                handles.append(norm.module.register_forward_hook(restore, always_call=True))
            elif _has_integer_bias(layer):
                handles.append(layer.register_forward_pre_hook(_shadow_bias))
                handles.append(layer.register_forward_hook(_restore_bias, always_call=True))
        for reader, layer in routed_layers(model):
            if _has_integer_bias(layer):
                handles.append(reader.register_forward_pre_hook(partial(_shadow_read_bias, layer)))
                restore = partial(_restore_read_bias, layer)
                handles.append(reader.register_forward_hook(restore, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def remove_rounding(model: nn.Module) -> None:
    """Take the hooks of :func:`rounded_biases` out of a copy that was made in the block."""
    ours = (
        *(_add_behind_norm, _shadow_bias, _restore_bias, _shadow_norm_bias, _restore_norm_bias),
        *(_shadow_read_bias, _restore_read_bias),
    )
    for module in model.modules():
        for registry in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in registry.items() if getattr(hook, "func", hook) in ours]:
                del registry[key]


def _has_integer_bias(layer: QuantizedModule) -> bool:
    deployed = deployed_class(type(layer))
    is_linear = deployed is not None and issubclass(deployed, DeployLayer) and deployed.is_linear
    return is_linear or isinstance(layer, QuantMultiheadAttention)


def _add_behind_norm(layer: QuantizedModule, norm: Norm, module: nn.Module, args: Any, y: Tensor) -> Tensor:
    """Forward hook of a BatchNorm: adds the rounding of the bias that the norm and its layer have together."""
    added = _rounding_with_norm(layer, norm)
    return y + added.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2))


def _shadow_norm_bias(layer: QuantizedModule, norm: Norm, module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a module that goes on with the result of its norm: the same, in the bias of the norm."""
    assert norm.bias is not None
    bias, added = getattr(module, norm.bias), _rounding_with_norm(layer, norm)
    vars(module)[norm.bias] = added.to(layer.weight.dtype) if bias is None else bias + added.to(bias.dtype)


def _restore_norm_bias(norm: Norm, module: nn.Module, args: Any, y: Any) -> None:
    """Forward hook of that module, which runs after a failure as well: uncovers the bias."""
    assert norm.bias is not None
    vars(module).pop(norm.bias, None)


def _rounding_with_norm(layer: QuantizedModule, norm: Norm) -> Tensor:
    layer_bias: Any = layer.bias
    gain, bias = fold_batchnorm(norm, layer_bias)
    rounding = _rounding(bias, layer.weight_quantizer, layer.input_quantizer, gain)
    if not norm.channels:
        return rounding
    return rounding.new_zeros(norm.size).index_copy(0, torch.tensor(norm.channels, device=rounding.device), rounding)


def _shadow_bias(layer: Any, args: Any) -> None:
    """Forward pre-hook of a layer: hides the bias behind the rounded one.

    Python looks for an attribute in the instance's ``__dict__`` before it calls ``nn.Module.__getattr__``, which looks
    for a parameter. So an entry of that name is what forward reads, while the parameter stays registered and trains.
    """
    name = _bias_name(layer)
    bias = getattr(layer, name, None)
    if bias is None or _READER in vars(layer):
        return
    if isinstance(layer, QuantMultiheadAttention):
        quantizers = [
            (getattr(layer, f"{role}_weight_quantizer"), getattr(layer, f"{role}_quantizer")) for role in ROLES
        ]
    else:
        quantizers = [(layer.weight_quantizer, layer.input_quantizer)]
    chunks = bias.detach().chunk(len(quantizers))
    added = torch.cat([_rounding(chunk, *pair) for chunk, pair in zip(chunks, quantizers, strict=True)])
    vars(layer)[name] = bias + added.to(bias.dtype)


def _restore_bias(layer: Any, args: Any, y: Any) -> None:
    """Forward hook of a layer, which runs after a failure as well: uncovers the parameter."""
    if _READER not in vars(layer):
        vars(layer).pop(_bias_name(layer), None)


def _shadow_read_bias(layer: Any, reader: nn.Module, args: Any) -> None:
    """Forward pre-hook of a module that reads weight and bias of ``layer``: it sees the rounded one."""
    _shadow_bias(layer, args)
    vars(layer).setdefault(_READER, reader)


def _restore_read_bias(layer: Any, reader: nn.Module, args: Any, y: Any) -> None:
    """Forward hook of that module, which runs after a failure as well: uncovers the parameter."""
    if vars(layer).get(_READER) is reader:
        del vars(layer)[_READER]
        _restore_bias(layer, args, y)


def _bias_name(layer: nn.Module) -> str:
    return "in_proj_bias" if isinstance(layer, QuantMultiheadAttention) else "bias"


@torch.no_grad()
def _rounding(
    bias: Tensor, weights: LSQQuantizer | None, inputs: LSQQuantizer | None, gain: Tensor | None = None
) -> Tensor:
    """What rounding adds to a bias of shape ``(channels,)``, in float64. ``gain`` is a folded BatchNorm's."""
    bias = bias.to(torch.float64)
    if not all(q is not None and q.enabled and q.is_initialized for q in (weights, inputs)):
        return torch.zeros_like(bias)
    assert weights is not None
    assert inputs is not None
    scale = weights.scale.to(torch.float32)
    if gain is not None:
        scale = (scale * gain).to(torch.float32)
    shift = spare_bits(weights.bits, inputs.bits)
    accumulator_scale = (inputs.scale.to(torch.float32) * (scale * 2.0**-shift)).to(torch.float64)
    codes = (bias / accumulator_scale).round()
    # A channel without a usable scale gets another one when it is deployed, in which its bias is almost exact.
    usable = (accumulator_scale.abs() >= _SMALLEST) & (codes.abs() <= _INT32_MAX)
    return torch.where(usable, codes * accumulator_scale - bias, 0.0)
