"""What bytes the values of an ONNX graph can be: derived from its operators and constants alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .operators import MOVES, array_of, operand, producer, producer_type, skip_moves

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators on integers: the places of their two operands, of the first one's zero point (with which a convolution
# pads), and of the result's, where the result is of bytes.
INTEGER_PRODUCTS: dict[str, tuple[int, int, int, int | None]] = {
    "QLinearConv": (0, 3, 2, 7),
    "QLinearMatMul": (0, 3, 2, 7),
    "QGemm": (0, 3, 2, 8),
    "ConvInteger": (0, 1, 2, None),
    "MatMulInteger": (0, 1, 2, None),
    "MatMulIntegerToFloat": (0, 1, 4, None),
}
# Operators whose result has bytes of their inputs alone.
BYTE_MOVES = MOVES | {"Concat", "Split", "Gather", "Expand", "DepthToSpace", "SpaceToDepth", "NhwcMaxPool"}
# onnxruntime's other operators on bytes, which add no two products in 16 bits: the place of their result's zero point.
OTHER_OPERATORS = {
    "QLinearAdd": 7,
    "QLinearMul": 7,
    "QLinearAveragePool": 4,
    "QLinearGlobalAveragePool": 4,
    "QLinearConcat": 1,
    "QLinearLeakyRelu": 4,
    "QLinearSigmoid": 4,
    "QLinearSoftmax": 4,
    "QLinearReduceMean": 4,
    "QLinearWhere": 8,
}
# Bytes and narrower integers, and whether they are signed.
_IS_SIGNED = {"uint8": False, "int8": True, "uint4": False, "int4": True}


@dataclass(frozen=True)
class ByteRange:
    """What an operand of a product can be: the range of its codes as they are stored and, of a constant, the codes.

    Attributes:
        low: the smallest code.
        high: the largest one.
        signed: whether they are signed bytes.
        codes: of a constant, with its output channels on axis 0: ``(channels, products)``. If the channels are not
            known, all codes are in one row.
    """

    low: int
    high: int
    signed: bool
    codes: NDArray[Any] | None = None

    def including(self, low: int, high: int) -> ByteRange:
        """The range extended to ``low`` and ``high``."""
        return ByteRange(min(self.low, low), max(self.high, high), self.signed)

    def pair_sums(self, offset: int) -> tuple[int, int]:
        """The smallest and largest sum of two codes that can be neighbours, or of one and a zero, minus ``offset``."""
        if self.codes is None:
            return 2 * min(self.low - offset, 0), 2 * max(self.high - offset, 0)
        codes = self.codes.astype(np.int64) - offset
        codes = np.concatenate([codes, np.zeros((len(codes), 2), np.int64)], axis=1)  # Kernels fill up with zeros.
        low = np.partition(codes, 1, axis=1)[:, :2].sum(1)
        high = np.partition(codes, -2, axis=1)[:, -2:].sum(1)
        return int(low.min(initial=0)), int(high.max(initial=0))


class ByteRanges:
    """The constants of a graph, and the range of each value that has bytes.

    Attributes:
        constants: values that depend on initializers alone.
        folded: those that a runtime computes when it loads the file. It leaves each DequantizeLinear.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.constants = set(graph.initializers.values())
        self.folded = set(self.constants)
        for node in graph:  # In a valid graph each stands behind the nodes that make its inputs.
            inputs = {value for value in node.inputs if value is not None}
            if inputs and inputs <= self.constants and node.domain == "":  # A runtime's own operators stay unknown.
                self.constants.update(node.outputs)
            if inputs and inputs <= self.folded and node.op_type != "DequantizeLinear":
                self.folded.update(node.outputs)
        self._ranges: dict[ir.Value, ByteRange | None] = {}
        self._arrays: dict[ir.Value, NDArray[Any]] = {}

    def constant(self, value: ir.Value) -> NDArray[Any]:
        """The array of a constant, computed if operators make it."""
        import onnx_ir as ir
        from onnx.reference import ReferenceEvaluator

        if value not in self._arrays:
            if value.is_initializer():
                self._arrays[value] = array_of(value)
            else:
                node = producer(value)
                inputs = {str(v.name): self.constant(v) for v in node.inputs if v is not None}
                with np.errstate(all="ignore"):  # As in a runtime: T5 takes the logarithm of distances, and uses few.
                    results: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, inputs)
                self._arrays |= zip(node.outputs, results, strict=True)
        return self._arrays[value]

    def is_quantized(self, node: ir.Node, position: int) -> bool:
        """Whether an input of a float product is dequantized from bytes, or from a value that may be bytes."""
        value = skip_moves(node, position)[1]
        return producer_type(value) == "DequantizeLinear" and self._signs(producer(value)) != ()

    def _signs(self, dequantize: ir.Node) -> tuple[bool, ...]:
        """Whether the codes of a DequantizeLinear may be unsigned (``False``) or signed (``True``) bytes."""
        for value in (*dequantize.inputs[2:], dequantize.inputs[0]):
            if value in self.constants:
                signed = _IS_SIGNED.get(self.constant(value).dtype.name)
                return () if signed is None else (signed,)
        return (False, True)

    def dequantized(self, node: ir.Node, position: int) -> ByteRange | None:
        """The codes of an operand of a float product behind a DequantizeLinear."""
        reader, value = skip_moves(node, position)
        dequantize = producer(value)
        codes, signs = operand(dequantize, 0), self._signs(dequantize)
        if position == 1 and codes in self.constants:
            return self.weight(node, codes, is_direct=reader is node)
        codes_range = self.range(codes) or (_full_range(signs[0]) if len(signs) == 1 else None)
        return self.padded(codes_range, dequantize, 2)

    def weight(self, node: ir.Node, value: ir.Value, is_direct: bool = True) -> ByteRange | None:
        """The second operand of a product, its output channels on axis 0 where they are known."""
        codes_range = self.range(value)
        if codes_range is None or value not in self.constants:
            return codes_range
        codes = self.constant(value)
        if is_direct and node.op_type in ("Conv", "QLinearConv", "ConvInteger"):
            codes = codes.reshape(len(codes), -1)
        elif is_direct and codes.ndim == 2 and node.op_type != "ConvTranspose":
            is_transposed = "transB" in node.attributes and node.attributes["transB"].value
            codes = codes if is_transposed else codes.T
        else:
            codes = codes.reshape(1, -1)
        return replace(codes_range, codes=codes)

    def padded(self, codes_range: ByteRange | None, node: ir.Node, position: int) -> ByteRange | None:
        """A range with the value that an operator pads with: input ``position`` of ``node``, 0 without one."""
        padding = node.inputs[position] if len(node.inputs) > position else None
        if codes_range is None or padding is None:
            return codes_range and codes_range.including(0, 0)
        if padding not in self.constants:
            return None
        points = self.constant(padding).astype(np.int64)
        return codes_range.including(int(points.min()), int(points.max()))

    def range(self, value: ir.Value) -> ByteRange | None:
        """The range of a value of bytes, ``None`` where it is not known."""
        if value not in self._ranges:
            self._ranges[value] = self._derived(value)
        return self._ranges[value]

    def _derived(self, value: ir.Value) -> ByteRange | None:
        if value in self.constants:
            array = self.constant(value)
            signed, codes = _IS_SIGNED.get(array.dtype.name), array.astype(np.int64)
            return None if signed is None else ByteRange(int(codes.min(initial=0)), int(codes.max(initial=0)), signed)
        node = value.producer()
        if node is None:
            return _full_range(_IS_SIGNED.get(value.dtype.name.lower()) if value.dtype else None)
        if node.op_type == "QuantizeLinear":
            return self._quantized(node)
        if node.op_type == "Clip":
            return self._clipped(node)
        if node.op_type == "Pad":
            return self.padded(self.range(operand(node, 0)), node, 2)
        if node.op_type in BYTE_MOVES:
            count = len(node.inputs) if node.op_type == "Concat" else 1
            return _union([self.range(operand(node, i)) for i in range(count)])
        if node.op_type == "DynamicQuantizeLinear" and value.index() == 0:
            return _full_range(False)
        position = OTHER_OPERATORS.get(node.op_type) or INTEGER_PRODUCTS.get(node.op_type, (0, 0, 0, None))[3]
        return None if position is None else self._range_of_type(node, position)

    def _clipped(self, clip: ir.Node) -> ByteRange | None:
        codes_range = self.range(operand(clip, 0))
        if codes_range is None:
            return None
        low, high = codes_range.low, codes_range.high
        for i, bound in enumerate(clip.inputs[1:]):
            if bound in self.constants:
                code = int(self.constant(bound))
                low, high = (max(low, code), high) if i == 0 else (low, min(high, code))
        return ByteRange(low, max(low, high), codes_range.signed)

    def _quantized(self, quantize: ir.Node) -> ByteRange | None:
        if len(quantize.inputs) > 2 and quantize.inputs[2] is not None:
            return self._range_of_type(quantize, 2)
        from onnx import TensorProto

        output_dtype = quantize.attributes["output_dtype"].value if "output_dtype" in quantize.attributes else 0
        signs = {0: False, TensorProto.UINT8: False, TensorProto.INT8: True}
        return _full_range(signs.get(output_dtype))

    def _range_of_type(self, node: ir.Node, position: int) -> ByteRange | None:
        """All bytes of the type of a zero point, input ``position`` of ``node``."""
        zero = node.inputs[position] if len(node.inputs) > position else None
        return _full_range(_IS_SIGNED.get(self.constant(zero).dtype.name)) if zero in self.constants else None


def _full_range(signed: bool | None) -> ByteRange | None:
    return None if signed is None else ByteRange(-128, 127, True) if signed else ByteRange(0, 255, False)


def _union(ranges: list[ByteRange | None]) -> ByteRange | None:
    """The range of all, ``None`` if one is not known or their types differ."""
    known = [r for r in ranges if r is not None]
    if len(known) < len(ranges) or len({r.signed for r in known}) != 1:
        return None
    return known[0].including(min(r.low for r in known), max(r.high for r in known))
