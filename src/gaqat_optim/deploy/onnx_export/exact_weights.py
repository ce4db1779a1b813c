"""Weights of 8 bits in a form in which no product can saturate: the same integers, in other bytes.

Beside inputs of 8 bits, two products of signed bytes beyond 64 do not fit into the 16 bits in which processors without
VNNI add them (:mod:`~gaqat_optim.deploy.onnx_export.saturation`). Weights of up to 7 bits fit. For those of 8 there are
two ways:

- The product gets its input twice, side by side, and the weight in two halves, each of at most 64. The sums, the kernel
  and the type of the weight stay what they are; there are twice as many products.
- The weight w becomes the unsigned byte w + 128, with a zero point of 128. The kernels for those widen bytes to 16 bits
  first. With VNNI a convolution takes 2.5 times as long with it, where halves take 1.8 times as long, and OpenVINO's
  matrix products are not exact with it. It is for convolutions that the first way would make slower still: those in
  groups, whose kernels it would change, and those whose output is not quantized, which run in floating point.

The file keeps 8 bits a weight in both: operators make the halves when it is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..qdq import WEIGHT_BITS, WEIGHT_SHIFT
from .graph_cleanup import MOVED_ACROSS, PRODUCTS, insert, replace_nodes
from .saturation import saturating_products

# onnxruntime's fastest kernels for convolutions take their input's channels by fours.
_CHANNELS = 4
# Between a weight and its product; a Mul is the scale of a transposed convolution in groups.
_PASSED = MOVED_ACROSS | {"Mul"}


def make_exact(proto: Any) -> None:
    """Bring the weights of all products that can saturate into a form in which they cannot, in place.

    Args:
        proto: an ``onnx.ModelProto`` whose weights are stored as INT8.
    """
    graph = _Weights(proto.graph)
    names = dict.fromkeys(name for found in saturating_products(proto) for name in graph.weights_of(found.product))
    for name in names:
        axes = {graph.summed_axis(product) for product in graph.products_of(name)}
        if None in axes or len(axes) > 1:
            graph.make_unsigned(name)
        else:
            graph.split(name)
    graph.write()


class _Weights:
    """The INT8 weights of a graph and the products that read them, behind a DequantizeLinear."""

    def __init__(self, graph: Any) -> None:
        from onnx import TensorProto

        self.graph = graph
        self.stored = {t.name: t for t in graph.initializer}
        self.signed = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.doubled: set[str] = set()
        self.inserted: dict[str, list[Any]] = {"": []}

    def write(self) -> None:
        """Put what was made into the graph, and take out what nothing reads any more."""
        insert(self.graph, self.inserted)
        read = {name for node in self.graph.node for name in node.input} | {v.name for v in self.graph.output}
        kept = [n for n in self.graph.node if n.op_type != "DequantizeLinear" or n.output[0] in read]
        replace_nodes(self.graph, kept)
        unread = [t for t in self.graph.initializer if t.name not in read]
        for tensor in unread:
            self.graph.initializer.remove(tensor)

    def dequantize(self, product: Any, position: int) -> Any:
        """The DequantizeLinear that an operand of a product comes from, if any, behind what keeps its codes."""
        node = self.makers.get(product.input[position])
        while node is not None and node.op_type in _PASSED:
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weights_of(self, product: Any) -> list[str]:
        """The names of a product's constant operands of signed bytes."""
        makers = [self.dequantize(product, i) for i in (1, 0)]
        return [node.input[0] for node in makers if node is not None and node.input[0] in self.signed]

    def products_of(self, name: str) -> list[Any]:
        """The products that read a weight."""
        return [n for n in self.graph.node if n.op_type in PRODUCTS and name in self.weights_of(n)]

    def summed_axis(self, product: Any) -> int | None:
        """The axis of its weight that a product sums over, ``None`` where the weight cannot be in halves."""
        x, weight = (self.makers.get(product.input[i]) for i in (0, 1))
        if x is None or weight is None or x.op_type != "DequantizeLinear" or weight.op_type != "DequantizeLinear":
            return None
        if x.input[0] in self.stored or weight.input[0] not in self.signed:
            return None
        settings = {a.name: a.i for a in product.attribute}
        if product.op_type == "Conv":
            return 1 if settings.get("group", 1) == 1 and self._is_quantized(product.output[0]) else None
        if product.op_type == "Gemm":
            return None if settings.get("transA") else settings.get("transB", 0)
        return 0 if product.op_type == "MatMul" and len(self.stored[weight.input[0]].dims) == 2 else None

    def _is_quantized(self, value: str) -> bool:
        """Whether a value is read by quantizers alone, so that a kernel on integers can compute it."""
        readers = {node.op_type for node in self.graph.node if value in node.input}
        return readers == {"QuantizeLinear"} and all(value != output.name for output in self.graph.output)

    def split(self, name: str) -> None:
        """Store a weight as it is, and compute with its halves, side by side on the axis that is summed over."""
        from onnx import TensorProto
        from onnx.helper import make_node

        products = self.products_of(name)
        axis, shape = self.summed_axis(products[0]), self.stored[name].dims
        assert axis is not None
        is_convolution = products[0].op_type == "Conv"
        more = -2 * shape[axis] % _CHANNELS if is_convolution else 0
        codes, half, rest, both, halves = (f"{name}_{part}" for part in ("int32", "half", "rest", "both", "halves"))
        two = self._constant("gaqat.two", np.array(2, np.int32))
        nodes = [
            make_node("Cast", [name], [codes], to=TensorProto.INT32),  # INT8 has no quotient.
            make_node("Div", [codes, two], [half]),
            make_node("Sub", [codes, half], [rest]),
            make_node("Concat", [half, rest], [both], axis=axis),
            make_node("Cast", [both], [halves], to=TensorProto.INT8),
        ]
        if more:
            pads = np.zeros(2 * len(shape), np.int64)
            pads[len(shape) + axis] = more
            constant = self._constant(f"{name}_pads", pads)
            nodes.append(make_node("Pad", [halves, constant], [f"{halves}_padded"]))
        self.inserted[""] += nodes
        for product in products:
            product.input[0] = self._doubled(product.input[0], shape[axis], more, 1 if is_convolution else -1)
        for node in self.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] == name:
                node.input[0] = nodes[-1].output[0]

    def _doubled(self, value: str, count: int, more: int, axis: int) -> str:
        """The dequantized ``value`` with all that is on an axis twice, and ``more`` to fill up a kernel's block."""
        from onnx.helper import make_node

        doubled, twice = f"{value}_doubled_{axis}", f"{value}_codes_doubled_{axis}"
        if doubled not in self.doubled:
            self.doubled.add(doubled)
            dequantize = self.makers[value]
            codes = dequantize.input[0]
            if more:
                order = np.array([*range(count), *range(count), *[0] * more], np.int64)
                indices = self._constant(f"{value}_channels", order)
                double = make_node("Gather", [codes, indices], [twice], axis=axis)
            else:
                double = make_node("Concat", [codes, codes], [twice], axis=axis)
            node = make_node("DequantizeLinear", [twice, *dequantize.input[1:]], [doubled])
            self.inserted.setdefault(value, []).extend((double, node))
        return doubled

    def make_unsigned(self, name: str) -> None:
        """Store a weight as unsigned bytes, with 128 as their zero point."""
        from onnx.numpy_helper import from_array, to_array

        codes = to_array(self.stored[name])
        self.stored[name].CopyFrom(from_array(codes.view(np.uint8) ^ np.uint8(128), name))
        self.signed.discard(name)
        for number, node in enumerate(self.graph.node):
            if node.op_type == "DequantizeLinear" and node.input[0] == name:
                zero = to_array(self.stored[node.input[2]])
                node.input[2] = self._constant(f"{name}_zero_{number}", np.full(zero.shape, 128, np.uint8))
                kept = [entry for entry in node.metadata_props if entry.key not in (WEIGHT_BITS, WEIGHT_SHIFT)]
                del node.metadata_props[:]  # Stored in fewer bits, they would come back as signed bytes.
                node.metadata_props.extend(kept)

    def _constant(self, name: str, value: Any) -> str:
        from onnx.numpy_helper import from_array

        if name not in self.stored:
            self.stored[name] = self.graph.initializer.add()
            self.stored[name].CopyFrom(from_array(value, name))
        return name
