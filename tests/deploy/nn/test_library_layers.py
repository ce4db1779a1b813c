"""Layers of libraries, deployed: convert, a packed file and an ONNX file compute the same."""

import pytest
import torch

from deploy.onnx_runs import predicts_the_same
from gaqat_optim import QuantConfig, convert, export_onnx, load_packed, quantize_model, save_packed
from quant.nn.library_layers import CASES

# The others differ in how a forward pads and standardizes, not in what is exported.
IN_FILES = ("Linear", "Conv1D", "Conv2dSame", "ScaledStdConv2dSame", "BiT", "video")


def made(case):
    torch.manual_seed(0)
    network, layer, shape = CASES[case]
    model, x = network(layer()), torch.rand(shape)
    config = QuantConfig(4, 4, first_last_bits="same", output_bits=8)
    return model, quantize_model(model, config, calibration=x).eval(), x


@pytest.mark.parametrize("case", CASES)
def test_it_is_deployed(case, tmp_path):
    model, quantized, x = made(case)
    deployed = convert(quantized)
    # Beyond the rounding of the bias, which 4 shifted bits make fine.
    assert (deployed.layer(x) - quantized.layer(x)).abs().max() <= 0.01 * quantized.layer(x).abs().max()
    assert deployed.layer.is_integer
    save_packed(quantized, tmp_path / "net.packed")
    for source in (model, quantized):
        assert torch.equal(load_packed(source, tmp_path / "net.packed")(x), deployed(x))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in IN_FILES)) for case in CASES]
)
def test_its_file_computes_the_same(case, tmp_path):
    _, quantized, x = made(case)
    report = export_onnx(quantized, x, tmp_path / "net.onnx")
    assert report.code_flip_rate < 1e-3
    assert predicts_the_same(report)


@pytest.mark.parametrize("bits", [(None, 8), (4, None)], ids=["float weight", "float input"])
def test_a_transposed_linear_layer_with_one_operand_in_floating_point(bits, tmp_path):
    """Its bias is in floating point, and added in the product."""
    torch.manual_seed(0)
    network, layer, shape = CASES["Conv1D"]
    model, x = network(layer()), torch.rand(shape)
    with torch.no_grad():
        model.layer.bias.normal_()
    overrides = {"layer": {"weight_bits": bits[0], "activation_bits": bits[1]}}
    config = QuantConfig(4, 4, first_last_bits="same", overrides=overrides)
    quantized = quantize_model(model, config, calibration=x).eval()
    deployed = convert(quantized)
    assert not deployed.layer.is_integer
    assert (deployed.layer.float_weight is None) == (bits[0] is not None)
    assert torch.equal(deployed.layer.float_bias, model.layer.bias)
    assert torch.allclose(deployed.layer(x), quantized.layer(x), atol=1e-6)
    save_packed(quantized, tmp_path / "net.packed")
    assert torch.equal(load_packed(model, tmp_path / "net.packed")(x), deployed(x))
    report = export_onnx(quantized, x, tmp_path / "net.onnx")
    assert (report.top1_agreement, report.code_flip_rate) == (1, 0)
