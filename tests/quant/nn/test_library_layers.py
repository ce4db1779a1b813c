"""Layers of libraries and subclasses: swapped by what they compute, and deployed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaqat_optim import (
    QuantConfig,
    convert,
    export_onnx,
    load_packed,
    quantization_disabled,
    quantize_model,
    save_packed,
)
from gaqat_optim.quant.nn.base import QuantizedModule
from quant.nn.library_layers import Conv2dSame, Linear, Renamed, ScaledStdConv2dSame, StdConv2d, standardized
from torchvision_import import import_torchvision


class Flat(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x).relu())


class Convolved(Flat):
    def forward(self, x):
        return self.head(self.layer(x).relu().flatten(2).mean(2))


CASES = {
    "Linear": (Flat, lambda: Linear(4, 6), (8, 4)),
    "Conv1D": (Flat, lambda: Conv1D(6, 4), (8, 5, 4)),
    "Conv2dSame": (Convolved, lambda: Conv2dSame(4, 6, (3, 4), stride=(2, 3), dilation=(2, 1), groups=2), (8, 4, 9, 8)),
    "StdConv2d": (Convolved, lambda: StdConv2d(4, 6, 3, padding=1, bias=False), (8, 4, 5, 5)),
    "ScaledStdConv2dSame": (Convolved, lambda: ScaledStdConv2dSame(4, 6, 3, stride=2), (8, 4, 7, 6)),
    "static": (Convolved, lambda: ScaledStdConv2dSame(4, 6, 3, padding=1, same_pad=False), (8, 4, 7, 6)),
    "Renamed": (Convolved, lambda: Renamed(4, 6, 3, padding=1), (8, 4, 5, 5)),
    "video": (Convolved, lambda: import_torchvision().models.video.resnet.Conv3DSimple(4, 6), (8, 4, 3, 5, 5)),
}

IMPORTABLE = ("Conv1D", "Renamed", "video")


@pytest.mark.parametrize("case", CASES)
def test_it_is_quantized_and_deployed(case, tmp_path):
    torch.manual_seed(0)
    network, layer, shape = CASES[case]
    model, x = network(layer()), torch.rand(shape)
    quantized = quantize_model(model, QuantConfig(4, 4, first_last_bits="same", output_bits=8), calibration=x)
    assert isinstance(quantized.layer, QuantizedModule)
    assert isinstance(quantized.layer, type(model.layer))
    with quantization_disabled(quantized):
        assert torch.equal(quantized.eval()(x), model.eval()(x))
    quantized.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in quantized.parameters())
    quantized.eval()
    expected = quantized(x)
    for other in (copy.deepcopy(quantized), *([pickle.loads(pickle.dumps(quantized))] if case in IMPORTABLE else [])):
        assert type(other.layer) is type(quantized.layer)
        assert torch.equal(other(x), expected)
    deployed = convert(quantized)
    # Beyond the rounding of the bias, which 4 shifted bits make fine.
    assert (deployed.layer(x) - quantized.layer(x)).abs().max() <= 0.01 * quantized.layer(x).abs().max()
    assert deployed.layer.is_integer
    save_packed(quantized, tmp_path / "net.packed")
    for source in (model, quantized):
        assert torch.equal(load_packed(source, tmp_path / "net.packed")(x), deployed(x))
    report = export_onnx(quantized, x, tmp_path / "net.onnx")
    assert report.code_flip_rate < 1e-3
    assert report.top1_agreement == 1


def test_the_standardized_weight_is_what_is_quantized():
    torch.manual_seed(0)
    layer = StdConv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight.mul_(50).add_(7)
    quantized = quantize_model(nn.Sequential(layer), QuantConfig(8, 8), calibration=torch.rand(4, 2, 5, 5))[0]
    weight = standardized(layer)
    assert (quantized.quantized_weight() - weight).abs().max() < 0.03
    assert quantized.weight is not layer.weight
    assert torch.equal(quantized.weight, layer.weight)
    assert (convert(nn.Sequential(quantized))[0].weight - weight).abs().max() < 0.03
