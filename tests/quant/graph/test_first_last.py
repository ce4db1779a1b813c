"""Which layers ``first_last_bits`` means."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.graph.first_last import first_and_last
from gaqat_optim.quant.nn.base import QuantizedModule
from gaqat_optim.quant.nn.registry import QUANTIZED
from quant.nn.own_forwards import LowRank


class Network(nn.Module):
    """Layers by keyword, and a forward that calls them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


class Own(nn.Linear):
    """A layer that stays in floating point."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def linear():
    return nn.Linear(4, 4)


CASES = {
    "in the order of calls, not of registration": (
        Network(lambda m, x: m.a(m.c(m.b(x))), a=linear(), b=linear(), c=linear()),
        {"a", "b"},
    ),
    "both branches of a stem": (
        Network(
            lambda m, x: m.c(m.b(m.one(x) + m.three(F.relu(x)))), one=linear(), three=linear(), b=linear(), c=linear()
        ),
        {"one", "three", "c"},
    ),
    "both heads": (
        Network(
            lambda m, x: (m.one(h := m.b(m.a(x))) + m.two(h)) / 2, a=linear(), b=linear(), one=linear(), two=linear()
        ),
        {"a", "one", "two"},
    ),
    "a head that returns, too": (
        Network(
            lambda m, x: (m.one(h := m.b(m.a(x))), m.two(h[:, :4])), a=linear(), b=linear(), one=linear(), two=linear()
        ),
        {"a", "one", "two"},
    ),
    "an input beside features": (
        Network(lambda m, x: m.c(m.b(m.a(x) + x) + x), a=linear(), b=linear(), c=linear()),
        {"a", "c"},
    ),
    "a stream to the output": (
        Network(lambda m, x: F.relu((h := m.a(x)) + m.c(h + m.b(h))), a=linear(), b=linear(), c=linear()),
        {"a", "c"},
    ),
    "layers whose weights are read": (
        Network(
            lambda m, x: m.one(h := m.b(F.linear(x, m.a.weight))) + F.linear(h, m.two.weight, m.two.bias),
            b=linear(),
            a=linear(),
            two=linear(),
            one=linear(),
        ),
        {"a", "one", "two"},
    ),
    "a layer with layers in its own forward": (
        Network(lambda m, x: m.c(m.b(m.a(x))), a=LowRank(4, 4), b=linear(), c=LowRank(4, 4)),
        {f"{name}{child}" for name in "ac" for child in ("", ".down", ".up")},
    ),
    "what reads a shape alone": (
        Network(lambda m, x: m.b(m.a(x)).reshape(m.c(x).shape), a=linear(), b=linear(), c=linear()),
        {"a", "b", "c"},
    ),
    "a table of constants": (
        Network(lambda m, x: m.c(m.a(x) + m.b(torch.ones(4))), a=linear(), b=linear(), c=linear()),
        {"a", "c"},
    ),
    "a classifier of another class": (
        nn.Sequential(linear(), linear(), linear(), Own(4, 4)),
        {"0"},
    ),
    "a module that is not traced into": (
        nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8), nn.TransformerEncoderLayer(4, 1, 8)),
        {"0.self_attn", "1.linear2"},
    ),
    "one layer": (linear(), {""}),
    "a branch that the input decides": (
        Network(lambda m, x: m.a(m.b(x)) if x.sum() > 0 else x, a=linear(), b=linear(), c=linear()),
        {"a", "c"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_first_and_last(case):
    model, expected = CASES[case]
    layers = {name: module for name, module in model.named_modules() if type(module) in (*QUANTIZED, LowRank)}
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    untraceable = (
        pytest.warns(UserWarning, match="by the order of its layers: a and c") if "decides" in case else nullcontext()
    )
    with untraceable:
        assert first_and_last(model, layers) == (expected, False)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def weight_bits(model):
    return {name: m.weight_quantizer.bits for name, m in model.named_modules() if isinstance(m, QuantizedModule)}


def test_an_excluded_classifier_leaves_the_layer_before_it_as_the_others():
    model = quantize_model(nn.Sequential(linear(), linear(), linear()), QuantConfig(4, 4, exclude=("2",)))
    assert weight_bits(model) == {"0": 8, "1": 4}


def test_two_heads_have_the_bits():
    model = quantize_model(CASES["both heads"][0], QuantConfig(4, 4))
    assert weight_bits(model) == {"a": 8, "b": 4, "one": 8, "two": 8}


def test_a_tied_layer_is_first_and_last():
    shared = linear()
    model = quantize_model(nn.Sequential(shared, linear(), shared))
    assert weight_bits(model) == {"0": 8, "1": 4}
