"""What the tests of exported files share: quantized networks, and runs of a file in onnxruntime."""

import onnx
import onnxruntime
import pytest
import torch

from deploy.deploy_networks import randomize_norms
from gaqat_optim import QuantConfig, quantize_model

# A convolution that feeds an addition, a pooling or the output is in floating point unless its output is quantized.
STAYS_IN_FLOAT = "Layers with integer weight and input that onnxruntime runs in floating point"
W4A4 = QuantConfig(4, 4, first_last_bits="same")
LEVELS = {
    "as written": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimized": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
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


def run_torch(model, x):
    with torch.no_grad():
        return model(x)
