"""What torch's exporter would write to the log of every export."""

import logging
import sys

import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from gaqat_optim import export_onnx, quantize_model


def test_without_torchvision_its_operators_are_not_listed(tmp_path, monkeypatch, caplog):
    ONNXRegistry.from_torchlib.cache_clear()  # which says what it lacks when it is made: tests/conftest.py
    monkeypatch.setitem(sys.modules, "torchvision", None)
    net = quantize_model(nn.Linear(8, 4), calibration=torch.rand(4, 8))
    caplog.set_level(logging.WARNING)
    export_onnx(net, torch.rand(4, 8), tmp_path / "net.onnx", check=False)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert not logging.getLogger("torch.onnx._internal.exporter._registration").filters
