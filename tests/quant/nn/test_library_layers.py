"""Layers of libraries and subclasses: swapped by what they compute."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, convert, quantization_disabled, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule
from quant.nn.library_layers import CASES, StdConv2d, standardized

IMPORTABLE = ("Conv1D", "BiT static", "Renamed", "video")


@pytest.mark.parametrize("case", CASES)
def test_it_is_quantized(case):
    torch.manual_seed(0)
    network, layer, shape = CASES[case]
    model, x = network(layer()), torch.rand(shape)
    quantized = quantize_model(model, QuantConfig(4, 4, first_last_bits="same", output_bits=8), calibration=x)
    assert isinstance(quantized.layer, QuantizedModule)
    assert isinstance(quantized.layer, type(model.layer))
    with quantization_disabled(quantized):
        assert torch.equal(quantized.eval()(x), model.eval()(x))
    quantized.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in quantized.parameters())
    quantized.eval()
    expected = quantized(x)
    for other in (copy.deepcopy(quantized), *([pickle.loads(pickle.dumps(quantized))] if case in IMPORTABLE else [])):
        assert type(other.layer) is type(quantized.layer)
        assert torch.equal(other(x), expected)


def test_the_standardized_weight_is_what_is_quantized():
    torch.manual_seed(0)
    layer = StdConv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight.mul_(50).add_(7)
    quantized = quantize_model(nn.Sequential(layer), QuantConfig(8, 8), calibration=torch.rand(4, 2, 5, 5))[0]
    weight = standardized(layer)
    assert (quantized.quantized_weight() - weight).abs().max() < 0.03
    assert quantized.weight is not layer.weight
    assert torch.equal(quantized.weight, layer.weight)
    assert (convert(nn.Sequential(quantized))[0].weight - weight).abs().max() < 0.03
