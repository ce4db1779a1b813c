"""Quantized embeddings: a weight with one scale a row, and indices, which are no activations."""

import pytest
import torch
from torch import nn

from gaqat_optim import (
    QuantConfig,
    quantize_model,
)
from gaqat_optim.quant.nn.base import QuantizedModule
from small_networks import build


def test_indices_are_no_activations():
    quantized = quantize_model(build("embeddings")[0], QuantConfig(4, 4, first_last_bits="same"))
    assert quantized.words.input_quantizer is None
    assert quantized.words.weight_quantizer.scale.shape == (10,)
    only_activations = quantize_model(build("embeddings")[0], QuantConfig(None, 4))
    assert type(only_activations.words) is nn.Embedding
    assert isinstance(only_activations.head, QuantizedModule)


def test_rows_are_those_of_the_quantized_weight_and_padding_gets_no_gradient():
    torch.manual_seed(0)
    layer = quantize_model(nn.Embedding(10, 8, padding_idx=3), QuantConfig(4, 4))
    tokens = torch.tensor([[1, 3], [3, 9]])
    rows = layer(tokens)
    assert torch.equal(rows, layer.weight_quantizer(layer.weight)[tokens])
    rows.sum().backward()
    assert layer.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 9]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_with_offsets_is_torch_s_on_the_quantized_weight(mode):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(10, 8, mode=mode, include_last_offset=True, padding_idx=2)
    layer = quantize_model(bag, QuantConfig(4, 4))
    with torch.no_grad():
        bag.weight.copy_(layer.weight_quantizer(bag.weight))
    tokens, offsets = torch.tensor([1, 2, 4, 5, 9]), torch.tensor([0, 3, 5])
    weights = torch.rand(5) if mode == "sum" else None
    assert torch.equal(layer(tokens, offsets, weights), bag(tokens, offsets, weights))
