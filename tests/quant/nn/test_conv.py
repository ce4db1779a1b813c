"""Quantized convolutions, transposed ones too: torch's own on quantized operands, a scale for every output channel."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model

LAYERS = {
    "one dimension": (nn.Conv1d, (2, 4, 9)),
    "two dimensions": (nn.Conv2d, (2, 4, 6, 7)),
    "three dimensions": (nn.Conv3d, (2, 4, 4, 5, 3)),
}


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_torch_s_convolution_on_quantized_operands(name, padding, mode):
    torch.manual_seed(0)
    kind, shape = LAYERS[name]
    x = torch.randn(shape)
    layer = kind(4, 6, 3, padding=padding, padding_mode=mode, dilation=1, groups=2)
    quantized = quantize_model(layer, QuantConfig(4, 4), calibration=x)
    assert isinstance(quantized, kind)
    weight = quantized.weight_quantizer(layer.weight)
    assert not torch.equal(weight, layer.weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert torch.equal(quantized(x), layer(quantized.input_quantizer(x)))


def test_every_output_channel_has_a_scale():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    with torch.no_grad():
        layer.weight[5] *= 100
    scales = quantize_model(layer, QuantConfig(4, 4)).weight_quantizer.scale
    assert scales.shape == (6,)
    assert scales.argmax() == 5


TRANSPOSED = {
    "one dimension": (nn.ConvTranspose1d, (2, 4, 5), (10,)),
    "two dimensions": (nn.ConvTranspose2d, (2, 4, 3, 4), (6, 8)),
    "three dimensions": (nn.ConvTranspose3d, (2, 4, 2, 3, 2), (4, 6, 4)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_one_is_torch_s_on_quantized_operands_also_where_a_call_gives_the_size(name):
    torch.manual_seed(0)
    kind, shape, size = TRANSPOSED[name]
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
