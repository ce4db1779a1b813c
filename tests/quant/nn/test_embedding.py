"""Quantized embeddings: a weight with one scale a row, and indices, which are no activations."""

from torch import nn

from gaqat_optim import (
    QuantConfig,
    quantize_model,
)
from gaqat_optim.quant.nn.base import QuantizedModule
from networks import build


def test_indices_are_no_activations():
    quantized = quantize_model(build("embeddings")[0], QuantConfig(4, 4, first_last_bits="same"))
    assert quantized.words.input_quantizer is None
    assert quantized.words.weight_quantizer.scale.shape == (10,)
    only_activations = quantize_model(build("embeddings")[0], QuantConfig(None, 4))
    assert type(only_activations.words) is nn.Embedding
    assert isinstance(only_activations.head, QuantizedModule)
