"""What a summary says of one quantized layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class QuantRecord:
    """One quantized layer, in training or converted.

    Attributes:
        name: qualified name in the model.
        type: name of the module's class.
        weight_bits: width of the weights, or ``None`` for floating point; likewise the other widths.
        weight_granularity: ``"channel"`` or ``"tensor"``; ``None`` without a weight quantizer.
        weight_scale: mean of the weight scales.
        weight_snr: signal to noise of the quantized weight in decibel, 10 log10(sum w^2 / sum (w_hat - w)^2); ``None``
            for a converted layer, which has no other weight.
        activation_bits: width of the input.
        activation_signed: whether the input's codes have a sign; ``None`` while not calibrated.
        activation_scale: the input's scale, ``None`` while not calibrated.
        output_bits: width of the output.
        weights: number of weights.
        bytes: what the layer takes in packed form: its weights in their bits (8 of them to a byte in each bit plane) or
            as float32, and four bytes for each scale (of weight, input and output) and each entry of the bias. Layers
            with one weight count it each. A BatchNorm that is still to be folded adds a bias, where there is none.
        macs: multiply-accumulates for one sample, ``None`` where none was given.
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
    bytes: int
    macs: int | None = None


@runtime_checkable
class Summarizable(Protocol):
    """A layer that a summary lists: a quantized one, or what it becomes when it is converted."""

    def quant_record(self, name: str) -> QuantRecord:
        """What there is to say of the layer, whose qualified name is ``name``."""
        ...


def storage_bytes(weights: int, bits: int | None, numbers: int) -> int:
    """The bytes of weights of ``bits`` bits, or in float32, and of ``numbers`` further values of four bytes.

    >>> storage_bytes(10, 3, numbers=2), storage_bytes(10, None, numbers=2)
    (14, 48)
    """
    return (4 * weights if bits is None else bits * -(-weights // 8)) + 4 * numbers
