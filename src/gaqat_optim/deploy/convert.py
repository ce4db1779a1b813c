"""``convert``: the network that was trained, as the integers that run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..quant.graph.output_hook import modules_with_output_quantizer, quantize_output
from ..quant.lsq.quantizer import LSQQuantizer
from ..quant.nn.attention import QuantMultiheadAttention
from ..quant.nn.base import QuantizedModule
from ..quant.nn.embedding import QuantEmbedding, QuantEmbeddingBag
from .batchnorm_folding import Affine, following_norms
from .bias_rounding import remove_rounding
from .nn.attention import ROLES, DeployMultiheadAttention, projections
from .nn.integer_parameters import activation_codes, operands
from .nn.layers import DEPLOYED, DeployLayer, DeployLinear, QuantDequant

# Deployed as floating-point tables of the quantized values: a lookup computes nothing that integers would speed up.
TABLES: dict[type, type[nn.Module]] = {QuantEmbedding: nn.Embedding, QuantEmbeddingBag: nn.EmbeddingBag}


def convert(model: nn.Module) -> nn.Module:
    r"""Copy a quantized network into the form that is deployed: integer weights, integer biases, BatchNorm folded in.

    Every quantized layer becomes one that computes, with the codes a of its input and q of its weight,

    .. math::

        a = \mathrm{clamp}(\mathrm{round}(x / s_a), Q_n, Q_p), \qquad
        y_c = u_c \left( \sum a\,2^k q_c + b_c \right), \qquad
        u_c = s_a s'_c / 2^k

    with an exact sum and one multiplication, in float32. A BatchNorm behind the layer goes into the scale and the
    bias, with the weight's codes as they were trained:

    .. math::

        s'_c = s_c \gamma_c / \sigma_c, \qquad
        b_c = \mathrm{round}\left( \frac{\beta_c + (b_c^{\mathrm{float}} - \mu_c) \gamma_c / \sigma_c}{u_c} \right)
        \in \mathrm{int32}

    so that a negative gamma gives a negative scale. This rounding of the bias is the one difference from the network
    that was trained, beyond the last bits of floating-point sums. In units of the sum (k = 0) it would be coarse at few
    bits: a trained 3-bit network then decided otherwise for 13 % of its images. So the weight, of b < 8 bits, stands
    2^k times larger in its 8-bit container, with k up to 8 - b, and the unit of the bias is that much finer.

    A channel whose gamma is zero keeps its bias alone, and so does one whose gamma is so small that the bias would not
    fit, which is a warning. A layer whose weight or input is in floating point has its bias there too.

    The BatchNorm is found by tracing the network symbolically, and replaced by an identity. It is folded where it is
    the only user of the layer's output, is used once, and has running statistics; elsewhere, and in a network that
    cannot be traced (which is a warning), it stays as it is. So does a subclass with a forward of its own;
    ``nn.SyncBatchNorm`` is folded.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`, with all its scales set. It stays as it is.

    Returns:
        A network of the same class, in evaluation mode and without gradients: the numeric specification of an export.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing is quantized, or it is converted already, or a quantizer is switched off, has no scale yet,
            or has one that is not finite, or the weights or the BatchNorm's values are not finite.

    Example:
        >>> from gaqat_optim import QuantConfig, quantize_model
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> net = quantize_model(net, QuantConfig(first_last_bits="same"), calibration=torch.rand(16, 3, 8, 8))
        >>> print(convert(net))
        Sequential(
          (0): DeployConv(
            4-bit weight (8, 3, 3, 3) per channel, int32 bias, BatchNorm folded, sums in float32, stride=(1, 1), ...
            (input_quantizer): ActivationQuantizer(4 bits, unsigned, scale 0.0...)
          )
          (1): Identity()
          (2): ReLU()
        )
    """
    _check(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    remove_rounding(model)  # What it adds is in the biases from here on.
    norms = following_norms(model)
    swapped: dict[nn.Module, nn.Module] = {norm: nn.Identity() for norm in norms.values()}
    for module in modules_with_output_quantizer(model):
        if module not in swapped:
            quantizer: Any = module.output_quantizer
            swapped[quantizer] = QuantDequant(activation_codes(quantizer, quantizer.name))
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module) in TABLES:
                swapped[module] = _table(module)
            elif isinstance(module, QuantMultiheadAttention):
                swapped[module] = _attention(name, module)
            elif isinstance(module, QuantizedModule):
                swapped[module] = _deployed(name, module, norms.get(module))
    for parent in [*model.modules(), *swapped.values()]:
        for slot, child in parent._modules.items():
            if child in swapped:
                parent._modules[slot] = swapped[child]
    return swapped.get(model, model).eval()


def _check(model: nn.Module) -> None:
    """Raise for whatever cannot be converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a model from quantize_model, got {type(model).__name__}")
    if any(isinstance(module, DeployLayer) for module in model.modules()):
        raise ValueError("the model is converted already: it has deployed layers")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers: call quantize_model first, and train")
    for name, layer in layers.items():
        shown = name or "the model"
        has_form = type(layer) in DEPLOYED or type(layer) is QuantMultiheadAttention
        if not has_form and not (type(layer) in TABLES and layer.output_quantizer is None):
            raise ValueError(
                f"{shown!r}: there is no deployed form of {type(layer).__name__} yet. Leave it in floating point: "
                f"quantize_model with exclude=({shown!r},)"
            )
        for kind, quantizer in layer.quantizers():
            _check_quantizer(f"{name}.{kind}" if name else kind, quantizer)
        for what, value in layer.named_parameters(recurse=False):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{shown!r} has a {what} that is not finite")
    for module in modules_with_output_quantizer(model):
        quantizer = module.output_quantizer  # type: ignore[assignment]
        _check_quantizer(quantizer.name, quantizer)


def _check_quantizer(name: str, quantizer: LSQQuantizer) -> None:
    if not quantizer.enabled:
        raise ValueError(f"the quantizer {name!r} is switched off: convert outside of quantization_disabled")
    if not quantizer.is_initialized:
        raise ValueError(
            f"the quantizer {name!r} has no scale yet: pass calibration= to quantize_model, or train for a step"
        )
    scale = quantizer.scale.detach().to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the quantizer {name!r} has a scale that is not finite and positive: {scale.tolist()}")


def _table(layer: Any) -> nn.Module:
    """The floating-point embedding with the values that the codes of ``layer`` stand for."""
    kind = TABLES[type(layer)]
    table = kind.__new__(kind)
    table.__dict__ = {k: v for k, v in vars(layer).items() if not k.endswith("_quantizer")}
    table._modules = {}
    table._parameters = {"weight": nn.Parameter(layer.quantized_weight(), requires_grad=False)}
    return table


def _deployed(name: str, layer: QuantizedModule, norm: Any) -> DeployLayer:
    """The deployed form of ``layer``, with the BatchNorm ``norm`` folded in if there is one."""
    prefix = f"{name}." if name else ""
    activation = output = None
    if layer.input_quantizer is not None:
        activation = activation_codes(layer.input_quantizer, f"{prefix}input_quantizer")
    if layer.output_quantizer is not None:
        output = activation_codes(layer.output_quantizer, f"{prefix}output_quantizer")
    elif norm is not None and quantize_output in norm._forward_hooks.values():
        output = activation_codes(norm.output_quantizer, norm.output_quantizer.name)
    bias: Any = layer.bias
    bias = None if bias is None else bias.detach()
    gain = None
    weight = layer.channels_first(layer.weight.detach())
    if norm is not None:
        affine = Affine.of(norm)
        gain, bias = affine.gain, affine.bias(bias)
        if not bool(torch.isfinite(gain).all() & torch.isfinite(bias).all()):
            raise ValueError(f"the BatchNorm behind {name!r} has values that are not finite")
    parts = operands(name or "the model", weight, layer.weight_quantizer, bias, activation, gain)
    for part in ("codes", "float_weight"):
        if part in parts:
            parts[part] = layer.from_channels_first(parts[part])
    deployed = DEPLOYED[type(layer)](
        layer, input_quantizer=activation, output_quantizer=output, folded=norm is not None, **parts
    )
    for registry in vars(layer):
        if registry.startswith("_forward_"):  # Hooks stay with the layer.
            setattr(deployed, registry, getattr(layer, registry))
    return deployed


def _attention(name: str, layer: QuantMultiheadAttention) -> DeployMultiheadAttention:
    """The deployed form of ``layer``, but for its out-projection, which is a quantized layer of its own."""
    prefix = f"{name}." if name else ""
    linears: dict[str, Any] = dict(projections(layer))
    for role in ROLES:
        quantizer = getattr(layer, f"{role}_quantizer")
        activation = None if quantizer is None else activation_codes(quantizer, f"{prefix}{role}_quantizer")
        weight, bias = linears[role].weight, linears[role].bias
        parts = operands(f"{prefix}{role}", weight, getattr(layer, f"{role}_weight_quantizer"), bias, activation)
        linears[role] = DeployLinear(layer, input_quantizer=activation, **parts)
    return DeployMultiheadAttention(layer, **linears, out_proj=layer.out_proj)
