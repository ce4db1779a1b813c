"""Quantized transposed convolutions: torch's own on quantized operands, and a scale for every output channel."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model

LAYERS = {
    "one dimension": (nn.ConvTranspose1d, (2, 4, 5), (10,)),
    "two dimensions": (nn.ConvTranspose2d, (2, 4, 3, 4), (6, 8)),
    "three dimensions": (nn.ConvTranspose3d, (2, 4, 2, 3, 2), (4, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_torch_s_on_quantized_operands_also_where_a_call_gives_the_size(name):
    torch.manual_seed(0)
    kind, shape, size = LAYERS[name]
    x = torch.randn(shape)
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2)
    quantized = quantize_model(layer, QuantConfig(4, 4, weight_granularity="tensor"), calibration=x)
    weight = quantized.weight_quantizer(layer.weight)
    assert not torch.equal(weight, layer.weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
    codes = quantized.input_quantizer(x)
    assert torch.equal(quantized(x), layer(codes))
    y = quantized(x, output_size=size)
    assert y.shape[2:] == size
    assert torch.equal(y, layer(codes, output_size=size))


@pytest.mark.parametrize("channel", range(6))
def test_the_scale_of_an_output_channel_is_that_of_its_weights_in_its_group(channel):
    """Weights of 2 groups: (4 inputs, 3 outputs of a group, ...)."""
    layer, group, output = nn.ConvTranspose2d(4, 6, 3, groups=2), channel // 3, channel % 3
    with torch.no_grad():
        layer.weight[2 * group : 2 * group + 2, output] *= 100
    quantized = quantize_model(layer, QuantConfig(8, 8))
    scales = quantized.weight_quantizer.scale
    assert scales.shape == (6,)
    assert (scales > 10 * scales.median()).nonzero().flatten().tolist() == [channel]
    # The small weights beside it keep their resolution.
    assert (quantized.quantized_weight() - layer.weight).abs().max() <= scales.max()
    others = torch.ones(4, 3, dtype=torch.bool)
    others[2 * group : 2 * group + 2, output] = False
    assert (quantized.quantized_weight() - layer.weight)[others].abs().max() < 0.01
