"""What a network costs, layer by layer: bits, bytes and multiply-accumulates (MACs)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .evaluation import device_of, evaluation_mode, isolate_rng, quantization_disabled
from .inputs import batch_size, call_arguments, to_device
from .lsq.functional import zero_point_form
from .mac_counter import MacCounter

FLOAT = "float"


@dataclass(frozen=True)
class QuantRecord:
    """One quantized or deployed layer.

    Attributes:
        name: qualified name in the model.
        type: name of the module's class.
        weight_bits: bits of a weight, or ``None`` for floating point; likewise the other bits.
        weight_granularity: ``"channel"`` or ``"tensor"``; ``None`` without a weight quantizer.
        weight_scale: mean of the weight scales.
        weight_snr: signal to noise of the quantized weight in decibel, 10 log10(sum w^2 / sum (w_hat - w)^2); ``None``
            for a deployed layer, which has only codes.
        activation_bits: bits of the input.
        activation_signed: whether the input's codes can be negative; ``None`` while not calibrated.
        activation_zero_point: how many of them are negative: 0 unsigned, 2^(bits - 1) signed.
        activation_scale: the input's scale, ``None`` while not calibrated.
        output_bits: bits of the output.
        weights: number of weights.
        bytes: size of the layer in packed form: its weights in their bits (8 of them to a byte in each bit plane) or
            as float32, and four bytes for each scale (of weight, input and output) and each entry of the bias. Each
            of two layers with one weight counts it. Folding a BatchNorm adds a bias to a layer without one.
        macs: multiply-accumulates for one sample, ``None`` without a sample.
    """

    name: str
    type: str
    weight_bits: int | None
    weight_granularity: str | None
    weight_scale: float | None
    weight_snr: float | None
    activation_bits: int | None
    activation_signed: bool | None
    activation_zero_point: int | None
    activation_scale: float | None
    output_bits: int | None
    weights: int
    bytes: int
    macs: int | None = None


@runtime_checkable
class Summarizable(Protocol):
    """A layer that a summary lists: a quantized or a deployed one."""

    def quant_record(self, name: str) -> QuantRecord:
        """The record of the layer, whose qualified name is ``name``."""
        ...


def storage_bytes(weights: int, bits: int | None, numbers: int) -> int:
    """The bytes of weights with ``bits`` bits, or in float32, and of ``numbers`` other values of four bytes.

    >>> storage_bytes(10, 3, numbers=2), storage_bytes(10, None, numbers=2)
    (14, 48)
    """
    return (4 * weights if bits is None else bits * -(-weights // 8)) + 4 * numbers


# -- the table -----------------------------------------------------------------------------------------------------


class QuantSummary(list[QuantRecord]):
    """A list of :class:`QuantRecord` that prints as a table, with totals and modules in floating point below.

    Attributes:
        left_in_float: the modules with weights in floating point, with their types.
        macs: multiply-accumulates for one sample by the bits of weight and input, ``"float"`` included; ``None``
            without a sample.
        float_weights: how many weights the modules in floating point have.
        never_called: the layers with bits that computed nothing for the sample.
    """

    def __init__(
        self,
        records: list[QuantRecord],
        left_in_float: list[str],
        macs: Mapping[str, int] | None = None,
        float_weights: int = 0,
        never_called: Sequence[str] = (),
    ) -> None:
        super().__init__(records)
        self.left_in_float = left_in_float
        self.macs = None if macs is None else dict(macs)
        self.float_weights, self.never_called = float_weights, list(never_called)

    @property
    def bytes(self) -> int:
        """Size of the quantized layers in packed form."""
        return sum(record.bytes for record in self)

    @property
    def weight_share(self) -> float:
        """The share of the weights that are quantized."""
        in_bits = sum(record.weights for record in self if record.weight_bits is not None)
        return in_bits / max(sum(record.weights for record in self) + self.float_weights, 1)

    @property
    def mac_share(self) -> float | None:
        """The share of the multiply-accumulates whose operands are both quantized; ``None`` without a sample."""
        if self.macs is None:
            return None
        both = [r for r in self if r.weight_bits is not None and r.activation_bits is not None]
        return sum(record.macs or 0 for record in both) / max(sum(self.macs.values()), 1)

    def __str__(self) -> str:
        header = ("layer", "type", "weights", "signal/noise", "activations", "output", "bytes", "MACs")
        rows = [header, *map(_row, self)]
        if self.macs is None:
            rows = [row[:-1] for row in rows]
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, sizes, strict=True)).rstrip() for row in rows]
        lines.append(f"in all: {self.bytes:,} bytes")
        if self.macs is not None:
            lines.append("MACs of one sample: " + (format_macs(self.macs) or "none"))
        if self.left_in_float:
            lines.append("in floating point: " + ", ".join(self.left_in_float))
        if self.never_called:
            lines.append(
                f"error: 0 MACs in {', '.join(self.never_called)}: never called for the sample, or its weight is read "
                "past it, in floating point"
            )
        shares = f"quantized: {100 * self.weight_share:.1f} % of the weights"
        lines.append(shares if self.mac_share is None else f"{shares}, {100 * self.mac_share:.1f} % of the MACs")
        return "\n".join(lines)


def _row(record: QuantRecord) -> tuple[str, ...]:
    weights = activations = output = "floating"
    snr = "" if record.weight_snr is None else f"{record.weight_snr:.1f} dB"
    if record.weight_bits is not None:
        weights = f"{record.weight_bits} bits per {record.weight_granularity}"
    if record.activation_bits is not None:
        form = "(not calibrated)"
        if record.activation_scale is not None and record.activation_zero_point is not None:
            form = zero_point_form(record.activation_bits, record.activation_zero_point)
        activations = f"{record.activation_bits} bits {form}"
    if record.output_bits is not None:
        output = f"{record.output_bits} bits"
    macs = "" if record.macs is None else f"{record.macs:,}"
    return record.name or "(model)", record.type, weights, snr, activations, output, f"{record.bytes:,}", macs


def quantization_summary(
    model: nn.Module, sample: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None
) -> QuantSummary:
    """List the quantized layers of ``model`` and what they cost; ``str()`` of the result is a table.

    Below the table stand the sums, the modules with weights (parameters of two axes or more) in floating point, and the
    share of weights and, with a sample, of multiply-accumulates that are quantized.

    With a sample, the network runs once, in evaluation mode, and the multiply-accumulates of its convolutions and
    matrix products are counted: for each layer in each of its calls, and by the bits of weight and input. ``float``
    stands for modules in floating point and products of two activations, such as attention's. Elementwise operations,
    lookups and pooling are not counted. A layer with bits that counts none is an error line. The model's training
    flags, buffers and random states stay as they were.

    Args:
        model: a network from :func:`quantize_model` or :func:`convert`.
        sample: an input with the batch on axis 0, any number of entries; the counts are for one of them. Several
            inputs are a tuple, of positional ones, or a mapping of keywords, of which those count that forward takes.

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
        quantized: 66.7 % of the weights
        >>> quantization_summary(net, torch.rand(5, 4)).macs
        {'8x8 bits': 8, 'float': 4}
    """
    counts = None if sample is None else multiply_accumulates(model, sample)
    records, left_in_float, never_called = [], [], []
    float_weights: dict[int, int] = {}
    for name, module in model.named_modules():
        macs = None if counts is None else counts.get(module, 0)
        if isinstance(module, Summarizable):
            records.append(replace(module.quant_record(name), macs=macs))
            if macs == 0 and getattr(module, "quantizes_input", True):  # An embedding looks up.
                never_called.append(name or "the model")
            if getattr(module, "inner_class", None) is None:
                continue
        # A layer with a forward of its own may have other weights there.
        named = [(key, p) for key, p in module.named_parameters(recurse=False) if p.dim() >= 2]
        weights = [p for key, p in named if key != "weight" or not isinstance(module, Summarizable)]
        if weights:
            left_in_float.append(f"{name or 'the model'} ({type(module).__name__})")
            float_weights |= {id(weight): weight.numel() for weight in weights}
    macs_of_bits = None if counts is None else macs_by_bits(model, counts)
    return QuantSummary(records, left_in_float, macs_of_bits, sum(float_weights.values()), never_called)


# -- multiply-accumulates ------------------------------------------------------------------------------------------


@contextmanager
def count_macs(model: nn.Module, others: Collection[nn.Module] = ()) -> Iterator[Counter[nn.Module | None]]:
    """Count the multiply-accumulates of each quantized or deployed layer while the block runs ``model``.

    So are those of the ``others`` among its modules. An operation counts for the innermost such layer that is running,
    and for ``None`` outside all of them. Products of two activations in a layer, as of queries and keys, count for
    ``None`` as well: they are in floating point.
    Convolutions, matrix products and recurrences are counted, elementwise operations, lookups and pooling not.
    """
    counter, handles = MacCounter(), []
    fast_paths = torch.backends.mha.get_fastpath_enabled()
    for module in model.modules():
        if isinstance(module, Summarizable) or (module in others and not isinstance(module, nn.RNNBase)):
            handles += [module.register_forward_pre_hook(counter.enter), module.register_forward_hook(counter.leave)]
        elif isinstance(module, nn.RNNBase):
            handles.append(module.register_forward_pre_hook(counter.enter_recurrence))
            handles.append(module.register_forward_hook(counter.leave_recurrence))
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # One kernel for all of an attention tells no products.
        with counter:
            yield counter.macs
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_paths)
        for handle in handles:
            handle.remove()


def multiply_accumulates(model: nn.Module, sample: Any) -> dict[nn.Module | None, int]:
    """The multiply-accumulates of each layer for one entry on axis 0 of ``sample``; see :func:`count_macs`.

    Quantizers are off in that run, so that they need no scales yet.
    """
    args, kwargs = to_device(call_arguments(model, sample), device_of(model))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with (
            evaluation_mode(model),
            quantization_disabled(model),
            isolate_rng(device_of(model)),
            torch.no_grad(),
            count_macs(model) as macs,
        ):
            model(*args, **kwargs)
    finally:
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
    entries = batch_size((args, kwargs))
    return {module: -(-count // entries) for module, count in macs.items()}


def macs_by_bits(model: nn.Module, counts: Mapping[nn.Module | None, int]) -> dict[str, int]:
    """The sums of ``counts`` over the layers of ``model`` with the same bits of weight and input, the largest first."""
    sums: Counter[str] = Counter()
    for module in dict.fromkeys([*model.modules(), None]):
        if counts.get(module):
            record = module.quant_record("") if isinstance(module, Summarizable) else None
            bits = FLOAT if record is None else operand_bits(record.weight_bits, record.activation_bits)
            sums[bits] += counts[module]
    return dict(sums.most_common())


def operand_bits(weight_bits: int | None, activation_bits: int | None) -> str:
    """The name of products whose operands have so many bits.

    >>> operand_bits(4, 8), operand_bits(4, None), operand_bits(None, None)
    ('4x8 bits', '4 bits x float', 'float')
    """
    if weight_bits is not None and activation_bits is not None:
        return f"{weight_bits}x{activation_bits} bits"
    if weight_bits is not None:
        return f"{weight_bits} bits x float"
    return FLOAT if activation_bits is None else f"float x {activation_bits} bits"


def format_macs(macs: Mapping[str, int]) -> str:
    """Counts by bits in words.

    >>> format_macs({"4x4 bits": 1200, "float": 64})
    '1,200 at 4x4 bits, 64 in floating point'
    """
    names = {FLOAT: "in floating point"}
    return ", ".join(f"{count:,} {names.get(bits, f'at {bits}')}" for bits, count in macs.items())
