"""Weights of 8 bits in a form in which no product can saturate: the same integers, in other bytes.

Beside inputs of 8 bits, two products of signed bytes beyond 64 do not fit into the 16 bits in which processors without
VNNI add them (:mod:`~gaqat_optim.deploy.onnx_export.saturation`). Weights of up to 7 bits fit. For weights of 8 bits
there are two ways:

- The product gets its input twice, side by side, and the weight in two halves, each of at most 64. The sums, the kernel
  and the type of the weight stay the same; there are twice as many products. Example: 101 x becomes 50 x + 51 x.
- The weight w becomes the unsigned byte w + 128, with a zero point of 128. The kernels for unsigned weights widen bytes
  to 16 bits first. With VNNI, a convolution takes 2.5 times as long, where halves take 1.8 times as long, and
  OpenVINO's matrix products are not exact. So this way is only for convolutions that halves would make slower still:
  in groups, whose kernels would change, and with an output that is not quantized, which run in floating point.

Both ways keep 8 bits a weight in the file: operators make the halves when it is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..qdq import WEIGHT_BITS, WEIGHT_SHIFT
from .operators import MOVES, PRODUCTS, add, add_constant, array_of, cast, operand, producer, producer_type, store
from .saturation import saturating_products

if TYPE_CHECKING:
    import onnx_ir as ir

# onnxruntime's fastest kernels for convolutions take their input's channels by fours.
_CHANNEL_BLOCK = 4
# Between a weight and its product; a Mul is the scale of a transposed convolution in groups.
_BEHIND_WEIGHTS = MOVES | {"Mul"}


def make_exact(graph: ir.Graph) -> None:
    """Bring the weights of all products that can saturate into a form in which they cannot, in place.

    Args:
        graph: its weights are stored as INT8.
    """
    doubled: dict[tuple[ir.Value, int], ir.Value] = {}
    weights = dict.fromkeys(w for found in saturating_products(graph) for w in _weights_of(found.product))
    for weight in weights:
        products = [n for n in graph if n.op_type in PRODUCTS and weight in _weights_of(n)]
        axes = {_summed_axis(product) for product in products}
        axis = axes.pop()
        if axis is None or axes:
            _make_unsigned(graph, weight)
        else:
            _split(graph, weight, products, axis, doubled)
    graph.sort()


def _weights_of(product: ir.Node) -> list[ir.Value]:
    """A product's constant operands of signed bytes, which reach it through a DequantizeLinear."""
    weights = []
    for position in (1, 0):
        node = operand(product, position).producer()
        while node is not None and node.op_type in _BEHIND_WEIGHTS:
            node = operand(node, 0).producer()
        if node is not None and node.op_type == "DequantizeLinear" and _is_int8(codes := operand(node, 0)):
            weights.append(codes)
    return weights


def _is_int8(value: ir.Value) -> bool:
    return value.is_initializer() and array_of(value).dtype == np.int8


def _summed_axis(product: ir.Node) -> int | None:
    """The axis of its weight that a product sums over, ``None`` where the weight cannot be in halves."""
    x, weight = (operand(product, i) for i in (0, 1))
    if producer_type(x) != "DequantizeLinear" or producer_type(weight) != "DequantizeLinear":
        return None
    codes = operand(producer(weight), 0)
    if operand(producer(x), 0).is_initializer() or not _is_int8(codes):
        return None
    attributes = {name: attribute.value for name, attribute in product.attributes.items()}
    if product.op_type == "Conv":
        return 1 if attributes.get("group", 1) == 1 and _is_quantized(product.outputs[0]) else None
    if product.op_type == "Gemm":
        return None if attributes.get("transA") else attributes.get("transB", 0)
    return 0 if product.op_type == "MatMul" and array_of(codes).ndim == 2 else None


def _is_quantized(value: ir.Value) -> bool:
    """Whether quantizers alone read a value, so that a kernel on integers can compute it."""
    return {node.op_type for node in value.consumers()} == {"QuantizeLinear"} and not value.is_graph_output()


def _split(
    graph: ir.Graph,
    weight: ir.Value,
    products: list[ir.Node],
    axis: int,
    doubled: dict[tuple[ir.Value, int], ir.Value],
) -> None:
    """Store a weight as it is, and compute with its halves, side by side on the axis that is summed over."""
    shape = array_of(weight).shape
    is_convolution = products[0].op_type == "Conv"
    padding = -2 * shape[axis] % _CHANNEL_BLOCK if is_convolution else 0
    readers = weight.uses()
    codes = cast(weight, np.int32)  # INT8 has no quotient.
    half = add("Div", codes, add_constant(graph, np.array(2, np.int32)))
    halves = cast(add("Concat", half, add("Sub", codes, half), axis=axis), np.int8)
    if padding:
        pads = np.zeros(2 * len(shape), np.int64)
        pads[len(shape) + axis] = padding
        halves = add("Pad", halves, add_constant(graph, pads))
    for product in products:
        x, x_axis = operand(product, 0), 1 if is_convolution else -1
        if (x, x_axis) not in doubled:
            doubled[x, x_axis] = _side_by_side(graph, x, x_axis, shape[axis], padding)
        product.replace_input_with(0, doubled[x, x_axis])
    for node, position in readers:
        if node.op_type == "DequantizeLinear":
            node.replace_input_with(position, halves)


def _side_by_side(graph: ir.Graph, x: ir.Value, axis: int, count: int, padding: int) -> ir.Value:
    """The dequantized ``x`` with its ``count`` channels twice, and ``padding`` more to fill a kernel's block."""
    codes, scale, zero = (operand(producer(x), i) for i in range(3))
    if padding:
        order = np.array([*range(count), *range(count), *[0] * padding], np.int64)
        twice = add("Gather", codes, add_constant(graph, order, f"{x.name}_channels"), axis=axis)
    else:
        twice = add("Concat", codes, codes, axis=axis)
    return add("DequantizeLinear", twice, scale, zero)


def _make_unsigned(graph: ir.Graph, weight: ir.Value) -> None:
    """Store a weight as unsigned bytes, with 128 as their zero point."""
    store(weight, array_of(weight).view(np.uint8) ^ np.uint8(128))
    for node in weight.consumers():
        if node.op_type == "DequantizeLinear":
            zeros = np.full(array_of(operand(node, 2)).shape, 128, np.uint8)
            node.replace_input_with(2, add_constant(graph, zeros, f"{weight.name}_zeros"))
            for key in (WEIGHT_BITS, WEIGHT_SHIFT):  # In fewer bits, they would come back as signed bytes.
                node.metadata_props.pop(key, None)
