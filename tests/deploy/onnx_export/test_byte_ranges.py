"""What bytes the values of a graph can be."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from gaqat_optim.deploy.onnx_export.byte_ranges import ByteRange, ByteRanges

CONSTANTS = {
    "scale": np.array(0.5, np.float32),
    "zero": np.array(128, np.uint8),
    "low": np.array(3, np.uint8),
    "high": np.array(90, np.uint8),
    "weight": np.array([[-5, 2], [7, 1]], np.int8),
    "pads": np.array([0, 1, 0, 1], np.int64),
}
OPERATORS = {
    "quantized": ("QuantizeLinear", ["x", "scale", "zero"], ByteRange(0, 255, False)),
    "signed by its attribute": ("QuantizeLinear", ["x", "scale"], ByteRange(-128, 127, True)),
    "clipped": ("Clip", ["u", "low", "high"], ByteRange(3, 90, False)),
    "clipped below": ("Clip", ["u", "low"], ByteRange(3, 255, False)),
    "moved": ("Transpose", ["s"], ByteRange(-128, 127, True)),
    "two types": ("Concat", ["u", "s"], None),
    "padded with zeros": ("Pad", ["weight", "pads"], ByteRange(-5, 7, True)),
    "floats": ("Relu", ["x"], None),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_the_range_of_an_operators_result(case):
    op_type, inputs, expected = OPERATORS[case]
    attributes = {"axis": 0} if op_type == "Concat" else {}
    if len(inputs) == 2 and op_type == "QuantizeLinear":
        attributes["output_dtype"] = TensorProto.INT8
    types = {"x": TensorProto.FLOAT, "u": TensorProto.UINT8, "s": TensorProto.INT8}
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, ["y"], **attributes)],
        "graph",
        [helper.make_tensor_value_info(name, kind, [2, 2]) for name, kind in types.items()],
        [onnx.ValueInfoProto(name="y")],
        [from_array(value, name) for name, value in CONSTANTS.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    (y,) = model.graph.outputs
    assert ByteRanges(model.graph).range(y) == expected


@pytest.mark.parametrize(("offset", "sums"), [(0, (-9, 12)), (128, (-265, 0))])
def test_sums_of_two_codes_of_a_channel(offset, sums):
    """Of one channel each: -9 are -5 and -4, 12 are 7 and 5; a zero beside them counts as a neighbour."""
    codes = np.array([[-5, -4, 1], [7, 5, 0]], np.int8)
    assert ByteRange(-5, 7, True, codes).pair_sums(offset) == sums
    assert ByteRange(-5, 7, True).pair_sums(0) == (-10, 14)


def test_what_a_runtimes_own_operator_makes_of_constants_is_no_constant():
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["weight"], ["moved"]),
            helper.make_node("QGemm", ["weight"], ["y"], domain="com.microsoft"),
            helper.make_node("Transpose", ["y"], ["z"]),
        ],
        "graph",
        [],
        [helper.make_tensor_value_info(name, TensorProto.INT8, [2, 2]) for name in ("moved", "z")],
        [from_array(CONSTANTS["weight"], "weight")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    moved, z = model.graph.outputs
    ranges = ByteRanges(model.graph)
    assert ranges.range(moved) == ByteRange(-5, 7, True)
    assert ranges.range(z) is None
