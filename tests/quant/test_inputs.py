"""What a network is fed: batches of every kind, their keywords and their device."""

from collections import UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch import nn

from devices import needs_cuda
from gaqat_optim import LSQQuantizer, quantize_model
from gaqat_optim.quant.inputs import run_batch, taken_keywords, tensors_in, to_device

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, left, right=None, *, scale=1.0):
        return scale * self.a(left) + (0 if right is None else self.b(right))


class AnyKeywords(TwoInputs):
    def forward(self, left, **others):
        return super().forward(left, **others)


def test_a_mapping_goes_in_as_the_keywords_that_forward_takes():
    model = TwoInputs()
    batch = {"label": 3, "right": X, "scale": 2.0, "left": X + 1, 7: X}
    assert torch.equal(run_batch(model, batch), model(X + 1, X, scale=2.0))
    assert torch.equal(run_batch(model, UserDict(batch)), model(X + 1, X, scale=2.0))
    assert set(taken_keywords(AnyKeywords(), batch)) == {"label", "left", "right", "scale"}


def test_the_second_input_is_calibrated_as_well():
    model = quantize_model(TwoInputs(), calibration=[{"left": X, "right": 10 * X, "label": X}])
    a, b = model.a.input_quantizer.scale, model.b.input_quantizer.scale
    assert torch.allclose(b, 10 * a, rtol=1e-3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"pixels": X, "label": 1},
            "forward of TwoInputs takes left, right, scale; the batch has pixels, label, and so",
        ),
        ({"left": [1.0]}, "has left, and so no tensor for it"),
        ({}, "the batch has no items, and so no left"),
        ((), "got tuple with NoneType"),
        (["text", X], "got list with str"),
        (X.numpy(), "got ndarray. For batches of another kind, pass forward="),
        (None, "got NoneType"),
    ],
)
def test_a_batch_of_a_wrong_kind_says_what_was_expected(batch, message):
    with pytest.raises(TypeError, match=message.replace("(", r"\(")):
        quantize_model(TwoInputs(), calibration=[batch])


def test_nested_tensors_move_and_types_stay():
    Pair = namedtuple("Pair", "x y")

    class Own:  # as the batches of graph libraries
        def to(self, device):
            return f"own on {device}"

    batch = UserDict(pair=Pair(X, [X, (X, "text")]), frozen=MappingProxyType({"x": X}), own=Own())
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is UserDict
    assert type(moved["pair"]) is Pair
    assert moved["pair"].y[1][1] == "text"
    assert moved["own"] == "own on meta"
    assert [v.is_meta for v in tensors_in(moved)] == [True] * 4
    assert not any(v.is_meta for v in tensors_in(batch))  # nothing in place
    same = {"pair": Pair(X, [X, 1])}
    assert to_device(same, torch.device("cpu")) is same


@needs_cuda
def test_batches_move_to_the_model_s_device(device):
    model = quantize_model(TwoInputs().to(device), calibration=[{"left": X, "right": X}, {"left": X}])
    quantizers = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    assert all(quantizer.is_initialized and quantizer.scale.is_cuda for quantizer in quantizers)
