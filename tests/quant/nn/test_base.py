"""``QuantizedModule``: its parts, and how it is called."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule
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


class Normed(nn.Linear):
    """A forward of its own, around a child."""

    def __init__(self):
        super().__init__(8, 4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_children_keep_their_training_flags():
    layer = Normed()
    layer.norm.eval()
    model = quantize_model(nn.Sequential(layer, nn.Linear(4, 4)), calibration=torch.randn(4, 8), inplace=True)
    assert model[0].norm is layer.norm
    assert (model[0].training, layer.norm.training) == (True, False)
    assert all(q.training for _, q in model[0].quantizers())
