"""The operators that deployed layers write of themselves."""

from collections import Counter

import numpy as np
import onnx

from deploy.deploy_networks import images, trained
from gaqat_optim import QuantConfig, export_onnx


def test_the_graph_has_what_integer_kernels_need(tmp_path):
    path = export_onnx(trained("resnet", QuantConfig(3, 3)), images(8), tmp_path / "net.onnx", check=False).path
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 21}
    counts = Counter(node.op_type for node in proto.graph.node)
    # Six convolutions and the head; the stem's input and the head's have 8 bits, and so no Clip.
    assert counts["Clip"] == counts["QuantizeLinear"] - 2 == 5
    # Two make INT8 of INT4, and two the halves of the head's weight, which has 8 bits.
    assert counts["Cast"] == 2 * 5 + 2
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    computed = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3
            zero_point = node.input[2]
            if zero_point in stored:
                assert (stored[zero_point] == (128 if node.input[0] == "stem.0.codes" else 0)).all()
            else:  # a bias minus itself
                assert computed[zero_point].op_type == "Sub"
                assert computed[zero_point].input[0] == computed[zero_point].input[1]
        if node.op_type == "Clip":
            low, high = stored[node.input[1]], stored[node.input[2]]
            assert (low.dtype, int(low), int(high)) == (np.uint8, 0, 7)
