"""Convolutions, deployed, most of all transposed ones: loops over integers, the trained layer, and onnxruntime."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploy import deploy_oracle as oracle
from deploy.deploy_networks import close, quantized, randomize_norms, run
from deploy.nn.layer_networks import NORMS, TRANSPOSED, UNet, chain
from deploy.onnx_runs import LEVELS, NEEDS_OPSET_23, STAYS_IN_FLOAT, predicts_the_same
from deploy.onnx_runs import run as run_onnx
from gaqat_optim import QuantConfig, export_onnx
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.conv import DeployConvTranspose
from gaqat_optim.deploy.onnx_export.verification import compare, out_of_range_inputs

# What these networks leave in floating point, and traced or not, is the business of other tests.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}"),
    pytest.mark.filterwarnings("ignore:.*cannot be traced symbolically"),
]

SAME = QuantConfig(4, 4, first_last_bits="same")


# -- loops over integers -----------------------------------------------------------------------------------------------


def weight_codes(layer):
    """The codes in the layout of the weight, with scale number g * (outputs per group) + o for [i, o] of group g."""
    weight, quantizer = layer.weight.detach().numpy(), layer.weight_quantizer
    scale = quantizer.scale.detach().numpy() * np.ones(layer.out_channels, dtype=np.float32)
    codes = np.zeros(weight.shape, dtype=np.int64)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for i, o in np.ndindex(weight.shape[:2]):
        ratio = weight[i, o] / scale[i // inputs * outputs + o]
        codes[i, o] = np.rint(np.clip(ratio, quantizer.qmin, quantizer.qmax))
    return codes


def total(layer, a, q, output_padding):
    """Every input times every weight, added where it lands; then the padding is cut off."""
    kernel, stride, dilation, groups = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    outputs = q.shape[1]
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(a.shape[2:], stride, dilation, kernel, strict=True)]
    y = np.zeros((len(a), outputs * groups, *(n + extra for n, extra in zip(full, output_padding, strict=True))), int)
    for i in range(a.shape[1]):
        first = i // (a.shape[1] // groups) * outputs
        for place in itertools.product(*map(range, a.shape[2:])):
            for offset in itertools.product(*map(range, kernel)):
                where = tuple(p * s + o * d for p, s, o, d in zip(place, stride, offset, dilation, strict=True))
                y[(slice(None), slice(first, first + outputs), *where)] += np.outer(
                    a[(slice(None), i, *place)], q[(i, slice(None), *offset)]
                )
    return y[(slice(None), slice(None), *(slice(p, n - p) for p, n in zip(layer.padding, y.shape[2:], strict=True)))]


def expected_output(layer, norm, x, output_padding):
    channels = layer.out_channels
    scale = layer.weight_quantizer.scale.detach().double().numpy() * np.ones(channels)
    bias = np.zeros(channels) if layer.bias is None else layer.bias.detach().double().numpy()
    has_bias = layer.bias is not None or norm is not None
    if norm is not None:
        gain = 1 / np.sqrt(norm.running_var.double().numpy() + norm.eps)
        gain = gain if norm.weight is None else gain * norm.weight.detach().double().numpy()
        shift = 0.0 if norm.bias is None else norm.bias.detach().double().numpy()
        scale, bias = scale * gain, shift + (bias - norm.running_mean.double().numpy()) * gain
    k = oracle.spare_bits(layer) if has_bias else 0
    accumulator_scale = layer.input_quantizer.scale.detach().numpy().reshape(()) * (
        scale.astype(np.float32) / np.float32(2**k)
    )
    bias_codes = (
        np.rint(bias / accumulator_scale.astype(np.float64)).astype(np.int64) if has_bias else np.zeros(channels, int)
    )
    sums = total(layer, oracle.input_codes(layer, x), weight_codes(layer), output_padding) * 2**k
    along = (-1, *[1] * (x.dim() - 2))
    return (sums + bias_codes.reshape(along)).astype(np.float32) * accumulator_scale.reshape(along)


@st.composite
def layers(draw):
    """A layer and perhaps a BatchNorm, quantized; and an input far beyond the clipping range."""
    spatial, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**16))
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    stride, dilation, kernel = (draw(st.integers(1, high)) for high in (3, 2, 3))
    padding = draw(st.integers(0, (dilation * (kernel - 1)) // 2))
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    torch.manual_seed(seed)
    layer = TRANSPOSED[spatial](inputs, outputs, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation)
    modules = [layer]
    if draw(st.booleans()):
        modules.append(NORMS[spatial](outputs, affine=draw(st.booleans())))
    config = QuantConfig(
        draw(st.integers(2, 8)),
        draw(st.integers(2, 8)),
        weight_granularity=draw(st.sampled_from(["channel", "tensor"])),
        activation_signed=draw(st.booleans()),
        first_last_bits="same",
    )
    shape = (inputs, *[draw(st.integers(1, 3)) for _ in range(spatial)])
    model = randomize_norms(quantized(nn.Sequential(*modules), torch.randn(8, *shape), config), seed)
    return model, 3 * torch.randn(2, *shape)


@given(layers())
def test_a_layer_is_the_integer_computation_to_the_bit(case):
    model, x = case
    layer, norm = model[0], model[1] if len(model) == 2 else None
    deployed = convert(model)
    expected = expected_output(layer, norm, x, layer.output_padding)
    assert np.array_equal(run(deployed, x).numpy(), expected)
    assert type(deployed[0]) is DeployConvTranspose
    assert np.array_equal(deployed[0].codes.numpy(), weight_codes(layer) << deployed[0].shift)
    assert deployed[0].codes.is_contiguous()
    assert norm is None or type(deployed[1]) is nn.Identity
    # The float form of the operands, which a weight-only layer computes with, is that of the codes.
    values = deployed[0].channels_first(deployed[0].codes).double() * deployed[0].weight_scale.double().reshape(
        -1, *[1] * (x.dim() - 1)
    )
    assert torch.allclose(deployed[0].channels_first(deployed[0].weight).double(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("groups", [1, 3])
def test_the_bias_rounding_is_the_only_difference_from_the_trained_layer(bits, groups):
    """At most half a step, beside the last bits of a float32 sum; none at all without a bias."""
    torch.manual_seed(bits)
    x = torch.rand(4, 3, 5, 4)
    for bias in (True, False):
        layer = quantized(
            nn.ConvTranspose2d(3, 9, 3, 2, 1, 1, groups, bias), x, QuantConfig(bits, bits, first_last_bits="same")
        )
        deployed = convert(layer)
        difference = (run(deployed, 3 * x) - run(layer, 3 * x)).abs()
        half = 0.5 * deployed.accumulator_scale.reshape(-1, 1, 1) if bias else 0.0
        assert bool((difference <= half + 1e-6).all())
        assert (difference.max() > 1e-5) == bias or bits > 5


@pytest.mark.parametrize("kinds", [(4, None, None), (None, 4, None), (4, None, 6), (None, 4, 6), (None, None, 6)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_part_in_floating_point(kinds, groups):
    weight, activation, output = kinds
    torch.manual_seed(0)
    x = torch.rand(8, 4, 3, 3)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=groups), nn.BatchNorm2d(6))
    model = randomize_norms(
        quantized(model, x, QuantConfig(weight, activation, output_bits=output, first_last_bits="same"))
    )
    deployed = convert(model)
    assert deployed[0].bias_codes is None
    assert type(deployed[1]) is nn.Identity
    assert torch.allclose(run(deployed, x), run(model, x), atol=1e-5 if output is None else 1e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_gammas_of_either_sign_zero_and_none(groups):
    torch.manual_seed(0)
    x = torch.rand(8, 4, 5, 5)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=groups, bias=False), nn.BatchNorm2d(6))
    randomize_norms(model)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1e-42, -2.0, 0.5]))
    model = quantized(model, x, QuantConfig(8, 8))
    deployed = convert(model)
    assert type(deployed[1]) is nn.Identity
    assert (deployed[0].weight_scale < 0).tolist() == [False, True, False, False, True, False]
    assert deployed[0].channels_first(deployed[0].codes).flatten(1).any(1).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    y, z = run(model, x), run(deployed, x)
    assert (y - z).abs().max() <= 1e-3 * y.abs().max()
    assert torch.allclose(z[:, 2], model[1].bias[2].expand_as(z[:, 2]), rtol=1e-6)


def test_a_batchnorm_of_inputs_is_not_taken_for_one_of_outputs():
    """Groups make the weight's axes differ from the channels: (6, 2) for 6 inputs and 4 outputs in two groups."""
    x = torch.rand(8, 6, 4)
    model = quantized(nn.Sequential(nn.ConvTranspose1d(6, 4, 2, groups=2), nn.BatchNorm1d(4)), x)
    assert type(convert(model)[1]) is nn.Identity


