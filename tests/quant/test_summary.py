"""``quantization_summary``: what a network costs, in bytes and in multiply-accumulates."""

import copy

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, convert, quantization_summary, quantize_model, save_packed
from gaqat_optim.quant.nn.base import QuantizedModule


def quantized(model, x, config=None):
    torch.manual_seed(0)
    return quantize_model(model, config or QuantConfig(4, 3, first_last_bits="same"), calibration=x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.left, self.right = nn.Embedding(5, 4), nn.Linear(4, 2), nn.Linear(6, 2)

    def forward(self, ids, features, mask=None):
        words = self.left(self.words(ids)) * (1 if mask is None else mask[..., None])
        return {"sum": words.sum(1) + self.right(features)}


@pytest.mark.parametrize("kind", ["tuple", "keywords", "batch"])
@pytest.mark.parametrize("form", [lambda model: model, convert], ids=["training", "deployed"])
def test_a_sample_of_several_inputs(kind, form):
    ids, features = torch.zeros(3, 5, dtype=torch.long), torch.rand(3, 6)
    samples = {"tuple": (ids, features), "keywords": {"features": features, "ids": ids}}
    samples["batch"] = {**samples["keywords"], "label": torch.zeros(3), "mask": torch.ones(3, 5)}
    model = form(quantized(Pair(), [samples["keywords"]]))
    summary = quantization_summary(model, samples[kind])
    assert {record.name: record.macs for record in summary if record.macs} == {"left": 5 * 4 * 2, "right": 6 * 2}


@pytest.mark.parametrize(
    ("sample", "error", "words"),
    [
        (
            [torch.rand(3, 4)],
            TypeError,
            "sample must be a tensor, a tuple of forward's positional inputs, or",
        ),
        ("text", TypeError, "got str"),
        ((), TypeError, "got tuple without a tensor"),
        ({"x": torch.rand(3, 4)}, TypeError, "the batch has x, and so no input"),
        (torch.tensor(1.0), ValueError, r"at least one entry on axis 0, got shape \(\)"),
        (torch.rand(0, 4), ValueError, r"at least one entry on axis 0, got shape \(0, 4\)"),
    ],
)
def test_a_sample_of_a_wrong_kind_says_what_was_expected(sample, error, words):
    with pytest.raises(error, match=words):
        quantization_summary(quantized(nn.Linear(4, 2), torch.rand(3, 4)), sample)


class Shared(nn.Module):
    """A layer used twice, an excluded one, one with a float weight, one with a float input, a product of its own."""

    def __init__(self):
        super().__init__()
        self.shared, self.excluded, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4)
        self.weight, self.input = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(self.shared(x) + self.table(torch.zeros(len(x), dtype=torch.long)))
        return self.excluded(self.input(self.weight(x))) @ torch.ones(4, 2)


def test_calls_are_counted_by_bits():
    x = torch.rand(3, 4)
    overrides = {"weight": {"weight_bits": None}, "input": {"activation_bits": None}}
    config = QuantConfig(4, 8, first_last_bits="same", overrides=overrides, exclude=("excluded",))
    model = quantized(Shared(), x, config)
    summary = quantization_summary(model, x)
    macs = {record.name: record.macs for record in summary}
    assert macs == {"shared": 32, "table": 0, "weight": 16, "input": 16}
    assert summary.macs == {"4x8 bits": 32, "float": 16 + 8, "float x 8 bits": 16, "4 bits x float": 16}
    text = str(summary)
    assert (
        "MACs of one sample: 32 at 4x8 bits, 24 in floating point, 16 at float x 8 bits, 16 at 4 bits x float" in text
    )
    assert "in floating point: excluded (Linear)" in text
    deployed = quantization_summary(convert(model), x)
    assert deployed.macs == summary.macs
    assert {record.name: record.macs for record in deployed} == macs


