"""How the passes read and extend a graph of onnx_ir."""

import numpy as np
import onnx_ir as ir

from gaqat_optim.deploy.onnx_export.operators import add, add_constant, bypass, cast, insert_after, producer, skip_moves


def graph_with(op_type):
    """A graph ``y = op_type(x)``."""
    x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    node = ir.node(op_type, [x], outputs=[ir.val("y", ir.DataType.FLOAT, [2, 3])])
    return ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}, name="graph")


def test_an_output_keeps_its_name_behind_an_inserted_operator_and_without_a_bypassed_one():
    graph = graph_with("Relu")
    insert_after(graph.outputs[0], "Sigmoid")
    (y,) = graph.outputs
    assert (y.name, y.shape, producer(y).op_type) == ("y", [2, 3], "Sigmoid")
    bypass(producer(y))
    (y,) = graph.outputs
    assert ([node.op_type for node in graph], y.name, producer(y).op_type) == (["Relu"], "y", "Relu")


def test_equal_short_constants_are_one():
    graph = graph_with("Relu")
    same = [add_constant(graph, np.array(value, np.uint8)) for value in (7, 7)]
    others = [
        add_constant(graph, np.array(value, dtype)) for value, dtype in (([7], np.uint8), (7, np.int8), (8, "u1"))
    ]
    assert same[0] is same[1]
    assert len(graph.initializers) == len({*same, *others}) == 4


def test_moves_are_skipped_up_to_the_first_other_operator():
    graph = graph_with("Relu")
    (y,) = graph.outputs
    reshaped = add("Reshape", y, add_constant(graph, np.array([6], np.int64)))
    product = producer(add("MatMul", add("Identity", reshaped), cast(y, np.int8)))
    assert skip_moves(product, 0) == (producer(reshaped), y)
    assert skip_moves(product, 1) == (product, product.inputs[1])
