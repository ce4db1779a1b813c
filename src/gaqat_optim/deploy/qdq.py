"""The ONNX operators that a deployed layer writes of itself while it is exported.

torch's exporter has no operator for codes narrower than 8 bits: it drops the clipping range of a stock fake-quantize
without a word. So the layers name the operators themselves, through ``torch.onnx.ops.symbolic``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.lsq.functional import integer_bounds

# The lowest opset that has INT4; also the version in which QuantizeLinear and DequantizeLinear are written.
LOWEST_OPSET = 21

# Metadata that stays in the file: whose codes a node computes, and the width of the weights that a node unpacks.
QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT = "gaqat.quantizer", "gaqat.weight_bits", "gaqat.weight_shift"


def is_onnx_export() -> bool:
    """Whether a forward pass is being recorded for an ONNX graph, and has to write operators instead of computing."""
    # The first test alone holds for torch's older exporter too, which cannot take such operators: it records the
    # integer computation, in floating-point operators.
    return torch.onnx.is_in_onnx_export() and torch.compiler.is_exporting()


def zero_point(signed: bool) -> int:
    """What an activation's code of zero is in its uint8 container."""
    return 128 if signed else 0


def quantize_clip_dequantize(x: Tensor, scale: Tensor, bits: int, signed: bool, quantizer: str) -> Tensor:
    """QuantizeLinear -> Clip -> DequantizeLinear; the Clip only where the codes do not fill their container.

    The container is uint8 at any width, since runtimes have no kernels on narrower types. Signed codes lie around its
    middle, since onnxruntime's convolution takes one type for its input and its output, and an input after a ReLU is
    unsigned.

    Args:
        x: float32, any shape.
        scale: float32 of shape ``()``.
        bits: width of the codes.
        signed: whether they have a sign.
        quantizer: name under which the node that computes the codes can be found in the file.
    """
    offset = zero_point(signed)
    zero = torch.tensor(offset, dtype=torch.uint8)
    clips = bits < 8
    name = {QUANTIZER: quantizer}
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x, scale, zero),
        dtype=torch.uint8,
        shape=x.shape,
        version=LOWEST_OPSET,
        metadata_props=None if clips else name,
    )
    if clips:
        low, high = (torch.tensor(bound + offset, dtype=torch.uint8) for bound in integer_bounds(bits, signed))
        codes = torch.onnx.ops.symbolic(
            "Clip", (codes, low, high), dtype=torch.uint8, shape=x.shape, version=13, metadata_props=name
        )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=x.shape, version=LOWEST_OPSET
    )


def dequantize_constant(
    codes: Tensor, scale: Tensor, weight_bits: int | None = None, shift: int = 0, axis: int = 0
) -> Tensor:
    """DequantizeLinear of constant codes (int8 or int32), with zero points written out.

    onnxruntime chooses its integer kernels only where the zero points are there, zero or not.

    Args:
        codes: with the channels on ``axis``.
        scale: float32, of shape ``()`` or ``(channels,)``.
        weight_bits: width of the codes, noted in the file for the choice of their storage.
        shift: how many binary digits the codes were shifted up by, noted likewise.
        axis: what a scale for each channel counts.
    """
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, torch.zeros(scale.shape, dtype=codes.dtype)),
        {"axis": axis} if scale.dim() else None,
        dtype=torch.float32,
        shape=codes.shape,
        version=LOWEST_OPSET,
        metadata_props=None if weight_bits is None else {WEIGHT_BITS: str(weight_bits), WEIGHT_SHIFT: str(shift)},
    )
