"""From a trained layer's weight and bias to the operands of a deployed one."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...quant.lsq.quantizer import LSQQuantizer
from .base import ActivationQuantizer, max_accumulator

_INT16_MAX, _INT32_MAX = 2**15 - 1, 2**31 - 1
# The smallest normal float32.
_SMALLEST = torch.finfo(torch.float32).tiny
# A channel without weights has a bias of about this size: 22 bits of precision, and far from any overflow.
_BIAS_ONLY_CODE = 2**22


def operands(
    shown: str,
    weight: Tensor,
    quantizer: LSQQuantizer | None,
    bias: Tensor | None,
    activation: ActivationQuantizer | None,
    gain: Tensor | None = None,
) -> dict[str, Any]:
    """Weight and bias as a deployed layer takes them, the weight with its output channels on axis 0."""
    parts: dict[str, Any] = {}
    shift = 0
    if quantizer is None:
        if gain is not None:
            weight = weight.to(torch.float64) * gain.reshape(-1, *[1] * (weight.dim() - 1))
        parts["float_weight"] = _float32(weight)
    else:
        codes, scale = _codes(weight, quantizer)
        scale = scale if gain is None else (scale * gain).to(torch.float32)
        if bias is not None and activation is not None:
            shift = room(quantizer.bits, activation)
        if bias is not None:
            codes, scale = codes * 2**shift, scale * 2.0**-shift
            codes, scale = _neutralize_degenerate_channels(shown, codes, scale, bias, activation)
        parts |= {"codes": codes, "weight_scale": scale, "weight_bits": quantizer.bits, "shift": shift}
        if bias is not None and activation is not None:
            parts["bias_codes"] = _round_to(bias, activation.scale * scale)
    if bias is not None and "bias_codes" not in parts:
        parts["float_bias"] = _float32(bias)
    return parts


def _float32(v: Tensor) -> Tensor:
    return v.to(torch.float32, copy=True)


def activation_codes(quantizer: LSQQuantizer, name: str) -> ActivationQuantizer:
    """The deployed form of an activation's quantizer, under its qualified name."""
    return ActivationQuantizer(_float32(quantizer.scale).reshape(()), quantizer.bits, bool(quantizer.signed), name)


def _codes(weight: Tensor, quantizer: LSQQuantizer) -> tuple[Tensor, Tensor]:
    """The weight's int8 codes, in the very arithmetic of the fake quantizer, and their scale in float32."""
    scale = quantizer.scale
    dtype = torch.promote_types(torch.promote_types(weight.dtype, scale.dtype), torch.float32)
    shape = [1] * weight.dim()
    if quantizer.channel_axis is not None:
        shape[quantizer.channel_axis] = -1
    codes = (weight.to(dtype) / scale.to(dtype).reshape(shape)).clamp(quantizer.qmin, quantizer.qmax).round()
    return codes.to(torch.int8), _float32(scale if quantizer.channel_axis is not None else scale.reshape(()))


def room(bits: int, activation: ActivationQuantizer) -> int:
    """By how many binary digits codes of ``bits`` bits can be shifted up in 8 bits.

    Processors without an instruction for it add two products of activations and weights in 16 bits. Where narrow codes
    cannot overflow those, shifted ones must not either. The activation is there as it stands in its container, with
    the zero point of a signed one in it. Codes of 8 bits have no room, and may overflow as they are: an ONNX file has
    them in another form (:mod:`~gaqat_optim.deploy.onnx_export.exact_weights`).
    """
    shift = 8 - bits
    pair = 2 * (activation.qmax + activation.zero_point) * 2 ** (bits - 1)
    while shift > 0 and pair * 2**shift > _INT16_MAX:
        shift -= 1
    return shift


def _round_to(v: Tensor, unit: Tensor) -> Tensor:
    """``v`` in units of ``unit``, as int32."""
    return (v.to(torch.float64) / unit.to(torch.float64)).round().to(torch.int32)


def _neutralize_degenerate_channels(
    name: str, codes: Tensor, scale: Tensor, bias: Tensor, activation: ActivationQuantizer | None
) -> tuple[Tensor, Tensor]:
    """Codes and scale without the channels whose scale is too small to be a unit of their bias.

    Such a channel gets codes of zero, and a scale in which its bias is an integer of :data:`_BIAS_ONLY_CODE`: what it
    computes is its bias. Gamma = 0 does that to a channel; so does a gamma at which the bias, beside the largest sum,
    does not fit into int32, which is a warning because there the weights did count for something.
    """
    step = torch.ones((), dtype=torch.float32, device=scale.device) if activation is None else activation.scale
    size, unit = bias.to(torch.float64).abs(), (step * scale).abs().to(torch.float64)
    vanishing = (unit < _SMALLEST).expand_as(size)
    too_large = torch.zeros_like(vanishing)
    if activation is not None:
        room = _INT32_MAX - max_accumulator(codes, activation.qmin, activation.qmax)
        too_large = ~vanishing & (size > unit * room.clamp(min=_INT32_MAX // 2))
    alone = vanishing | too_large
    if not bool(alone.any()):
        return codes, scale
    if bool(too_large.any()):
        channels = too_large.nonzero().flatten().tolist()
        shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        warnings.warn(
            f"{name!r}: the bias of {len(channels)} channels ({shown}) does not fit into int32 in units of their "
            "scale, which is very small (a BatchNorm's gamma near zero?). They keep their bias and lose their weights",
            stacklevel=5,
        )
    units = size / _BIAS_ONLY_CODE
    replacement = torch.where(units > _SMALLEST * max(1.0, 1 / step.item()), units / step, 1.0).to(torch.float32)
    codes = codes.masked_fill(alone.reshape(-1, *[1] * (codes.dim() - 1)), 0)
    return codes, torch.where(alone, replacement, scale)
