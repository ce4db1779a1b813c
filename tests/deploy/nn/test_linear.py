"""The deployed linear layer: the product of two matrices, whatever axes its input has."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import close, quantized, run
from gaqat_optim import QuantConfig, export_onnx
from gaqat_optim.deploy.convert import convert


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
