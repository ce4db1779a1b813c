"""Embeddings are deployed as tables of the quantized values."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.embedding import DeployEmbedding, DeployEmbeddingBag


@pytest.mark.parametrize(
    ("kind", "deployed_kind"), [(nn.Embedding, DeployEmbedding), (nn.EmbeddingBag, DeployEmbeddingBag)]
)
def test_a_table_of_the_quantized_values(kind, deployed_kind):
    model = nn.Sequential(kind(10, 6), nn.Linear(6, 4))
    tokens = torch.randint(10, (32, 3))
    model = quantize_model(model, QuantConfig(3, 8, first_last_bits="same"), calibration=tokens).eval()
    deployed = convert(model)
    assert type(deployed[0]) is deployed_kind
    assert torch.equal(deployed[0](tokens), model[0](tokens))
    assert not torch.equal(deployed[0].weight, model[0].weight)


def test_an_output_quantizer_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    tokens = torch.randint(9, (8, 3))
    model = quantize_model(net, QuantConfig(4, 4, output_bits=4), calibration=tokens)
    with pytest.raises(ValueError, match=r"'0': an embedding .* overrides=\{'0': \{'output_bits': None\}\}"):
        convert(model)
    convert(
        quantize_model(
            net, QuantConfig(4, 4, output_bits=4, overrides={"0": {"output_bits": None}}), calibration=tokens
        )
    )
