"""The ONNX operators that a deployed layer writes while it is exported.

torch's exporter has no operator for codes narrower than 8 bits: it silently drops the clipping range of a stock
fake-quantize. So the layers name the operators themselves, through ``torch.onnx.ops.symbolic``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The lowest opset that has INT4; also the version in which QuantizeLinear and DequantizeLinear are written.
LOWEST_OPSET = 21

# Metadata in the file: the quantizer whose codes a node computes; the bits of the weight that a node dequantizes, and
# how many binary digits its codes are shifted up by.
QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT = "gaqat.quantizer", "gaqat.weight_bits", "gaqat.weight_shift"


def is_onnx_export() -> bool:
    """Whether an ONNX graph is being recorded, so that layers write operators instead of computing."""
    # The first test alone also holds for torch's older exporter, which has no such operators: it records the integer
    # computation, in floating-point operators.
    return torch.onnx.is_in_onnx_export() and torch.compiler.is_exporting()


def quantize_clip_dequantize(x: Tensor, scale: Tensor, bits: int, zero_point: int, quantizer: str) -> Tensor:
    """QuantizeLinear -> Clip -> DequantizeLinear; the Clip only where the codes do not fill their container.

    The container is uint8 for all bits, since runtimes have no kernels on narrower types, and for all zero points,
    since onnxruntime's convolution takes one type for its input and its output, and an input after a ReLU is unsigned.
    Bytes are codes plus the zero point: 0 to 2^bits - 1.

    Args:
        x: float32, any shape.
        scale: float32 of shape ``()``.
        bits: of the codes.
        zero_point: the byte of the value 0.
        quantizer: name that the node which computes the codes has in the file's metadata.
    """
    zero = torch.tensor(zero_point, dtype=torch.uint8)
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
        low, high = (torch.tensor(bound, dtype=torch.uint8) for bound in (0, 2**bits - 1))
        codes = torch.onnx.ops.symbolic(
            "Clip", (codes, low, high), dtype=torch.uint8, shape=x.shape, version=13, metadata_props=name
        )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=x.shape, version=LOWEST_OPSET
    )


def dequantize_constant(
    codes: Tensor, scale: Tensor, weight_bits: int | None = None, shift: int = 0, axis: int = 0
) -> Tensor:
    """DequantizeLinear of constant codes (int8 or int32), with zero points.

    onnxruntime chooses its integer kernels only if there are zero points, zero or not.

    Args:
        codes: with the channels on ``axis``.
        scale: float32, of shape ``()`` or ``(channels,)``.
        weight_bits: bits of a weight's codes, noted in the file for the choice of their storage.
        shift: how many binary digits the codes were shifted up by, also noted.
        axis: the axis of the channels that the scales belong to.
    """
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, torch.zeros(scale.shape, dtype=codes.dtype)),
        {"axis": axis} if scale.dim() else None,
        dtype=torch.float32,
        shape=codes.shape,
        version=LOWEST_OPSET,
        metadata_props=_storage_note(weight_bits, shift),
    )


def gather_constant(codes: Tensor, indices: Tensor, weight_bits: int | None, shift: int) -> Tensor:
    """Gather of rows of constant codes (int8), which a file stores as it does those of :func:`dequantize_constant`."""
    return torch.onnx.ops.symbolic(
        "Gather",
        (codes, indices),
        {"axis": 0},
        dtype=codes.dtype,
        shape=(*indices.shape, *codes.shape[1:]),
        version=13,
        metadata_props=_storage_note(weight_bits, shift),
    )


def _storage_note(weight_bits: int | None, shift: int) -> dict[str, str] | None:
    return None if weight_bits is None else {WEIGHT_BITS: str(weight_bits), WEIGHT_SHIFT: str(shift)}
