"""``QuantizedModule``: which types have a quantized version, and the parts of one."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule, quantized_class
from small_networks import build, mlp


def test_parts_can_stay_in_floating_point():
    model, x = mlp(), torch.randn(16, 8)
    only_weights = quantize_model(model, QuantConfig(4, None))
    assert only_weights[2].input_quantizer is None
    assert only_weights.eval()(x).shape == (16, 4)  # nothing waits for calibration
    only_activations = quantize_model(model, QuantConfig(None, 4), calibration=x)
    assert only_activations[2].weight_quantizer is None
    outputs = quantize_model(model, QuantConfig(4, 4, output_bits=8), calibration=x).eval()
    q = outputs[-1].output_quantizer
    y = outputs[-1](torch.rand(5, outputs[-1].in_features))
    assert q.bits == 8
    assert torch.allclose((y / q.scale).round() * q.scale, y, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn", "u-net", "conv1d"])
def test_layers_take_their_input_by_torch_s_own_name(name):
    model, x, _ = build(name)
    layer = next(m for m in quantize_model(model).modules() if isinstance(m, QuantizedModule))
    assert torch.equal(layer(input=x), layer(x))


class OwnPadding(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


def test_a_subclass_that_computes_something_else_is_left():
    assert quantized_class(OwnPadding) is None
    with pytest.warns(UserWarning, match=r"0 \(OwnPadding\)"):
        model = quantize_model(nn.Sequential(OwnPadding(2, 2, 3), nn.Conv2d(2, 2, 1)))
    assert type(model[0]) is OwnPadding


def test_an_attention_left_out_keeps_its_projection_which_it_reads_itself():
    attention = nn.TransformerEncoderLayer(8, 2, 8)
    model = quantize_model(attention, QuantConfig(exclude=("self_attn",)), calibration=torch.rand(2, 3, 8))
    assert not isinstance(model.self_attn.out_proj, QuantizedModule)
