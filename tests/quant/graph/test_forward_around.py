"""The own forward of a class around another module, and what it does before and behind it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import quantize_model
from gaqat_optim.quant.graph.forward_around import ForwardAround, passes_input, passes_output
from quant.nn.own_forwards import Causal, Dropped, Levels


def test_it_has_all_of_the_layer_but_its_weight_and_calls_the_child():
    layer = Dropped(4, 4)
    layer.eval().register_forward_hook(lambda module, args, y: y + 10)
    for source in (layer, quantize_model(nn.Sequential(layer))[0]):
        child = nn.Linear(4, 4).to(torch.bfloat16)
        around = ForwardAround.of(source, child)
        assert isinstance(around, Dropped)
        assert {*dict(around.named_parameters())} == {"offset", "wrapped_layer.weight", "wrapped_layer.bias"}
        assert around.weight.dtype == around.bias.dtype == torch.float32
        assert around.double().weight.dtype == torch.float64  # the forward casts to it
        child.to(torch.float64)
        x = torch.rand(2, 4)
        expected = child(x.double()) * 1.5 + layer.offset - child.bias + 10
        for other in (around, copy.deepcopy(around)):
            assert torch.allclose(other(x), expected)
    assert "weight_type" not in source.state_dict()
    assert "wrapped_layer" not in source._modules


def test_it_is_pickled():
    layer = nn.Sequential(ForwardAround.of(Causal(1, 1, 2), nn.Identity()))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(torch.ones(1, 1, 2)), torch.tensor([[[0.0, 1.0, 1.0]]]))


class Before(nn.Linear):
    def forward(self, x):
        return super().forward(x.relu())


class Behind(nn.Linear):
    def forward(self, x):
        return F.relu(super().forward(x))


class Both(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + x.mean() + self.weight.ndim


class Neither(nn.Linear):
    def forward(self, x):
        if self.weight.dtype == torch.float64 and self.in_features > 3:
            x = x.double()
        return super().forward(x)


class TwoCalls(nn.Linear):
    def forward(self, x):
        return super().forward(super().forward(x))


class AlsoInput(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, x


class Branches(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else 0 * x


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(4, 4), (True, True)),
        (Before(4, 4), (False, True)),
        (Behind(4, 4), (True, False)),
        (Both(4, 4), (True, False)),
        (Neither(4, 4), (True, True)),
        (TwoCalls(4, 4), (False, False)),
        (AlsoInput(4, 4), (True, False)),
        (Branches(4, 4), (False, False)),  # cannot be traced
        (Levels(4, 4), (False, False)),
        (Causal(4, 4, 3), (False, True)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_forward_does_before_and_behind(layer, expected):
    quantized = quantize_model(nn.Sequential(layer))[0]
    attributes = dict(vars(quantized))
    assert (passes_input(quantized), passes_output(quantized)) == expected
    assert vars(quantized) == attributes
