"""Graphs with products of bytes, for the proof that they are exact."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array

from gaqat_optim.deploy.onnx_export.byte_ranges import ByteRanges

SHAPES = {"u": TensorProto.UINT8, "s": TensorProto.INT8}


def product(kind, first, second, *, clip=None, weight=None):
    """A graph with one product of bytes of the types ``first`` and ``second``, ``"u"`` or ``"s"``.

    The second operand is dynamic without a ``weight``, a constant with one.
    """
    constants, nodes = [], []

    def constant(name, value):
        constants.append(from_array(value, name))
        return name

    inputs = [helper.make_tensor_value_info("a", SHAPES[first], [4, 6])]
    b = "b"
    if weight is None:
        inputs.append(helper.make_tensor_value_info("b", SHAPES[second], [6, 5]))
    else:
        constant("b", weight)
    a = "a"
    types = {"u": np.uint8, "s": np.int8}
    if clip is not None:
        bounds = [constant(f"bound{i}", np.array(v, types[first])) for i, v in enumerate(clip)]
        nodes.append(helper.make_node("Clip", ["a", *bounds], ["clipped"]))
        a = "clipped"
    scale = constant("scale", np.array(0.1, np.float32))
    zeros = [constant(f"zero_{i}", np.array(0, types[t])) for i, t in enumerate((first, second))]
    if kind == "QDQ":
        nodes.append(helper.make_node("DequantizeLinear", [a, scale, zeros[0]], ["af"]))
        nodes.append(helper.make_node("DequantizeLinear", [b, scale, zeros[1]], ["bf"]))
        nodes.append(helper.make_node("MatMul", ["af", "bf"], ["y"], name="p"))
    elif kind == "MatMulInteger":
        nodes.append(helper.make_node("MatMulInteger", [a, b, *zeros], ["y"], name="p"))
    elif kind == "QLinearMatMul":
        operands = [a, scale, zeros[0], b, scale, zeros[1], scale, zeros[0]]
        nodes.append(helper.make_node("QLinearMatMul", operands, ["y"], name="p"))
    else:
        operands = [a, b, scale, scale, *zeros]
        nodes.append(helper.make_node("MatMulIntegerToFloat", operands, ["y"], name="p", domain="com.microsoft"))
    outputs = [onnx.ValueInfoProto(name="y")]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def constant_of(proto, name):
    """The bytes of a weight, computed if operators make them."""
    graph = ir.from_proto(proto).graph
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return ByteRanges(graph).constant(next(value for value in values if value.name == name))


def with_signed_weights(path, target):
    """The file with its 8-bit weights as signed bytes that are read as they are: how files were written before."""
    proto = onnx.load(path)
    graph = proto.graph
    stored = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for product in graph.node:
        if product.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        x, weight = (makers[product.input[i]] for i in (0, 1))
        codes = constant_of(proto, weight.input[0])
        if codes.dtype == np.uint8:
            zero = to_array(stored[weight.input[2]])
            stored[weight.input[0]].CopyFrom(from_array((codes ^ 128).view(np.int8), weight.input[0]))
            stored[weight.input[2]].CopyFrom(from_array(np.zeros(zero.shape, np.int8), weight.input[2]))
        elif makers[x.input[0]].op_type in ("Concat", "Gather"):
            name = weight.input[0]
            while name not in stored:
                name = makers[name].input[0]
            weight.input[0] = name
            x.input[0] = makers[x.input[0]].input[0]
    onnx.save(proto, target)
    return proto
