"""From a trained weight and bias to the integers and scales of a deployed layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.lsq.quantizer import LSQQuantizer
from .activation_quantizer import ActivationQuantizer

_INT16_MAX, _INT32_MAX = 2**15 - 1, 2**31 - 1
_SMALLEST = torch.finfo(torch.float32).tiny  # the smallest normal float32
# A channel without weights has a bias of about this size: 22 bits of precision, and far from any overflow.
_BIAS_ONLY_CODE = 2**22


@dataclass(frozen=True)
class IntegerParameters:
    """Weight and bias of a deployed layer, as integers where that is possible."""

    codes: Tensor | None = None  # int8: the trained codes of the weight times 2^shift
    weight_scale: Tensor | None = None  # of the codes, float32 of shape () or (channels,)
    float_weight: Tensor | None = None  # float32, if there are no codes
    bias_codes: Tensor | None = None  # int32, in steps of the accumulator scale
    float_bias: Tensor | None = None  # float32, if there are no bias codes
    weight_bits: int | None = None  # of the trained codes
    shift: int = 0  # spare bits that the codes use, which makes the accumulator scale finer


def integer_parameters(
    name: str,
    weight: Tensor,
    quantizer: LSQQuantizer | None,
    bias: Tensor | None,
    activation: ActivationQuantizer | None,
    gain: Tensor | None = None,
) -> IntegerParameters:
    """The integers and scales of a trained weight and bias.

    Args:
        name: qualified name of the layer, for the warning.
        weight: the trained weight, output channels on axis 0.
        quantizer: the quantizer of the weight, or ``None``.
        bias: the trained bias, ``(channels,)``, with a folded BatchNorm's in it.
        activation: the quantizer of the input; ``None`` leaves the bias in floating point.
        gain: the factor of a folded BatchNorm, float64, ``(channels,)``.

    Example:
        Weight codes of 8 bits have no spare bits. So the accumulator scale is 0.5 * 0.25, and the bias 0.3 the code 2.

        >>> quantizer = LSQQuantizer(8, signed=True)
        >>> weight = torch.tensor([[0.5, -0.25]])
        >>> quantizer.initialize(weight, 0.25)
        >>> activation = ActivationQuantizer(torch.tensor(0.5), bits=8, zero_point=0)
        >>> parameters = integer_parameters("fc", weight, quantizer, torch.tensor([0.3]), activation)
        >>> parameters.codes.tolist(), parameters.bias_codes.tolist()
        ([[2, -1]], [2])
    """
    bias = None if bias is None else bias.detach()
    if quantizer is None:
        if gain is not None:
            weight = weight.to(torch.float64) * gain.reshape(-1, *[1] * (weight.dim() - 1))
        return IntegerParameters(float_weight=_float32(weight), float_bias=_float32(bias))
    codes, scale = _codes(weight, quantizer)
    scale = scale if gain is None else (scale * gain).to(torch.float32)
    shift = 0 if bias is None or activation is None else spare_bits(quantizer.bits, activation.bits)
    bias_codes = None
    if bias is not None:
        codes, scale = codes * 2**shift, scale * 2.0**-shift
        codes, scale = _neutralize_degenerate_channels(name, codes, scale, bias, activation)
        if activation is not None:
            steps = bias.to(torch.float64) / (activation.scale * scale).to(torch.float64)
            bias_codes, bias = steps.round().to(torch.int32), None
    return IntegerParameters(codes, scale, None, bias_codes, _float32(bias), quantizer.bits, shift)


def _float32(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.float32, copy=True)


def _codes(weight: Tensor, quantizer: LSQQuantizer) -> tuple[Tensor, Tensor]:
    """The int8 codes of a weight, by the arithmetic of the fake quantizer, and their scale in float32."""
    scale = quantizer.scale
    dtype = torch.promote_types(torch.promote_types(weight.dtype, scale.dtype), torch.float32)
    shape = [1] * weight.dim()
    if quantizer.channel_axis is not None:
        shape[quantizer.channel_axis] = -1
    codes = (weight.to(dtype) / scale.to(dtype).reshape(shape)).clamp(quantizer.qmin, quantizer.qmax).round()
    scale = scale if quantizer.channel_axis is not None else scale.reshape(())
    return codes.to(torch.int8), scale.to(torch.float32, copy=True)


def spare_bits(weight_bits: int, activation_bits: int) -> int:
    """By how many binary digits weight codes can be shifted up in 8 bits.

    Processors without an instruction for it add two products of activations and weights in 16 bits. If narrow codes
    cannot overflow those, shifted ones must not either. An activation counts as the byte in its container, code
    plus zero point. Codes of 8 bits have no spare bits, and may overflow as they are: an ONNX file holds
    them in another form (:mod:`~gaqat_optim.deploy.onnx_export.exact_weights`).

    >>> spare_bits(3, 8)  # 2 * 255 * 4 * 2**4 < 2**15
    4
    """
    shift = 8 - weight_bits
    pair = 2 * (2**activation_bits - 1) * 2 ** (weight_bits - 1)
    while shift > 0 and pair * 2**shift > _INT16_MAX:
        shift -= 1
    return shift


def max_accumulator(codes: Tensor, qmin: int, qmax: int) -> Tensor:
    """The largest magnitude of sum(a q) in each output channel: float64, shape ``(channels,)``.

    The codes have their output channels on axis 0.

    >>> max_accumulator(torch.tensor([[3, -4], [0, 1]], dtype=torch.int8), 0, 15)
    tensor([105.,  15.], dtype=torch.float64)
    """
    return codes.to(torch.float64).abs().flatten(1).sum(1) * max(-qmin, qmax)


def _neutralize_degenerate_channels(
    name: str, codes: Tensor, scale: Tensor, bias: Tensor, activation: ActivationQuantizer | None
) -> tuple[Tensor, Tensor]:
    """Codes and scale without the channels whose scale is too small for their bias to be a multiple of it.

    Such a channel gets codes of zero, and a scale in which its bias is an integer of :data:`_BIAS_ONLY_CODE`: it
    computes its bias. Gamma = 0 does that to a channel. So does a gamma for which the bias, beside the largest sum,
    does not fit into int32, which is a warning because there the weights did count for something.
    """
    step = torch.ones((), dtype=torch.float32, device=scale.device) if activation is None else activation.scale
    magnitude, accumulator_scale = bias.to(torch.float64).abs(), (step * scale).abs().to(torch.float64)
    vanishing = (accumulator_scale < _SMALLEST).expand_as(magnitude)
    too_large = torch.zeros_like(vanishing)
    if activation is not None:
        largest_code = _INT32_MAX - max_accumulator(codes, activation.qmin, activation.qmax)
        too_large = ~vanishing & (magnitude > accumulator_scale * largest_code.clamp(min=_INT32_MAX // 2))
    bias_only = vanishing | too_large
    if not bool(bias_only.any()):
        return codes, scale
    if bool(too_large.any()):
        channels = too_large.nonzero().flatten().tolist()
        listed = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        warnings.warn(
            f"{name or 'the model'!r}: the bias of {len(channels)} channels ({listed}) does not fit into int32 in "
            "steps of their accumulator scale, which is very small (a BatchNorm's gamma near zero?). They keep their "
            "bias and lose their weights",
            stacklevel=7,  # the caller of convert
        )
    steps = magnitude / _BIAS_ONLY_CODE
    replacement = torch.where(steps > _SMALLEST * max(1.0, 1 / step.item()), steps / step, 1.0).to(torch.float32)
    codes = codes.masked_fill(bias_only.reshape(-1, *[1] * (codes.dim() - 1)), 0)
    return codes, torch.where(bias_only, replacement, scale)
