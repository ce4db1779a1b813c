"""The deployed linear layer: the product of two matrices, whatever axes its input has."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import close, quantized, run
from gaqat_optim import QuantConfig, export_onnx, load_packed, rounded_biases, save_packed
from gaqat_optim.deploy.convert import convert
from quant.nn.window_attention import CASES, Reads, build


@pytest.mark.parametrize("shape", [(5,), (2, 7, 5), (2, 3, 4, 5)])
def test_inputs_without_a_batch_and_with_more_axes(shape):
    torch.manual_seed(0)
    model = quantized(nn.Linear(5, 3), torch.rand(8, 5), QuantConfig(8, 8))
    x = torch.rand(shape)
    assert run(convert(model), x).shape == run(model, x).shape
    assert close(run(model, x), run(convert(model), x))


def test_every_row_of_tokens_is_computed_as_a_sample():
    torch.manual_seed(0)
    deployed = convert(quantized(nn.Linear(5, 3), torch.rand(8, 5)))
    x = torch.rand(4, 7, 5)
    assert torch.equal(run(deployed, x), torch.stack([run(deployed, rows) for rows in x]))


def test_a_layer_without_a_bias_maps_zeros_to_zeros():
    deployed = convert(quantized(nn.Linear(5, 3, bias=False), torch.rand(8, 5)))
    assert torch.equal(run(deployed, torch.zeros(2, 5)), torch.zeros(2, 3))


def test_a_weight_in_floating_point_keeps_its_bias():
    torch.manual_seed(0)
    model = quantized(nn.Linear(5, 3), torch.rand(8, 5), QuantConfig(None, 8))
    x = torch.rand(2, 7, 5)
    assert torch.allclose(run(convert(model), x), run(model, x), atol=1e-6)


def test_tokens_have_the_integer_kernel_of_two_matrices(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 7, 5)
    model = quantized(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6)), x, QuantConfig(8, 8, output_bits=8))
    assert export_onnx(model, x, tmp_path / "net.onnx").integer_kernels == {"QGemm": 2}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_whose_weight_a_forward_reads_is_deployed_as_it_trains(tmp_path, case):
    network, x = build(case)
    model = quantized(network, x)
    deployed = convert(model)
    before = {name: tensor.clone() for name, tensor in deployed.state_dict().items()}
    expected = run(deployed, x)
    with rounded_biases(model):
        assert torch.allclose(run(model, x), expected, rtol=0, atol=1e-5)
        assert torch.equal(run(convert(model), x), expected)
    save_packed(deployed, tmp_path / "net.packed")
    for other in (network, model):
        assert torch.equal(run(load_packed(other, tmp_path / "net.packed"), x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in deployed.state_dict().items())


def test_the_operands_that_a_forward_reads_follow_a_state_dict():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = quantized(Reads(), x)
    deployed, other = convert(model), convert(quantized(Reads(), 2 * x))
    other.load_state_dict(deployed.state_dict())
    assert torch.equal(other.proj.weight, deployed.proj.weight)
    assert torch.equal(other.proj.bias, deployed.proj.bias)
    assert torch.equal(run(other, x), run(deployed, x))


@pytest.mark.parametrize("bits", [(None, 4), (4, None)])
def test_a_layer_with_one_operand_in_floating_point_is_read_too(bits):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = quantized(Reads(), x, QuantConfig(*bits, first_last_bits="same"))
    calls = []
    deployed = convert(model)
    deployed.proj.register_forward_hook(lambda layer, args, y: calls.append(len(args)))
    assert torch.allclose(run(deployed, x), run(model, x), rtol=0, atol=1e-5)
    assert calls == [1, 1]


def test_a_file_has_layers_whose_weights_a_forward_reads(tmp_path):
    network, x = build("own")
    report = export_onnx(quantized(network, x), x, tmp_path / "net.onnx")
    assert report.max_abs_diff <= 1e-5
    assert report.integer_kernels == {"QGemm": 7}  # two layers are used twice
