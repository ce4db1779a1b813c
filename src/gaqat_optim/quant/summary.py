"""What was quantized, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .modules import QuantizedModule
from .quantizer import LSQQuantizer


@dataclass(frozen=True)
class QuantRecord:
    """One quantized layer.

    Attributes:
        name: qualified name in the model.
        type: name of the module's class.
        weight_bits: width of the weights, or ``None`` for floating point; likewise the other widths.
        weight_granularity: ``"channel"`` or ``"tensor"``; ``None`` without a weight quantizer.
        weight_scale: mean of the weight scales.
        weight_snr: signal to noise of the quantized weight in decibel, 10 log10(sum w^2 / sum (w_hat - w)^2).
        activation_bits: width of the input.
        activation_signed: whether the input's codes have a sign; ``None`` while not calibrated.
        activation_scale: the input's scale, ``None`` while not calibrated.
        output_bits: width of the output.
        weights: number of weights.
    """

    name: str
    type: str
    weight_bits: int | None
    weight_granularity: str | None
    weight_scale: float | None
    weight_snr: float | None
    activation_bits: int | None
    activation_signed: bool | None
    activation_scale: float | None
    output_bits: int | None
    weights: int


class QuantSummary(list[QuantRecord]):
    """A list of :class:`QuantRecord` that prints as a table, with the modules that stayed in floating point below."""

    def __init__(self, records: list[QuantRecord], left_in_float: list[str]) -> None:
        super().__init__(records)
        self.left_in_float = left_in_float

    def __str__(self) -> str:
        rows = [("layer", "type", "weights", "signal/noise", "activations", "output"), *map(_row, self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.left_in_float:
            lines.append("in floating point: " + ", ".join(self.left_in_float))
        return "\n".join(lines)


def quantization_summary(model: nn.Module) -> QuantSummary:
    """List the quantized layers of ``model``; ``str()`` of the result is a table.

    Below the table stand the modules with weights (parameters of two axes or more) that are in floating point.

    Args:
        model: a network from :func:`quantize_model`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gaqat_optim import QuantConfig, quantize_model
        >>> _ = torch.manual_seed(0)
        >>> net = quantize_model(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), QuantConfig(3, 3, exclude=["1"]))
        >>> print(quantization_summary(net))
        layer  type         weights             signal/noise  activations              output
        0      QuantLinear  8 bits per channel  ... dB        8 bits (not calibrated)  floating
        in floating point: 1 (Linear)
    """
    records, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            records.append(_record(name, module))
        elif any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            left.append(f"{name or 'the model'} ({type(module).__name__})")
    return QuantSummary(records, left)


def _record(name: str, module: QuantizedModule) -> QuantRecord:
    weight, activation, output = module.weight_quantizer, module.input_quantizer, module.output_quantizer
    granularity = None
    if weight is not None:
        granularity = "tensor" if weight.channel_axis is None else "channel"
    return QuantRecord(
        name=name,
        type=type(module).__name__,
        weight_bits=_bits(weight),
        weight_granularity=granularity,
        weight_scale=_mean_scale(weight),
        weight_snr=_signal_to_noise(module),
        activation_bits=_bits(activation),
        activation_signed=None if activation is None else activation.signed,
        activation_scale=_mean_scale(activation),
        output_bits=_bits(output),
        weights=module.weight.numel(),
    )


def _bits(quantizer: LSQQuantizer | None) -> int | None:
    return None if quantizer is None else quantizer.bits


def _mean_scale(quantizer: LSQQuantizer | None) -> float | None:
    return quantizer.scale.mean().item() if quantizer is not None and quantizer.is_set else None


@torch.no_grad()
def _signal_to_noise(module: QuantizedModule) -> float | None:
    """Of the weight, in decibel: infinite where it is represented exactly, NaN for zeros."""
    quantizer = module.weight_quantizer
    if quantizer is None or not quantizer.is_set:
        return None
    weight = module.weight.double()
    noise = (module.quantized_weight().double() - weight).square().sum()
    return (10 * torch.log10(weight.square().sum() / noise)).item()


def _row(record: QuantRecord) -> tuple[str, str, str, str, str, str]:
    weights = activations = output = "floating"
    snr = "" if record.weight_snr is None else f"{record.weight_snr:.1f} dB"
    if record.weight_bits is not None:
        weights = f"{record.weight_bits} bits per {record.weight_granularity}"
    if record.activation_bits is not None:
        sign = {True: "signed", False: "unsigned", None: ""}[record.activation_signed]
        activations = (
            f"{record.activation_bits} bits {sign if record.activation_scale is not None else '(not calibrated)'}"
        )
    if record.output_bits is not None:
        output = f"{record.output_bits} bits"
    return record.name or "(model)", record.type, weights, snr, activations, output
