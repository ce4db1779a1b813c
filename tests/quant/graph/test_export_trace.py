"""Networks that symbols do not get through: their BatchNorms are found by ``torch.export`` on calibrated shapes."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import norms_in, randomize_norms, run
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
    assert norms_in(convert(model)) == left


def test_a_cast_network_is_traced_too():
    assert norms_in(convert(quantized("plain").double())) == []


def test_branches_on_values_are_refused_with_both_reasons():
    model = quantized("values")
    with pytest.warns(UserWarning, match="Network cannot be traced.*TraceError.*Nor by torch.export") as caught:
        deployed = convert(model)
    assert caught[0].filename == __file__
    assert norms_in(deployed) == ["bn1", "bn2"]


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
