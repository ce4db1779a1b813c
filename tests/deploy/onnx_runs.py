"""What the tests of exported files share: quantized networks, and runs of a file in onnxruntime."""

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from deploy.deploy_networks import randomize_norms
from gaqat_optim import QuantConfig, export_onnx, quantize_model
from gaqat_optim.deploy.onnx_export.disagreement import wrong_products
from gaqat_optim.deploy.onnx_export.operators import array_of, store
from gaqat_optim.deploy.onnx_export.saturation import saturating_products

# A convolution that feeds an addition, a pooling or the output is in floating point unless its output is quantized.
STAYS_IN_FLOAT = "Layers with integer weight and input that onnxruntime runs in floating point"
NOT_THE_SAME = "onnxruntime does not compute the same as convert"
STORAGES = ("auto", "int8", "packed")
W4A4 = QuantConfig(4, 4, first_last_bits="same")
LEVELS = {
    "as written": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimized": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
NEEDS_RIGHT_PRODUCTS = pytest.mark.skipif(
    wrong_products() is not None, reason="this onnxruntime multiplies bytes wrongly on this processor"
)
NEEDS_OPSET_23 = pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx has no opset 23")


def quantized(model, x, config=W4A4):
    torch.manual_seed(0)
    return quantize_model(randomize_norms(model), config, calibration=x).eval()


def session(path, level="optimized"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, x, level="optimized"):
    return torch.from_numpy(session(path, level).run(None, {"input": x.numpy()})[0])


def predicts_the_same(result):
    """Whether a report or a comparison has all predictions in common, or 99 % where a code differs.

    A code differs where a sum lies within rounding of a tie, which is another one on each processor, and can change a
    prediction.
    """
    same = result.top1_agreement >= (0.99 if result.code_flip_rate else 1)
    if getattr(result, "top1_agreement_unoptimized", None) is None:
        return same
    return same and result.top1_agreement_unoptimized >= (0.99 if result.code_flip_rate_unoptimized else 1)


def saturating(proto):
    """The products of a graph that are not proven to be exact."""
    return saturating_products(ir.from_proto(proto).graph)


def run_torch(model, x):
    with torch.no_grad():
        return model(x)


def export_with_warnings(model, x, path):
    """The report, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = export_onnx(model, x, path)
    return report, [str(warning.message) for warning in caught]


def damage_graph(graph, damage):
    """Make the graph of a residual network at W3A3 compute something else."""
    if damage == "no clip":
        for node in graph:
            if node.op_type == "Clip":
                node.resize_inputs(1)
    elif damage == "other scale":
        scale = graph.initializers["blocks.0.conv1.input_quantizer.scale"]
        store(scale, array_of(scale) * np.float32(1.02))
    else:
        weight = graph.initializers["blocks.0.conv2.codes"]
        codes = array_of(weight).astype(np.int8)
        codes.flat[0] ^= 1
        store(weight, codes, int4=True)
