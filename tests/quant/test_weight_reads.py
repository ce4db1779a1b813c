"""A weight that is read past its quantized layer is an error that names all such layers, and an exclude that works."""

import ast
import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import QuantConfig, convert, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule

TOKENS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Reads four weights past their layers: functionally, transposed, in a list, and as values of a table."""

    def __init__(self):
        super().__init__()
        self.words, self.queries = nn.Embedding(9, 8), nn.Embedding(5, 8)
        self.qkv, self.parts, self.called = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.called(self.words(tokens)) + self.queries.weight
        x = F.linear(x.to(self.called.weight), self.qkv.weight.to(x.dtype), self.qkv.bias)  # first line read
        x = x @ torch.cat([self.parts[0].weight.type_as(x)], dim=0).expand_as(self.called.weight)
        x = x + torch.zeros_like(self.called.weight)[0] + self.called.weight.shape[0]
        return self.other(x) @ self.words.weight.T


NAMES = ("queries", "qkv", "parts.0", "words")


def check(error):
    lines = str(error.value).splitlines()
    assert lines[0] == "the weights of 4 quantized layers are read past them, in floating point:"
    assert [line.split()[0] for line in lines[1:-1]] == [repr(f"net.{name}") for name in NAMES]
    first = next(i for i, line in enumerate(inspect.getsource(Reads).splitlines()) if "first line read" in line)
    place = f"{__file__}:{inspect.getsourcelines(Reads)[1] + first}"
    assert lines[2] == f"  'net.qkv' (QuantLinear) by 'net' (Reads), {place}"
    exclude = ast.literal_eval(lines[-1].partition("exclude=")[2])
    assert exclude == ("net.o*", *(f"net.{name}" for name in NAMES))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = Reads(), nn.Linear(9, 2)

    def forward(self, tokens):
        return self.head(self.net(tokens))


CONFIG = QuantConfig(exclude=("net.o*",))


def test_calibration_names_them_all():
    model = Network()
    with pytest.raises(ValueError, match="read past them") as error:  # and no warning, which would be an error
        quantize_model(model, CONFIG, calibration=[TOKENS], inplace=True)
    check(error)
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_or_the_first_training_forward(copied):
    model = copied(quantize_model(Network(), CONFIG))
    with pytest.raises(RuntimeError, match="no scale yet"):
        model.eval()(TOKENS)
    with pytest.raises(ValueError, match="read past them") as error:
        model.train()(TOKENS)
    check(error)


def test_the_exclude_of_the_error_works():
    config = QuantConfig(exclude=tuple(f"net.{name}" for name in NAMES))
    model = convert(quantize_model(Network(), config, calibration=[TOKENS]))
    assert model(TOKENS).shape == (4, 5, 2)


class Tied(nn.Module):
    """An embedding and a head of one Parameter, both called; an excluded layer that shares one with a quantized one."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight
        self.a, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)
        self.plain.weight = self.a.weight
        self.attention = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, tokens):
        return self.head(self.attention(self.plain(self.a.forward(self.words(tokens)))))


def test_tied_weights_and_attention_are_no_such_use():
    config = QuantConfig(exclude=("plain",))
    quantize_model(Tied(), config, calibration=[TOKENS])
    model = quantize_model(Tied(), config)
    expected = len(model._forward_pre_hooks) - 1
    model(TOKENS).sum().backward()
    assert len(model._forward_pre_hooks) == expected
    assert not model._forward_hooks
    assert model(TOKENS).requires_grad


def test_an_error_of_the_network_s_own_comes_through():
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 8)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.rand(2, 8))
    assert not torch.overrides._get_current_function_mode_stack()
    assert not model._forward_hooks


class Hides(nn.Linear):
    """Its code names the weight nowhere, so that it is taken for one that only wraps ``super().forward``."""

    def forward(self, x):
        return super().forward(x) * getattr(self, "".join(["wei", "ght"])).norm()


def test_a_layer_whose_own_forward_reads_its_weight_past_the_quantized_one():
    model = nn.Sequential(nn.Linear(4, 4), Hides(4, 4))
    with pytest.raises(
        ValueError, match=r"'1' \(QuantHides\) by '1' \(QuantHides\), .*test_weight_reads\.py:\d+"
    ) as error:
        quantize_model(model, calibration=torch.rand(8, 4))
    assert "exclude=('1',)" in str(error.value)
    quantize_model(model, QuantConfig(exclude=("1",)), calibration=torch.rand(8, 4))


def test_the_first_forward_may_stand_in_an_except_block():
    """Such as the second try after too large a batch."""
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    try:
        raise MemoryError
    except MemoryError:
        model(torch.rand(2, 8))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
