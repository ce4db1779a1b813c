"""Networks that symbols do not get through: their BatchNorms are found by ``torch.export`` on calibrated shapes."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import convert_and_warn, norms_in, randomize_norms, run
from deploy.test_forward_without_norm import NormAct
from gaqat_optim import QuantConfig, convert, quantize_model, rounded_biases

W2A2 = QuantConfig(2, 2, first_last_bits="same")


class Network(nn.Module):
    """Branches on a shape, takes keywords and returns a dictionary."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way = way
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), NormAct(8, nn.ReLU())

    def forward(self, x, **kwargs):
        if x.shape[0] > 64 or x.dim() != 4:
            raise ValueError("too large")
        y = self.conv1(x)
        y = self.bn1(y) if self.way != "values" or y.sum() > 0 else y
        h = F.relu(y)
        y = self.bn2(self.conv2(h))
        if self.way == "operand used again":
            y = y + h
        if self.way == "layer used twice":
            y = self.conv2(y)
        elif self.way == "norm used twice":
            y = self.bn1(y)
        elif self.way == "same norm used at once":
            y = self.bn1(self.conv1(x)) + y
        elif self.way == "statistics read":
            y = y + self.bn1.running_mean.sum()
        return OrderedDict(out=y)


X = torch.rand(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def quantized(way):
    torch.manual_seed(0)
    return quantize_model(randomize_norms(Network(way)), W2A2, calibration=X).eval()


def test_norms_are_folded_and_biases_rounded():
    model = quantized("plain")
    deployed = convert(model)
    assert norms_in(deployed) == []
    assert deployed.conv1.folded
    assert deployed.conv2.folded
    expected = run(deployed, X)["out"]
    with rounded_biases(model):
        actual = run(model, X)["out"]
    assert ((actual - expected).abs() <= 1e-5 * expected.abs().max()).float().mean() > 0.99


@pytest.mark.parametrize(
    ("way", "left"),
    [
        ("operand used again", []),
        ("layer used twice", ["bn2"]),
        ("norm used twice", ["bn1"]),
        ("same norm used at once", ["bn1"]),
        ("statistics read", ["bn1"]),
    ],
)
def test_what_is_used_twice_stays(way, left):
    model = quantized(way)
    assert norms_in(convert_and_warn(model) if left else convert(model)) == left


class Blocks(nn.Module):
    """As timm's efficientvit, whose attention is a block without autocast."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.bn2, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.conv1(x if x.shape[0] < 64 else x + 0)
        with torch.autocast("cpu", enabled=False):
            a, b = F.relu(self.bn1(y)).chunk(2, 1)
            z = self.conv2(torch.cat([b, a], 1))
        with torch.no_grad():
            factor = x.mean() + 1
        return self.last(F.relu(self.bn2(z))) * factor


def test_with_blocks_are_seen_through():
    model = quantize_model(randomize_norms(Blocks()), QuantConfig(4, 4, init="lsq"), calibration=X)
    assert [getattr(model, name).weight_quantizer.bits for name in ("conv1", "conv2", "last")] == [8, 4, 8]
    assert norms_in(convert(model)) == []


def test_a_cast_network_is_traced_too():
    assert norms_in(convert(quantized("plain").double())) == []


def test_branches_on_values_are_refused_with_both_reasons(capfd):
    model = quantized("values")
    with pytest.warns(UserWarning, match="Network cannot be traced.*TraceError.*Nor by torch.export") as caught:
        deployed = convert(model)
    assert caught[0].filename == __file__
    assert norms_in(deployed) == ["bn1", "bn2"]
    assert "def forward" not in capfd.readouterr().err  # torch prints the graph as far as it came


def test_without_a_calibration_the_warning_says_so():
    model = quantize_model(Network(), W2A2).train()
    model(X)
    with pytest.warns(UserWarning, match="After a calibration, torch.export would be tried"):
        deployed = convert(model)
    assert norms_in(deployed) == ["bn1", "bn2"]


def test_the_recorded_inputs_hold_no_data_and_are_copied():
    model = quantized("plain")
    (x,), _ = model._calibration_inputs
    assert x.is_meta
    assert x.shape == X.shape
    assert list(model.state_dict()) == list(quantize_model(Network(), W2A2).state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert norms_in(convert(other)) == []
    assert torch.equal(run(convert(model), X)["out"], run(convert(model), X)["out"])


class Attention(nn.Module):
    """Takes and returns mappings, branches on shapes, and has layers that no order of registration tells."""

    def __init__(self):
        super().__init__()
        self.head, self.head2 = nn.Linear(8, 2), nn.Linear(8, 2)
        self.conv2, self.bn2, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv1, self.bn1, self.stem = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, pixels, mask=None, **kwargs):
        if pixels.shape[-1] > 64:
            raise ValueError("too large")
        y = F.gelu(self.bn1(self.conv1(pixels)) + self.stem(pixels))
        y = self.act(self.bn2(self.conv2(y)) + y)
        y = self.drop(y.mean((2, 3)) if mask is None else (y * mask).mean((2, 3)))
        return {"one": self.head(y), "two": self.head2(y)}


BATCH = {"pixels": X, "mask": torch.ones(16, 1, 8, 8), "labels": torch.zeros(16)}


def batches():
    """An iterator: what was taken of it is gone."""
    yield BATCH
    yield BATCH


def test_first_last_and_output_quantizers_are_found_on_a_calibration_batch():
    torch.manual_seed(0)
    net = randomize_norms(Attention())
    model = quantize_model(net, QuantConfig(4, 4, output_bits=8), calibration=batches()).eval()
    bits = {name: m.weight_quantizer.bits for name, m in model.named_modules() if hasattr(m, "weight_quantizer")}
    assert bits == {"conv1": 8, "stem": 8, "conv2": 4, "head": 8, "head2": 8}
    outputs = {name for name, m in model.named_modules() if getattr(m, "output_quantizer", None) is not None}
    assert outputs == {"head", "head2", "bn1", "bn2", "stem"}
    deployed = convert(model)
    assert norms_in(deployed) == []
    mask = BATCH["mask"]
    with rounded_biases(model):
        expected = run(model, X, mask=mask)
    actual = run(deployed, X, mask=mask)
    assert all((expected[key] - actual[key]).abs().max() <= 0.02 * expected[key].abs().max() for key in expected)


def test_the_same_network_is_built_without_calibration():
    config = QuantConfig(4, 4, overrides={"head": {"activation_bits": 6}})
    model = quantize_model(Attention(), config, calibration=[BATCH])
    assert model.quant_config.first_last_bits == "same"
    rebuilt = quantize_model(Attention(), QuantConfig.from_dict(model.quant_config.to_dict()))
    assert rebuilt.quant_config == model.quant_config
    for (name, a), (_, b) in zip(model.named_modules(), rebuilt.named_modules(), strict=True):
        assert getattr(a, "bits", None) == getattr(b, "bits", None), name
    assert (model.head.weight_quantizer.bits, model.head.input_quantizer.bits) == (8, 6)
    order = "Attention cannot be traced symbolically, so first_last_bits goes by the order of its layers: head and stem"
    with pytest.warns(UserWarning, match=order) as caught:
        by_order = quantize_model(Attention(), config)
    assert caught[0].filename == __file__
    assert by_order.quant_config == config
    assert (by_order.head2.weight_quantizer.bits, by_order.stem.weight_quantizer.bits) == (4, 8)


def test_a_failed_quantization_leaves_no_recorded_inputs():
    net = Attention()
    before = set(vars(net))
    with pytest.raises(ValueError, match="not finite"):
        quantize_model(net, calibration=[{**BATCH, "pixels": X / 0}], inplace=True)
    assert set(vars(net)) == before
    quantize_model(net, calibration=[BATCH], inplace=True)
    assert set(vars(net)) - before == {"_calibration_inputs", "_float_layers", "quant_config"}


def test_a_cache_that_forward_fills_is_emptied_again():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cache, self.log = nn.Linear(4, 4), {}, []

        def forward(self, x):
            if x.shape[0] > 64:
                raise ValueError("too large")
            self.cache["x"] = self.layer(x)
            self.log.append(self.cache["x"])
            return self.cache["x"] + self.layer(x)

    model = Caching()
    with torch.no_grad():
        quantize_model(model, W2A2, calibration=torch.rand(8, 4), inplace=True)
    assert [type(v) for v in (*model.cache.values(), *model.log)] == [torch.Tensor] * 2  # of the calibration
    convert(model)
    assert len(model.log) == 1