# -- the size of the output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [[9, 7], [10, 7], [9, 8], [10, 8], [2, 5, 10, 8]])
def test_an_output_size_for_this_call(size):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 5, 4)
    layer = quantized(nn.ConvTranspose2d(3, 5, 3, 2, 1, bias=False), x)
    y = run(convert(layer), x, output_size=size)
    assert y.shape[2:] == tuple(size[-2:])
    extra = (size[-2] - 9, size[-1] - 7)
    assert np.array_equal(y.numpy(), expected_output(layer, None, x, extra))
    assert torch.allclose(y, run(layer, x, output_size=size), atol=1e-5)


def test_an_output_size_out_of_reach_is_named():
    x = torch.rand(2, 3, 5, 4)
    deployed = convert(quantized(nn.ConvTranspose2d(3, 4, 3, 2, 1), x))
    with pytest.raises(ValueError, match=r"requested an output size of \[11, 8\], but valid sizes range"):
        deployed(x, output_size=[11, 8])


# -- in onnxruntime --------------------------------------------------------------------------------------------------


NETWORKS = {
    "unet": lambda: (UNet(), torch.randn(33, 3, 9, 8)),
    "unet, groups": lambda: (UNet(groups=3), torch.randn(33, 3, 9, 7)),
    "1d": lambda: (chain(1, 1), torch.randn(33, 1, 6)),
    "1d, groups": lambda: (chain(1, 3), torch.randn(33, 1, 6)),
    "3d": lambda: (chain(3, 1), torch.randn(33, 1, 3, 2, 3)),
    "3d, groups": lambda: (chain(3, 2), torch.randn(33, 1, 3, 2, 3)),
}


