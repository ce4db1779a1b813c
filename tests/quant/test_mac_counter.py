"""Multiply-accumulates, counted operation by operation: against counts by hand."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantization_summary, quantize_model

# By hand: weights of one output position, times channels, times positions.
COUNTS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), 6 * 4),
    "tokens": (lambda: nn.Linear(6, 4), (3, 5, 6), 5 * 6 * 4),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), (3, 2, 7), 7 * 4 * 2 * 3),
    "strided": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 3, 8, 8), 4 * 4 * 8 * 3 * 9),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=4), (3, 4, 8, 8), 6 * 6 * 8 * 1 * 9),
    "dilated": (
        lambda: nn.Conv2d(2, 2, 3, dilation=2, padding_mode="circular", padding=2),
        (3, 2, 8, 8),
        64 * 2 * 2 * 9,
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4), 27 * 3 * 2 * 8),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 4, 5, 5), 25 * 4 * 3 * 4),
}


def quantized(model, x, config=None):
    torch.manual_seed(0)
    return quantize_model(model, config or QuantConfig(4, 3, first_last_bits="same"), calibration=x)


@pytest.mark.parametrize("case", COUNTS)
def test_multiply_accumulates_counted_by_hand(case):
    build, shape, expected = COUNTS[case]
    x = torch.rand(shape)
    summary = quantization_summary(quantized(build(), x), x)
    assert [record.macs for record in summary] == [expected]
    assert summary.macs == {"4x3 bits": expected}


def test_a_layer_on_a_permuted_input():
    """There torch expands a frozen weight and multiplies batches of matrices, as for products of two activations."""
    x = torch.rand(2, 6, 5).transpose(1, 2)
    assert quantization_summary(quantized(nn.Linear(6, 4), x).requires_grad_(False), x).macs == {"4x3 bits": 5 * 6 * 4}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attentions_own_products_are_in_floating_point(need_weights, batch_first):
    """They are one path of torch where the weights are wanted, and another where not."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x):
            y = x if batch_first else x.transpose(0, 1)
            return self.layer(y, y, y, need_weights=need_weights)[0]

    x = torch.rand(3, 5, 8)
    model = quantized(Attention(), x)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            summary = quantization_summary(model, x)
        assert [record.macs for record in summary] == [5 * 3 * 8 * 8, 5 * 8 * 8]
        assert summary.macs == {"4x3 bits": 5 * 4 * 8 * 8, "float": 2 * 5 * 5 * 8}


def test_a_packed_sequence_counts_its_steps():
    packed = nn.utils.rnn.pack_sequence([torch.rand(4, 5), torch.rand(2, 5)])

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrence, self.head = nn.RNN(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.recurrence(packed)[0].data)

    model = quantize_model(Packed(), QuantConfig(exclude=("recurrence",)))
    assert quantization_summary(model, torch.rand(1)).macs == {"float": 6 * 6 * (5 + 6), "8x8 bits": 6 * 12}


@pytest.mark.parametrize("exclude", ["self_attn", "*"])
def test_an_attention_in_floating_point_counts_its_projections(exclude):
    """torch would compute it, or the whole layer, in one kernel in evaluation mode."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.rand(3, 5, 8)
    model = quantize_model(nn.ModuleDict({"a": layer, "b": nn.Linear(8, 8)}), QuantConfig(exclude=(f"a.{exclude}",)))
    model.forward = lambda x: model["b"](model["a"](x))
    counts = quantization_summary(model.eval(), x).macs
    assert sum(counts.values()) == 5 * (4 * 64 + 2 * 128 + 64) + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()