def network():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4, bias=False))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_bytes_are_what_a_packed_file_has_for_the_layers(granularity, tmp_path):
    x = torch.rand(8, 3, 8, 8)
    config = QuantConfig(
        3,
        4,
        first_last_bits="same",
        weight_granularity=granularity,
        overrides={"4": {"weight_bits": 6, "output_bits": 8}},
    )
    model = quantized(network(), x, config)
    scales = (5, 4) if granularity == "channel" else (1, 1)
    before, after = quantization_summary(model), quantization_summary(convert(model))
    # 135 weights: 17 bytes a plane. A scale, that of the input, and in the file the bias that the BatchNorm makes.
    of_linear = 6 * 90 + 4 * (scales[1] + 1 + 1)
    assert [record.bytes for record in before] == [3 * 17 + 4 * (scales[0] + 1 + 5), of_linear]
    # Folded, there is a scale for each channel anyway.
    assert [record.bytes for record in after] == [3 * 17 + 4 * (5 + 1 + 5), of_linear]
    assert after.bytes == sum(record.bytes for record in after)
    assert f"in all: {after.bytes:,} bytes" in str(after)
    size = save_packed(model, tmp_path / "net.packed")
    assert after.bytes < size


def test_a_converted_network_has_the_records_of_the_quantized_one():
    x = torch.rand(8, 3, 8, 8)
    model = quantized(network(), x, QuantConfig(3, 4, output_bits=None))
    for before, after in zip(quantization_summary(model), quantization_summary(convert(model)), strict=True):
        assert after.type == {"QuantConv2d": "DeployConv", "QuantLinear": "DeployLinear"}[before.type]
        for field in ("name", "weight_bits", "weight_granularity", "activation_bits", "activation_signed", "weights"):
            assert getattr(after, field) == getattr(before, field)
        assert after.activation_scale == before.activation_scale
        assert (after.output_bits, after.weight_snr, after.macs) == (None, None, None)
    assert "MACs" not in str(quantization_summary(model))


class Counting(nn.Module):
    """Changes a buffer in every call, draws random numbers, and fails if told to."""

    def __init__(self, fails):
        super().__init__()
        self.fails, self.layer = fails, nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = self.layer(x + torch.rand_like(x))
        if self.fails:
            raise ArithmeticError("told to")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    """And needs no scales: here the input has none yet."""
    model = quantize_model(nn.Sequential(Counting(fails), nn.Dropout(), nn.BatchNorm1d(4)))
    model.train()
    model[2].eval()
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    if fails:
        with pytest.raises(ArithmeticError, match="told to"):
            quantization_summary(model, torch.rand(3, 4, generator=torch.Generator()))
    else:
        summary = quantization_summary(model, torch.rand(3, 4, generator=torch.Generator()))
        assert summary.macs == {"8x8 bits": 16}
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert all(quantizer.enabled for layer in layers for _, quantizer in layer.quantizers())
    assert not any(p.grad is not None for p in model.parameters())


class Recurrent(nn.Module):
    """A recurrence in one kernel, a product of its own, and a layer whose weight it reads past the layer."""

    def __init__(self, kind):
        super().__init__()
        self.recurrence, self.head, self.read = kind, nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.recurrence(x)[0]) @ self.read.weight.T


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (nn.LSTM(5, 6, batch_first=True), 4 * 6 * (5 + 6)),
        (nn.GRU(5, 3, num_layers=2, bidirectional=True, batch_first=True), 2 * 3 * 3 * (5 + 3) + 2 * 3 * 3 * (6 + 3)),
    ],
    ids=["LSTM", "GRU"],
)
def test_the_last_line_is_the_share_that_is_quantized(kind, weights):
    x = torch.rand(3, 7, 5)
    model = quantize_model(Recurrent(kind), QuantConfig(exclude=("recurrence",)))
    summary = quantization_summary(model, x)
    assert summary.macs == {"float": 7 * (weights + 16), "8x8 bits": 7 * 24}
    assert summary.never_called == ["read"]
    share_of_weights, share_of_macs = 40 / (40 + weights), 24 / (24 + 16 + weights)
    assert (summary.weight_share, summary.mac_share) == (share_of_weights, share_of_macs)
    *_, error, shares = str(summary).splitlines()
    assert error.startswith("error: 0 MACs in read: never called for the sample, or its weight is read past it")
    assert (
        shares == f"quantized: {100 * share_of_weights:.1f} % of the weights, {100 * share_of_macs:.1f} % of the MACs"
    )
    assert str(quantization_summary(model)).splitlines()[-1] == shares.partition(",")[0]