def exported(name, config, path):
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model = quantized(randomize_norms(model), x, config)
    return model, x, export_onnx(model, x[:4], path)


# `make test` has each number of axes, with and without groups, and each number of bits.
OF_EACH = {"unet": 4, "1d, groups": 2, "3d": 8}
REST = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("unet", 2), ("unet", 8), ("unet, groups", 3), ("1d", 3), ("3d, groups", 3))
]


@pytest.mark.parametrize(("name", "bits"), [*OF_EACH.items(), *REST])
def test_onnxruntime_computes_what_convert_says(name, bits, tmp_path):
    """Also far out of range; a code can differ where a sum lies within rounding of a tie.

    onnxruntime adds up float32 products in an order of its own, so outputs are compared to a part in 1e5.
    """
    config = QuantConfig(bits, bits, first_last_bits="same", activation_signed="auto")
    model, x, report = exported(name, config, tmp_path / "net.onnx")
    print(report)
    deployed, proto = convert(model), onnx.load(tmp_path / "net.onnx")
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in deployed.modules())
    assert report.integer_kernels["QLinearConv"] >= 1
    assert report.float_kernels["ConvTranspose"] == 2  # There is no integer kernel for it.
    for optimized in (False, True):
        result = compare(deployed, proto, [*out_of_range_inputs(x), (x[:33],), (-50 * x[:33],)], optimized=optimized)
        assert predicts_the_same(result)
        assert result.code_flip_rate <= 1e-3
    for level, batch, factor in itertools.product(LEVELS, (1, 33), (1, -50)):
        inputs = factor * x[:batch]
        y, z = run(deployed, inputs), run_onnx(tmp_path / "net.onnx", inputs, level)
        assert y.shape == z.shape
        flipped = result.code_flip_rate > 0
        assert (y - z).abs().max() <= (0.1 if flipped else 1e-5) * y.abs().max()
    assert (run(deployed, -50 * x) - run(deployed, x)).abs().max() > 1e-2


