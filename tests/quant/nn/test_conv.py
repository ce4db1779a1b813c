"""Quantized convolutions: torch's own, with every kind of padding, on a quantized input and weight."""

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
