"""``DeployLayer``: the precision of its sums, and the shapes that it takes."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import close, quantized, run
from gaqat_optim import QuantConfig
from gaqat_optim.deploy.convert import convert


def test_a_layer_of_large_sums_adds_up_in_float64():
    model = nn.Linear(4096, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.copy_(torch.tensor([0.001, 0.0]))
    model = quantized(model, torch.rand(4, 4096), QuantConfig(8, 8, scale_domain="linear"))
    model.weight_quantizer.initialize(model.weight, 1 / 127)
    model.input_quantizer.initialize(torch.rand(9), 1 / 255)
    deployed = convert(model)
    assert not deployed.exact_in_float32
    x = torch.ones(1, 4096)
    x[0, ::2] = 254 / 255
    total = 127 * (255 + 254) * 2048  # needs 27 bits
    expected = torch.tensor([total + round(0.001 * 127 * 255), total]).float() * deployed.accumulator_scale
    assert torch.equal(run(deployed, x)[0], expected)
    small = convert(quantized(nn.Linear(64, 2), torch.rand(4, 64)))
    assert small.exact_in_float32


def test_an_input_of_other_axes_than_the_batchnorm_was_folded_for_is_refused():
    """Behind a linear layer, a BatchNorm1d of (N, C, L) normalizes axis 1: another map than the one that was folded."""
    model = quantized(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.rand(8, 4))
    with pytest.raises(ValueError, match="inputs of 2 axes only"):
        convert(model)(torch.rand(8, 6, 4))


def test_inputs_without_a_batch_and_with_more_axes():
    torch.manual_seed(0)
    linear = quantized(nn.Linear(5, 3), torch.rand(8, 5), QuantConfig(8, 8))
    conv = quantized(nn.Conv2d(3, 4, 3), torch.rand(8, 3, 6, 6), QuantConfig(8, 8))
    for model, shape in ((linear, (5,)), (linear, (2, 7, 5)), (linear, (2, 3, 4, 5)), (conv, (3, 6, 6))):
        x = torch.rand(shape)
        assert run(convert(model), x).shape == run(model, x).shape
        assert close(run(model, x), run(convert(model), x))


def test_loading_larger_biases_changes_the_precision_of_the_sum():
    deployed = convert(quantized(nn.Linear(4, 2), torch.rand(8, 4)))
    assert deployed.exact_in_float32
    deployed.load_state_dict(deployed.state_dict() | {"bias_codes": torch.tensor([2**24, 0], dtype=torch.int32)})
    assert not deployed.exact_in_float32
