"""Networks for packed files, and what it means that two of them are the same."""

import functools
import math

import torch
from torch import nn

from deploy.deploy_networks import CONFIGS, trained
from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.deploy.nn.base import DeployLayer

SAME = QuantConfig(4, 4, first_last_bits="same")
CONFIGURATIONS = {
    **CONFIGS,
    "per channel": QuantConfig(3, 5, weight_granularity="channel", first_last_bits="same"),
    "per tensor": QuantConfig(5, 3, weight_granularity="tensor", first_last_bits="same"),
    "weight-only": QuantConfig(4, None, first_last_bits="same"),
    "activation-only": QuantConfig(None, 4, first_last_bits="same"),
    "outputs": QuantConfig(6, 7, output_bits=8),  # Then no BatchNorm is folded.
    "one layer left out": QuantConfig(2, 8, exclude=("*1",)),
}


@functools.cache
def network(name, config):
    return trained(name, CONFIGURATIONS[config], steps=2)


def run(model, x):
    with torch.no_grad():
        return model(x)


def tensors(model):
    """All of them, with those that no state dict has, by all their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def identical(a, b):
    """Whether two networks have the same modules and, to the bit, the same tensors."""
    a_tensors, b_tensors = tensors(a), tensors(b)
    assert str(a) == str(b)
    assert a_tensors.keys() == b_tensors.keys()
    for name, v in a_tensors.items():
        w = b_tensors[name]
        assert (v.dtype, v.shape, type(v), v.requires_grad) == (w.dtype, w.shape, type(w), w.requires_grad), name
        assert torch.equal(v.contiguous().view(-1).view(torch.uint8), w.contiguous().view(-1).view(torch.uint8)), name
    named = [dict(m.named_modules(remove_duplicate=False)) for m in (a, b)]
    assert [type(m) for m in named[0].values()] == [type(m) for m in named[1].values()]
    assert not any(m.training for m in b.modules())
    for v, w in zip(named[0].values(), named[1].values(), strict=True):
        if isinstance(v, DeployLayer):
            fields = ("weight_bits", "shift", "folded", "exact_in_float32")
            assert [getattr(v, f) for f in fields] == [getattr(w, f) for f in fields]
    return True


def snapshot(model):
    return {name: v.clone() for name, v in tensors(model).items()}, str(model), [m.training for m in model.modules()]


def unchanged(model, before):
    after = snapshot(model)
    return after[1:] == before[1:] and all(torch.equal(after[0][name], v) for name, v in before[0].items())


class Odd(nn.Module):
    """Tensors of all kinds beside one quantized layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer
        self.table = nn.Embedding(5, 6)
        self.tied = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.also = self.tied
        self.norm = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        odd = {
            "scalar": torch.tensor(0.1, dtype=torch.bfloat16),
            "nothing": torch.zeros(0, 3, dtype=torch.float16),
            "turned": torch.randn(4, 3).t(),
            "gaps": torch.randn(4, 6)[:, ::2],
            "expanded": torch.randn(1, 3).expand(2, 3),
            "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "one": torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last),
            "flags": torch.tensor([True, False, True]),
            "complex": torch.randn(3, dtype=torch.complex64).conj(),
            "special": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
        }
        for name, v in odd.items():
            self.register_buffer(name, v, persistent=name != "gaps")

    def forward(self, tokens):
        return self.lstm(self.norm(self.again(self.layer(self.table(tokens)).relu())))[0]


def odd(config=QuantConfig(3, 4, first_last_bits="same", exclude=("lstm",))):  # noqa: B008 (immutable)
    torch.manual_seed(1)
    return quantize_model(Odd(), config, calibration=torch.randint(5, (16, 3)))


class Bags(nn.Module):
    """Both kinds of embeddings before a linear layer."""

    def __init__(self):
        super().__init__()
        self.words, self.bag, self.head = nn.Embedding(9, 6), nn.EmbeddingBag(9, 6, mode="sum"), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(self.words(tokens).mean(1) + self.bag(tokens))
