"""What bytes the values of an ONNX graph can be: derived from its operators and constants alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph_cleanup import MOVED_ACROSS

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
MOVING = MOVED_ACROSS | {"Concat", "Split", "Gather", "Expand", "DepthToSpace", "SpaceToDepth", "NhwcMaxPool"}
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


@dataclass(frozen=True)
class Bytes:
    """What an operand of a product can be: the range of its codes as they are stored and, of a constant, the codes.

    Attributes:
        low: the smallest code.
        high: the largest one.
        signed: whether they are signed bytes.
        codes: those of a constant with its output channels on axis 0, of shape ``(channels, products)``; of one whose
            channels are not known, all in one row.
    """

    low: int
    high: int
    signed: bool
    codes: NDArray[Any] | None = None

    def pairs(self, offset: int) -> tuple[int, int]:
        """The smallest and largest sum of two codes that can be neighbours, or of one and a zero, minus ``offset``."""
        if self.codes is None:
            return 2 * min(self.low - offset, 0), 2 * max(self.high - offset, 0)
        codes = self.codes.astype(np.int64) - offset
        codes = np.concatenate([codes, np.zeros((len(codes), 2), np.int64)], axis=1)  # Kernels fill up with zeros.
        low = np.partition(codes, 1, axis=1)[:, :2].sum(1)
        high = np.partition(codes, -2, axis=1)[:, -2:].sum(1)
        return int(low.min(initial=0)), int(high.max(initial=0))


class ByteRanges:
    """What is known of the values of a graph: the constants and, of those that are bytes, their ranges."""

    def __init__(self, proto: Any) -> None:
        from onnx import TensorProto

        self._opsets, graph = proto.opset_import, proto.graph
        self.nodes = list(graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        kinds: dict[Any, bool] = {TensorProto.UINT8: False, TensorProto.INT8: True}
        self._inputs = {v.name: kinds.get(v.type.tensor_type.elem_type) for v in graph.input}
        self._ranges: dict[str, Bytes | None] = {}
        self._arrays: dict[str, NDArray[Any]] = {}
        self.constants = set(self._stored)
        self.folded = set(self._stored)  # Those that a runtime computes when it loads the file: no DequantizeLinear.
        for node in self.nodes:  # In a valid graph each stands behind what makes its inputs.
            for known in (self.constants, self.folded):
                is_known = len(node.input) > 0 and all(name in known for name in node.input if name)
                if is_known and (known is self.constants or node.op_type != "DequantizeLinear"):
                    known.update(node.output)

    def constant(self, name: str) -> NDArray[Any]:
        """The array of a constant, computed if operators make it."""
        if name not in self._arrays:
            self._arrays[name] = self._computed(name)
        return self._arrays[name]

    def _computed(self, name: str) -> NDArray[Any]:
        import onnx
        from onnx.reference import ReferenceEvaluator

        if name in self._stored:
            stored: NDArray[Any] = onnx.numpy_helper.to_array(self._stored[name])
            return stored
        wanted, kept = {name}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted.update(n for n in node.input if n)
        tensors = [tensor for key, tensor in self._stored.items() if key in wanted]
        graph = onnx.helper.make_graph(kept[::-1], "constant", [], [onnx.ValueInfoProto(name=name)], tensors)
        model = onnx.helper.make_model(graph, opset_imports=self._opsets)
        results: Any = ReferenceEvaluator(model).run(None, {})
        computed: NDArray[Any] = results[0]
        return computed

    def behind(self, node: Any, position: int) -> tuple[bool, str]:
        """Where an input comes from, behind operators that only move it, and whether there are none of these."""
        value, direct = node.input[position], True
        while value in self.makers and self.makers[value].op_type in MOVED_ACROSS:
            value, direct = self.makers[value].input[0], False
        return direct, value

    def is_quantized(self, node: Any, position: int) -> bool:
        """Whether an input of a float product is dequantized from bytes, or from what may be bytes."""
        maker = self.makers.get(self.behind(node, position)[1])
        return maker is not None and maker.op_type == "DequantizeLinear" and self._type_of_codes(maker) != ()

    def _type_of_codes(self, dequantize: Any) -> tuple[bool, ...]:
        """Whether the codes of a DequantizeLinear may be unsigned (``False``) or signed (``True``) bytes."""
        for name in (*dequantize.input[2:], dequantize.input[0]):
            if name in self.constants:
                signed = self._signed(self.constant(name).dtype)
                return () if signed is None else (signed,)
        return (False, True)

    def dequantized(self, node: Any, position: int) -> Bytes | None:
        """The codes of an operand of a float product behind a DequantizeLinear."""
        direct, value = self.behind(node, position)
        maker = self.makers[value]
        kinds = self._type_of_codes(maker)
        found = self.bytes_of(maker.input[0]) or (_full(kinds[0]) if len(kinds) == 1 else None)
        if position == 1 and maker.input[0] in self.constants:
            return self.weight(node, maker.input[0], direct)
        return self.padded(found, maker, 2)

    def weight(self, node: Any, name: str, direct: bool = True) -> Bytes | None:
        """The second operand of a product, its output channels on axis 0 where they are known."""
        found = self.bytes_of(name)
        if found is None or name not in self.constants:
            return found
        codes = self.constant(name)
        if direct and node.op_type in ("Conv", "QLinearConv", "ConvInteger"):
            codes = codes.reshape(len(codes), -1)
        elif direct and codes.ndim == 2 and node.op_type != "ConvTranspose":
            codes = codes if any(a.name == "transB" and a.i for a in node.attribute) else codes.T
        else:
            codes = codes.reshape(1, -1)
        return Bytes(found.low, found.high, found.signed, codes)

    def padded(self, found: Bytes | None, node: Any, place: int) -> Bytes | None:
        """Bytes with the value among them that they are padded with, which is input ``place`` of ``node`` or 0."""
        if found is None or len(node.input) <= place or not node.input[place]:
            return found if found is None else Bytes(min(found.low, 0), max(found.high, 0), found.signed)
        if node.input[place] not in self.constants:
            return None
        points = self.constant(node.input[place]).astype(np.int64)
        return Bytes(min(found.low, int(points.min())), max(found.high, int(points.max())), found.signed)

    def bytes_of(self, name: str) -> Bytes | None:
        """The range of a value of bytes, ``None`` where it is not known."""
        if name not in self._ranges:
            self._ranges[name] = self._range(name)
        return self._ranges[name]

    def _range(self, name: str) -> Bytes | None:
        if name in self.constants:
            codes = self.constant(name)
            signed = self._signed(codes.dtype)
            numbers = codes.astype(np.int64)
            return None if signed is None else Bytes(int(numbers.min(initial=0)), int(numbers.max(initial=0)), signed)
        if name in self._inputs:
            return _full(self._inputs[name])
        maker = self.makers.get(name)
        if maker is None:
            return None
        if maker.op_type == "QuantizeLinear":
            return _full(self._quantized(maker))
        if maker.op_type == "Clip":
            return self._clipped(maker)
        if maker.op_type == "Pad":
            return self.padded(self.bytes_of(maker.input[0]), maker, 2)
        if maker.op_type in MOVING:
            values = maker.input if maker.op_type == "Concat" else maker.input[:1]
            return _union([self.bytes_of(value) for value in values])
        if maker.op_type == "DynamicQuantizeLinear" and name == maker.output[0]:
            return _full(False)
        place = OTHER_OPERATORS.get(maker.op_type) or INTEGER_PRODUCTS.get(maker.op_type, (0, 0, 0, None))[3]
        if place is not None and len(maker.input) > place and maker.input[place] in self.constants:
            return _full(self._signed(self.constant(maker.input[place]).dtype))
        return None

    def _clipped(self, clip: Any) -> Bytes | None:
        found = self.bytes_of(clip.input[0])
        if found is None:
            return None
        low, high = found.low, found.high
        for i, name in enumerate(clip.input[1:]):
            if name and name in self.constants:
                bound = int(self.constant(name))
                low, high = (max(low, bound), high) if i == 0 else (low, min(high, bound))
        return Bytes(low, max(low, high), found.signed)

    def _quantized(self, quantize: Any) -> bool | None:
        """Whether a QuantizeLinear gives signed bytes; ``None`` where it gives none."""
        if len(quantize.input) > 2 and quantize.input[2]:
            point = quantize.input[2]
            return self._signed(self.constant(point).dtype) if point in self.constants else None
        from onnx import TensorProto

        kind = next((a.i for a in quantize.attribute if a.name == "output_dtype"), TensorProto.UINT8)
        return {TensorProto.UINT8: False, TensorProto.INT8: True}.get(kind)

    @staticmethod
    def _signed(dtype: Any) -> bool | None:
        """Whether a type is of signed bytes or of narrower signed integers; ``None`` for wider ones and for floats."""
        return {"uint8": False, "int8": True, "uint4": False, "int4": True}.get(dtype.name)


def _full(signed: bool | None) -> Bytes | None:
    return None if signed is None else Bytes(-128, 127, True) if signed else Bytes(0, 255, False)


def _union(parts: list[Bytes | None]) -> Bytes | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.signed for part in known}) != 1:
        return None
    return Bytes(min(part.low for part in known), max(part.high for part in known), known[0].signed)
