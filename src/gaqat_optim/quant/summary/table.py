"""What was quantized, layer by layer, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from .macs import FLOAT, macs_by_bits, multiply_accumulates
from .record import QuantRecord, Summarizable


class QuantSummary(list[QuantRecord]):
    """A list of :class:`QuantRecord` that prints as a table, with totals and what stayed in floating point below.

    Attributes:
        left_in_float: the modules with weights that are in floating point, with their types.
        macs: multiply-accumulates for one sample by the widths of weight and input, those in floating point included;
            ``None`` where no sample was given.
    """

    def __init__(
        self, records: list[QuantRecord], left_in_float: list[str], macs: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(records)
        self.left_in_float = left_in_float
        self.macs = None if macs is None else dict(macs)

    @property
    def bytes(self) -> int:
        """What the quantized layers take in packed form."""
        return sum(record.bytes for record in self)

    def __str__(self) -> str:
        header = ("layer", "type", "weights", "signal/noise", "activations", "output", "bytes", "MACs")
        rows = [header, *map(_row, self)]
        if self.macs is None:
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"in all: {self.bytes:,} bytes")
        if self.macs is not None:
            lines.append("MACs of one sample: " + (listed(self.macs) or "none"))
        if self.left_in_float:
            lines.append("in floating point: " + ", ".join(self.left_in_float))
        return "\n".join(lines)


def quantization_summary(model: nn.Module, sample: Tensor | None = None) -> QuantSummary:
    """List the quantized layers of ``model`` and what they cost; ``str()`` of the result is a table.

    Below the table stand the sums, and the modules with weights (parameters of two axes or more) that are in floating
    point.

    With a sample, the network runs once, in evaluation mode, and what its convolutions and matrix products multiply and
    add is counted: for each layer as often as it is called, and by the widths of weight and input. ``float`` are those
    of modules in floating point and those of two activations, such as attention's. Elementwise operations, lookups and
    pooling are not counted. The model is left as it was: training flags, buffers and random states.

    Args:
        model: a network from :func:`quantize_model` or :func:`convert`.
        sample: an input with the batch on axis 0, any number of entries; the counts are for one of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gaqat_optim import QuantConfig, quantize_model
        >>> _ = torch.manual_seed(0)
        >>> net = quantize_model(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), QuantConfig(3, 3, exclude=["1"]))
        >>> print(quantization_summary(net))
        layer  type         weights             signal/noise  activations              output    bytes
        0      QuantLinear  8 bits per channel  ... dB        8 bits (not calibrated)  floating  28
        in all: 28 bytes
        in floating point: 1 (Linear)
        >>> quantization_summary(net, torch.rand(5, 4)).macs
        {'8x8 bits': 8, 'float': 4}
    """
    counts = None if sample is None else multiply_accumulates(model, sample)
    records, left = [], []
    for name, module in model.named_modules():
        macs = None if counts is None else counts.get(module, 0)
        if isinstance(module, Summarizable):
            records.append(replace(module.quant_record(name), macs=macs))
        elif any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            left.append(f"{name or 'the model'} ({type(module).__name__})")
    return QuantSummary(records, left, None if counts is None else macs_by_bits(model, counts))


def listed(macs: Mapping[str, int]) -> str:
    """Counts by widths in words.

    >>> listed({"4x4 bits": 1200, "float": 64})
    '1,200 at 4x4 bits, 64 in floating point'
    """
    where = {FLOAT: "in floating point"}
    return ", ".join(f"{count:,} {where.get(widths, f'at {widths}')}" for widths, count in macs.items())


def _row(record: QuantRecord) -> tuple[str, ...]:
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
    macs = "" if record.macs is None else f"{record.macs:,}"
    return record.name or "(model)", record.type, weights, snr, activations, output, f"{record.bytes:,}", macs