FLOATING = {
    "no weight bits": (QuantConfig(None, 4, first_last_bits="same"), 3),
    "no activation bits": (QuantConfig(4, None, first_last_bits="same"), 0),
    "excluded": (QuantConfig(4, 4, output_bits=8, exclude=("1",)), 1),
}


@pytest.mark.cover("values")
@pytest.mark.parametrize("case", FLOATING)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_in_floating_point_stays_there(groups, case, tmp_path):
    """Onnxruntime quantizes such a weight of its own accord where a DequantizeLinear leads to it."""
    torch.manual_seed(0)
    config, spelled_out = FLOATING[case]
    x = torch.randn(16, 3, 5, 5)
    layers = [nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3, 2, groups=groups), nn.ReLU(), nn.Conv2d(4, 3, 1)]
    report = export_onnx(quantized(nn.Sequential(*layers), x, config), x, tmp_path / "net.onnx")
    assert report.code_flip_rate <= 1e-3
    assert report.max_abs_diff <= 1e-4
    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert operators.count("Sub") - operators.count("Div") == spelled_out  # A Div is of the halves of an 8-bit weight.


@pytest.mark.parametrize("name", ["unet, groups", pytest.param("unet", marks=pytest.mark.slow)])
def test_the_file_has_the_codes_in_the_layout_of_the_operator(name, tmp_path):
    model, _, _ = exported(name, SAME, tmp_path / "net.onnx")
    deployed, graph = convert(model), onnx.load(tmp_path / "net.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    layers = [deployed.up, deployed.head]
    nodes = [node for node in graph.node if node.op_type == "ConvTranspose"]
    for slot, layer, node in zip(("up", "head"), layers, nodes, strict=True):
        codes = stored[f"{slot}.codes"]
        assert codes.data_type == onnx.TensorProto.INT4
        actual = onnx.numpy_helper.to_array(codes).astype(np.int8)
        assert actual.shape == tuple({"up": model.up, "head": model.head}[slot].weight.shape)
        assert np.array_equal(actual, layer.codes.numpy() >> layer.shift)
        bias = makers[node.input[2]]
        assert bias.op_type == "DequantizeLinear"
        assert stored[bias.input[0]].data_type == onnx.TensorProto.INT32
        weight = makers[node.input[1]]
        if layer.groups == 1:
            assert weight.op_type == "DequantizeLinear"
            assert {a.name: a.i for a in weight.attribute}["axis"] == 1
        else:
            assert weight.op_type == "Reshape"
            assert makers[weight.input[0]].op_type == "Mul"


@pytest.mark.parametrize(("groups", "opset"), [(1, 21), pytest.param(3, 23, marks=NEEDS_OPSET_23)])
def test_a_network_of_one_transposed_convolution_and_later_opsets(groups, opset, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 5, 4)
    model = quantized(nn.ConvTranspose2d(3, 3, 3, 2, groups=groups), x, QuantConfig(5, 5))
    report = export_onnx(model, x, tmp_path / "net.onnx", opset=opset, storage="int8")
    assert (report.code_flip_rate, report.integer_kernels) == (0.0, {})
    assert report.max_abs_diff <= 1e-6


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding(mode, padding):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode), nn.BatchNorm2d(4))
    model = quantized(model, x, QuantConfig(8, 8))
    assert torch.allclose(run(convert(model), x), run(model, x), atol=1e-2)


def test_an_input_without_a_batch():
    torch.manual_seed(0)
    model = quantized(nn.Conv2d(3, 4, 3), torch.rand(8, 3, 6, 6), QuantConfig(8, 8))
    x = torch.rand(3, 6, 6)
    assert run(convert(model), x).shape == run(model, x).shape
    assert close(run(model, x), run(convert(model), x))
