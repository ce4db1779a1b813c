"""The quantized linear layer: torch's own on a quantized input and weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.nn.linear import QuantLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_it_is_torch_s_linear_on_quantized_operands(shape, bias):
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer = quantize_model(nn.Linear(6, 4, bias=bias), QuantConfig(4, 4), calibration=torch.randn(16, 6))
    assert type(layer) is QuantLinear
    weight = layer.weight_quantizer(layer.weight)
    assert not torch.equal(weight, layer.weight)
    assert torch.equal(layer(x), F.linear(layer.input_quantizer(x), weight, layer.bias))


def test_every_row_of_the_weight_has_a_scale():
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[2] *= 100
    scales = quantize_model(layer, QuantConfig(4, 4)).weight_quantizer.scale
    assert scales.shape == (4,)
    assert scales.argmax() == 2
