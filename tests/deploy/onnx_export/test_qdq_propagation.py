"""Quantization moved up and dequantization moved down a graph: the same codes and outputs, to the bit."""

import tempfile
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gaqat_optim.deploy.onnx_export.qdq_propagation import propagate_qdq
from gaqat_optim.deploy.qdq import quantize_clip_dequantize
from quant.lsq.cases import BITS_AND_ZERO_POINTS


class Net(nn.Module):
    """``before``, a quantizer, ``after``; constants of their own, so that nothing is merged."""

    def __init__(self, before, after, bits, zero_point, scale):
        super().__init__()
        self.before, self.after, self.bits, self.zero_point = before, after, bits, zero_point
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        y = self.before(x)
        return self.after(quantize_clip_dequantize(y, self.scale, self.bits, self.zero_point, "q"))


def graph_of(net, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter about itself
        return _exported(net, x)


def _exported(net, x):
    program = torch.onnx.export(
        net.eval(), (x,), dynamo=True, verbose=False, opset_version=21, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    return program.model_proto


def moved(proto):
    model = ir.from_proto(proto)
    propagate_qdq(model.graph)
    result = ir.to_proto(model)
    del result.graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    return result


def kinds(proto):
    """The operators on values, without those of torch 2.8 that compute a shape for a Reshape."""
    nodes = proto.graph.node
    shapes = {node.input[1] for node in nodes if node.op_type == "Reshape"}
    return [node.op_type for node in nodes if node.op_type != "Shape" and node.output[0] not in shapes]


def outputs(proto, x, *, codes=False):
    """The graph's outputs, run as it is written; with ``codes``, those of the quantizer as well."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    if codes:
        for node in exposed.graph.node:
            if any(entry.key == "gaqat.quantizer" for entry in node.metadata_props):
                exposed.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return run.run(None, {proto.graph.input[0].name: x.numpy()})


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


LIMIT = torch.tensor(0.52)
BEFORE = {
    "relu": (F.relu, ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "relu6": (F.relu6, ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "clip with a lower bound": (lambda x: x.clamp(min=-0.7), ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "clip": (lambda x: F.hardtanh(x, -0.31, 0.52), ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "minimum": (lambda x: torch.minimum(x, LIMIT), ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "minimum of a channel": (
        lambda x: torch.minimum(x, LIMIT * torch.ones(4, 1, 1)),
        ["Min", "QuantizeLinear", "Clip", "DequantizeLinear"],
    ),
    "minimum of two": (
        lambda x: torch.minimum(x, x.sigmoid()),
        ["Sigmoid", "Min", "QuantizeLinear", "Clip", "DequantizeLinear"],
    ),
    "max pooling": (lambda x: F.max_pool2d(x, 3, 2, 1), ["QuantizeLinear", "Clip", "MaxPool", "DequantizeLinear"]),
    "relu and pooling": (
        lambda x: F.max_pool2d(F.relu(x), 2).flatten(1),
        ["QuantizeLinear", "Clip", "MaxPool", "Reshape", "DequantizeLinear"],
    ),
    "transpose": (lambda x: x.permute(0, 2, 3, 1), ["QuantizeLinear", "Clip", "Transpose", "DequantizeLinear"]),
    "concatenation": (
        lambda x: torch.cat([x.sigmoid(), x.tanh()], 1),
        ["Sigmoid", "Tanh", *["QuantizeLinear", "Clip"] * 2, "Concat", "DequantizeLinear"],
    ),
    "the same twice": (lambda x: torch.cat([x, x], 1), ["QuantizeLinear", "Clip", "Concat", "DequantizeLinear"]),
    "nothing to move across": (torch.sigmoid, ["Sigmoid", "QuantizeLinear", "Clip", "DequantizeLinear"]),
}


@pytest.mark.cover("values")
@pytest.mark.parametrize("zero_point", [0, 3, 8])
@pytest.mark.parametrize("case", BEFORE)
def test_quantization_goes_up(case, zero_point):
    """On a grid that has all ties, values beyond the range, and infinities."""
    function, expected = BEFORE[case]
    scale = 0.0625
    steps = torch.arange(-72, 72).float() * scale / 2
    x = torch.cat([steps[torch.randperm(144)], torch.tensor([-1e30, 1e30, -np.inf, np.inf])])[:144].reshape(1, 4, 6, 6)
    x = torch.cat([x, 40 * x, torch.rand(1, 4, 6, 6) - 0.5])
    proto = graph_of(Net(Call(function), nn.Identity(), 4, zero_point, scale), x)
    result = moved(proto)
    assert sorted(kinds(result)) == sorted(expected)
    for a, b in zip(outputs(proto, x, codes=True), outputs(result, x, codes=True), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("bits", [2, 7, 8])
def test_codes_of_any_bits_get_the_bounds_of_a_relu6(bits):
    x = 4 * torch.randn(5, 3, 4, 4)
    for zero_point in (0, 1, 2 ** (bits - 1)):
        proto = graph_of(Net(nn.ReLU6(), nn.Identity(), bits, zero_point, 0.11), x)
        result = moved(proto)
        assert kinds(result) == ["QuantizeLinear", "Clip", "DequantizeLinear"]
        for a, b in zip(outputs(proto, x, codes=True), outputs(result, x, codes=True), strict=True):
            assert np.array_equal(a, b)


def test_a_relu_before_unsigned_codes_of_8_bits_needs_no_clip():
    x = torch.randn(5, 3)
    result = moved(graph_of(Net(nn.ReLU(), nn.Identity(), 8, 0, 0.01), x))
    assert kinds(result) == ["QuantizeLinear", "DequantizeLinear"]


AFTER = {
    "relu": (0, F.relu, ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "relu of signed codes": (8, F.relu, ["QuantizeLinear", "Clip", "DequantizeLinear", "Relu"]),
    "max pooling": (8, lambda x: F.max_pool2d(x, 2), ["QuantizeLinear", "Clip", "MaxPool", "DequantizeLinear"]),
    "reshape": (3, lambda x: x.flatten(1), ["QuantizeLinear", "Clip", "Reshape", "DequantizeLinear"]),
    "two users": (
        8,
        lambda x: (x.flatten(1), x + 1),
        ["QuantizeLinear", "Clip", "DequantizeLinear", "Reshape", "Add"],
    ),
}


@pytest.mark.parametrize("case", AFTER)
def test_dequantization_goes_down(case):
    zero_point, function, expected = AFTER[case]
    x = torch.randn(4, 3, 6, 6)
    proto = graph_of(Net(nn.Identity(), Call(function), 4, zero_point, 0.13), x)
    result = moved(proto)
    assert sorted(kinds(result)) == sorted(expected)
    for a, b in zip(outputs(proto, x), outputs(result, x), strict=True):
        assert np.array_equal(a, b)


def test_a_sum_for_two_quantizers_is_two_sums_on_integers():
    class Sum(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.relu = relu

        def forward(self, x):
            a = quantize_clip_dequantize(x.tanh(), torch.tensor(0.01), 8, 128, "a")
            y = a + quantize_clip_dequantize(x.sin(), torch.tensor(0.02), 8, 101, "b")
            y = F.relu(y) if self.relu else y
            q = quantize_clip_dequantize(y, torch.tensor(0.1), 4, 3, "q")
            return q, quantize_clip_dequantize(y, torch.tensor(0.3), 3, 4, "r")

    x = torch.randn(4, 3, 5, 5)
    for relu in (False, True):
        proto = graph_of(Sum(relu), x)
        result = moved(proto)
        assert kinds(proto).count("Add") == 1
        assert kinds(result).count("Add") == 2
        assert kinds(result).count("Relu") == 0
        for a, b in zip(outputs(proto, x, codes=True), outputs(result, x, codes=True), strict=True):
            assert np.array_equal(a, b)
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath = file.name
            options.log_severity_level = 3
            onnxruntime.InferenceSession(result.SerializeToString(), options, providers=["CPUExecutionProvider"])
            assert kinds(onnx.load(file.name)).count("QLinearAdd") == 2


def test_a_value_that_something_else_uses_stays():
    class Two(nn.Module):
        def forward(self, x):
            y = F.relu(x)
            return quantize_clip_dequantize(y, torch.tensor(0.1), 4, 8, "q"), y.exp()

    class Output(nn.Module):
        def forward(self, x):
            y = F.relu(x)
            return quantize_clip_dequantize(y, torch.tensor(0.1), 4, 8, "q"), y

    x = torch.randn(4, 3)
    for net in (Two(), Output()):
        proto = graph_of(net, x)
        result = moved(proto)
        assert kinds(result) == kinds(proto)
        for a, b in zip(outputs(proto, x), outputs(result, x), strict=True):
            assert np.array_equal(a, b)


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(["relu", "relu6", "pool", "flat", "cat", "transpose"]), max_size=5),
    st.lists(st.sampled_from(["relu", "pool", "transpose", "cat"]), max_size=3),
    BITS_AND_ZERO_POINTS,
    st.integers(0, 2**31),
)
def test_any_chain(before, after, code, seed):
    steps = {
        "relu": F.relu,
        "relu6": F.relu6,
        "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
        "flat": lambda x: x.flatten(2).unflatten(2, (6, 6)),
        "cat": lambda x: torch.cat([x, F.relu(x), x], 1),
        "transpose": lambda x: x.transpose(2, 3),
    }

    def chain(names):
        return nn.Sequential(*(Call(steps[name]) for name in names))

    generator = torch.Generator().manual_seed(seed)
    x = 5 * torch.randn(3, 2, 6, 6, generator=generator)
    proto = graph_of(Net(chain(before), chain(after), *code, 0.17), x)
    result = moved(proto)
    for a, b in zip(outputs(proto, x), outputs(result, x), strict=True):
        assert np.array_equal(a, b)
