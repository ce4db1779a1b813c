"""A network as a graph has it: names and tensors of inputs and outputs."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gaqat_optim.deploy.flat_network import FlatInputs, FlatNetwork, output_names, tensors

X, Y, IDS = torch.rand(4, 3), torch.rand(4, 2), torch.arange(4)


class Network(nn.Module):
    def forward(self, left, right=None, *others, **options):
        return left, right, others, options


def test_a_row_of_tensors_is_the_call_again():
    sample = {"left": {"a": X, "b": [Y, (IDS, None)]}, "right": 3, "scale": 2.0}
    inputs = FlatInputs.of_sample(Network(), sample)
    assert inputs.names == ["left", "left_1", "left_2"]
    assert inputs.batch_size == 4
    left, right, others, options = FlatNetwork(Network(), inputs.call).output(2 * X, 2 * Y, 2 * IDS)
    assert torch.equal(left["a"], 2 * X)
    assert torch.equal(left["b"][1][0], 2 * IDS)
    assert (left["b"][1][1], right, others, options) == (None, 3, (), {"scale": 2.0})
    assert sample["left"]["a"] is X


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        (X, ["input"]),
        ((X,), ["left"]),
        ((X, Y, IDS, (IDS, X)), ["left", "right", "others_0", "others_1", "others_1_1"]),
        (UserDict(right=X, left=Y), ["right", "left"]),
        ({"left": (X, Y), "left_1": X}, ["left", "left_1", "left_1_"]),
    ],
)
def test_names_of_inputs(sample, names):
    assert FlatInputs.of_sample(Network(), sample).names == names


def test_the_batch_is_free_where_all_have_it_and_floats_are_float32():
    positions = torch.arange(3)
    inputs = FlatInputs.of_sample(Network(), (X.double(), IDS > 1, positions, torch.tensor(2.0), Y.bfloat16()))
    assert inputs.free == [True, True, False, False, True]
    kinds = [torch.float32, torch.bool, torch.int64, torch.float32, torch.float32]
    assert [tensor.dtype for tensor in inputs.tensors] == kinds


class TwoOnly(nn.Module):
    def forward(self, left, right):
        return left + right


@pytest.mark.parametrize(
    ("sample", "error", "words"),
    [
        (
            {"left": X, "right": X, "labels": X},
            ValueError,
            "sample has 'labels', which the forward of TwoOnly",
        ),
        ({"left": X}, TypeError, "the forward of TwoOnly takes left, right; the batch has left, and so no right"),
        ((X, X, X), TypeError, "the forward of TwoOnly takes 2 inputs, and sample has 3"),
        ((X, X[:, :0]), ValueError, r"sample has no values for 'right', of shape \(4, 0\)"),
        ((X, X / 0), ValueError, "sample has values that are not finite in 'right'"),
        ([X, X], TypeError, "sample must be a tensor, a tuple of forward's positional inputs, or a mapping"),
        ((X, nn.utils.rnn.pack_sequence([X, X])), TypeError, "sample has a PackedSequence, whose tensors cannot be"),
    ],
)
def test_a_sample_that_cannot_be_inputs_is_refused_by_name(sample, error, words):
    with pytest.raises(error, match=words):
        FlatInputs.of_sample(TwoOnly(), sample)


@dataclass
class Record:
    loss: torch.Tensor | None
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]


class ModelOutput(OrderedDict):
    """As transformers has them: a mapping without the fields that are None, and a dataclass."""


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (X, ["output"]),
        ((X, Y), ["output", "output_1"]),
        ([X, None, (Y, "a cache")], ["output", "output_1"]),
        (Record(None, X, (Y, X)), ["logits", "states", "states_1"]),
        (ModelOutput(logits=X, hidden={"a": Y, "b": X}), ["logits", "hidden", "hidden_1"]),
        ({"left": X}, ["left_output"]),
        ({0: X}, ["0"]),
    ],
)
def test_names_of_outputs(output, names):
    assert output_names(output, ["left"]) == names
    assert len(tensors(output)) == len(names)
