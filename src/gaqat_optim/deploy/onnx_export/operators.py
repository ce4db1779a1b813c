"""What the passes share: the operators that they know, and how they read and extend a graph of onnx_ir.

New operators go to the end of a graph. A pass that adds any calls ``graph.sort()`` before it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

# Products of activations with a weight.
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Operators that only move values, which onnxruntime moves a DequantizeLinear across.
MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}


def operand(node: ir.Node, position: int) -> ir.Value:
    """The input of a node at ``position``, which must be there."""
    value = node.inputs[position]
    assert value is not None
    return value


def producer(value: ir.Value) -> ir.Node:
    """The node that makes a value, which must be there."""
    node = value.producer()
    assert node is not None
    return node


def producer_type(value: ir.Value | None) -> str:
    """The type of the operator that makes a value, ``""`` for inputs and initializers."""
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


def skip_moves(node: ir.Node, position: int) -> tuple[ir.Node, ir.Value]:
    """The value that an input comes from, before operators that only move it, and the node that reads it there."""
    value = operand(node, position)
    while producer_type(value) in MOVES:
        node = producer(value)
        value = operand(node, 0)
    return node, value


def array_of(value: ir.Value) -> NDArray[Any]:
    """The array of an initializer."""
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def add(op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
    """Add an operator to the graph of its first input, and return its output."""
    import onnx_ir as ir

    assert inputs[0] is not None
    return ir.node(op_type, inputs, attributes, graph=inputs[0].graph).outputs[0]


def cast(value: ir.Value, dtype: DTypeLike) -> ir.Value:
    """Add a Cast."""
    import onnx_ir as ir

    return add("Cast", value, to=ir.DataType.from_numpy(np.dtype(dtype)))


def add_constant(graph: ir.Graph, array: NDArray[Any], name: str = "") -> ir.Value:
    """An initializer of the graph, by default one that all operators with equal short constants share."""
    import onnx_ir as ir

    name = name or f"gaqat.{array.dtype}_{'_'.join(map(str, array.reshape(-1)))}.{array.ndim}"
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.Tensor(array, name=name)))
    return graph.initializers[name]


def store(value: ir.Value, array: NDArray[Any], *, int4: bool = False) -> None:
    """Replace the array of an initializer, of integers in 4 bits if ``int4``."""
    import onnx_ir as ir

    tensor = ir.Tensor(array, dtype=ir.DataType.INT4 if int4 else None, name=value.name)
    value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape(array.shape)


def insert_after(value: ir.Value, op_type: str, *others: ir.Value | None) -> ir.Value:
    """Put an operator between a value and all that read it."""
    result = add(op_type, value, *others)
    result.type, result.shape = value.type, value.shape
    _read_instead(value, result)
    producer(result).replace_input_with(0, value)
    return result


def bypass(node: ir.Node) -> None:
    """Remove a node: what read its output reads its first input."""
    _read_instead(node.outputs[0], operand(node, 0))
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _read_instead(old: ir.Value, new: ir.Value) -> None:
    """Let all that read ``old`` read ``new``. An output of the graph keeps its name."""
    if old.is_graph_output():
        old.name, new.name = new.name, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def clip_codes(quantize: ir.Node, low: int, high: int) -> None:
    """Put a Clip behind a QuantizeLinear, and the quantizer's name on it."""
    assert quantize.graph is not None
    bounds = [add_constant(quantize.graph, np.array(bound, np.uint8)) for bound in (low, high)]
    clip = producer(insert_after(quantize.outputs[0], "Clip", *bounds))
    clip.metadata_props.update(quantize.metadata_props)
    quantize.metadata_props.clear()
