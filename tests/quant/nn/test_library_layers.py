"""Layers of libraries and subclasses: swapped by what they compute."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gaqat_optim import (
    QuantConfig,
    convert,
    quantization_disabled,
    quantization_summary,
    quantize_model,
    rounded_biases,
)
from gaqat_optim.quant.nn.base import QuantizedModule
from quant.nn.library_layers import CASES, StdConv2d, standardized
from torchvision_import import import_torchvision

IMPORTABLE = ("Conv1D", "Falcon", "BiT static", "Renamed", "video")


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


def test_all_of_a_falcon_is_quantized():
    import_torchvision()  # modeling_falcon imports it
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    x = {"input_ids": torch.randint(20, (2, 6)), "use_cache": False}
    model = quantize_model(FalconForCausalLM(FalconConfig(**sizes)), QuantConfig(4, 4), calibration=[x])
    assert quantization_summary(model).weight_share == 1
    model.train()(**x).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    deployed = convert(model.eval())
    with rounded_biases(model):
        expected = model(**x).logits
    assert (deployed(**x).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
