"""How weights are stored in an ONNX file: in their own number of bits, and as INT8 once a runtime has loaded them.

A DequantizeLinear directly on narrow codes has no integer kernels. So operators make INT8 of each constant of narrow
codes, shifted up to where the layer needs them in the 8 bits. Their inputs are constant, and onnxruntime computes them
once, when it loads the file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..bit_planes import pack_bits
from ..qdq import WEIGHT_BITS, WEIGHT_SHIFT
from .operators import PRODUCTS, add, add_constant, array_of, cast, operand, producer, producer_type, store

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_BITS_INT4 = 4
_MAX_BITS_PLANES = 7
# About the bytes of an operator in the file: shorter constants are stored.
_OPERATOR_BYTES = 64


def derive_bias_scales(graph: ir.Graph) -> None:
    """Leave out the scales and zero points of biases, which onnxruntime computes when it loads the file.

    The scale of a bias is the product of the scales of input and weight, in float32: the same bits on every machine. It
    is left out only if the stored numbers say so. The zero points are the bias minus itself. Both take 8 bytes a
    channel, more than the weights of a depthwise convolution: with them, the file of a MobileNetV2 at 2 bits is 10 %
    larger, that of a ResNet-18 0.5 %.
    """
    for product in list(graph):
        if product.op_type not in PRODUCTS or [producer_type(v) for v in product.inputs] != ["DequantizeLinear"] * 3:
            continue
        x, weight, bias = (producer(operand(product, position)) for position in range(3))
        codes, scale, zero_point = (operand(bias, position) for position in range(3))
        factors = operand(x, 1), operand(weight, 1)
        is_constant = _is_long(scale) and all(factor.is_initializer() for factor in factors)
        if is_constant and np.array_equal(array_of(scale), np.multiply(*map(array_of, factors))):
            scale.replace_all_uses_with(add("Mul", *factors))
        if _is_long(zero_point) and not array_of(zero_point).any():
            bias.replace_input_with(2, add("Sub", codes, codes))
    graph.sort()


def _is_long(value: ir.Value) -> bool:
    return value.is_initializer() and array_of(value).nbytes > _OPERATOR_BYTES


def store_int4(graph: ir.Graph) -> None:
    """Store codes of up to 4 bits as INT4."""
    for weight, _, shift in _narrow_weights(graph, _MAX_BITS_INT4):
        readers = weight.uses()
        store(weight, array_of(weight) >> shift, int4=True)
        if shift:  # INT8 has no product.
            shifted = add("Mul", cast(weight, np.int32), add_constant(graph, np.array(2**shift, np.int32)))
            codes = cast(shifted, np.int8)
        else:
            codes = cast(weight, np.int8)
        for node, position in readers:
            node.replace_input_with(position, codes)
    graph.sort()


def store_planes(graph: ir.Graph) -> None:
    """Store codes of up to 7 bits as planes (:func:`~gaqat_optim.deploy.bit_planes.pack_bits`), as one UINT8 constant.

    A byte of plane p holds bit p of eight codes. A table of 256 rows gives what each such byte adds to its eight codes,
    so that one lookup in each plane and the union of the planes are the codes: no intermediate result is larger than
    the INT8 weight, but for the planes' bytes as indices.
    """
    tables = _Tables(graph)
    for weight, bits, shift in _narrow_weights(graph, _MAX_BITS_PLANES):
        readers, codes = weight.uses(), array_of(weight)
        store(weight, pack_bits(codes >> shift, bits))
        unpacked = _unpacked(graph, weight, codes.shape, bits, shift, tables)
        for node, position in readers:
            node.replace_input_with(position, unpacked)
    graph.sort()


def _narrow_weights(graph: ir.Graph, max_bits: int) -> list[tuple[ir.Value, int, int]]:
    """The stored codes of up to ``max_bits`` bits, with their bits and how far they are shifted up.

    If layers of different bits share an initializer, for its codes are equal, either layer's bits are valid.
    """
    weights = {}
    for node in graph:
        bits, shift = (int(node.metadata_props.get(key, -1)) for key in (WEIGHT_BITS, WEIGHT_SHIFT))
        if 0 < bits <= max_bits and operand(node, 0).is_initializer():
            weights[operand(node, 0)] = bits, shift
    return [(codes, *weights[codes]) for codes in sorted(weights, key=lambda codes: str(codes.name))]


class _Tables:
    """Tables that all weights share: what a byte adds to its eight codes, as INT8 of shape (256, 8).

    Operators make them, since in the file each would take as many bytes as a small layer. Not BitShift, with which
    OpenVINO 2026.4 computed wrong tables.
    """

    def __init__(self, graph: ir.Graph) -> None:
        every_byte = add_constant(graph, np.arange(256, dtype=np.uint8).reshape(256, 1), "gaqat.every_byte")
        places = add_constant(graph, (1 << np.arange(8)).astype(np.uint8), "gaqat.places")
        self._graph = graph
        self._bits = cast(cast(add("BitwiseAnd", every_byte, places), np.bool_), np.int32)
        self._tables: dict[int, ir.Value] = {}

    def table(self, place_value: int) -> ir.Value:
        """The table in which a bit that is set counts ``place_value``."""
        if place_value not in self._tables:
            factor = add_constant(self._graph, np.array(place_value, np.int32))
            self._tables[place_value] = cast(add("Mul", self._bits, factor), np.int8)
        return self._tables[place_value]


def _unpacked(
    graph: ir.Graph, planes: ir.Value, shape: tuple[int, ...], bits: int, shift: int, tables: _Tables
) -> ir.Value:
    """The codes in ``planes`` times 2^shift, as INT8."""
    import onnx_ir as ir

    node = ir.node("Split", [cast(planes, np.int32)], {"axis": 0, "num_outputs": bits}, num_outputs=bits, graph=graph)
    codes = None
    for p, plane in enumerate(node.outputs):
        place_value = 2 ** (p + shift)  # In two's complement the highest bit counts negative.
        part = add("Gather", tables.table(place_value if p < bits - 1 else -place_value), plane)
        codes = part if codes is None else add("BitwiseOr", codes, part)
    count = math.prod(shape)
    if count % 8:  # The last bytes have bits that stand for nothing.
        flat, start, end = (add_constant(graph, np.array([v], np.int64)) for v in (-1, 0, count))
        codes = add("Slice", add("Reshape", codes, flat), start, end)
    return add("Reshape", codes, add_constant(graph, np.array(shape, np.int64)))
