"""``ExportReport``: its figures and its text."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import images
from deploy.onnx_runs import quantized
from gaqat_optim import convert, export_onnx, quantization_summary
from gaqat_optim.deploy.onnx_export.report import count_float_values


def test_the_report(tmp_path):
    x = torch.rand(16, 64)
    model = quantized(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4)), x)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    values = 64 * 32 + 32 + 2 * 32 + 32 * 4 + 4
    assert count_float_values(convert(model)) == values
    assert report.bytes == (tmp_path / "net.onnx").stat().st_size
    assert report.compression == 4 * values / report.bytes
    assert (report.path, report.storage, report.opset) == (tmp_path / "net.onnx", "auto", 21)
    assert report.float_kernels == {}
    text = str(report)
    assert f"net.onnx: {report.bytes:,} bytes" in text
    assert "top-1 agreement 100.00%" in text
    assert "integer kernels: 2 QGemm; in floating point: none" in text
    with pytest.raises(AttributeError):
        report.bytes = 0


def test_folded_batchnorms_count_as_one_bias():
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), torch.rand(8, 3, 6, 6))
    assert count_float_values(convert(model)) == 4 * 3 * 9 + 4


def test_without_check_the_comparison_is_missing(tmp_path):
    model = quantized(nn.Linear(8, 4), torch.rand(8, 8))
    report = export_onnx(model, torch.rand(8, 8), tmp_path / "net.onnx", check=False)
    fields = (
        report.max_abs_diff,
        report.code_flip_rate,
        report.top1_agreement,
        report.integer_kernels,
        report.float_kernels,
    )
    assert fields == (None,) * 5
    assert report.float_operators is report.convert_top1_agreement is report.top1_agreement_unoptimized is None
    assert report.macs == {"4x4 bits": 32}
    assert len(str(report).splitlines()) == 2


def test_the_multiply_accumulates_are_those_of_the_summary(resnet, tmp_path):
    model, _ = resnet
    report = export_onnx(model, images(5), tmp_path / "net.onnx", check=False)
    convolutions = 8 * 8 * 16 * 16 * 9 * 2 + 4 * 4 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
    assert report.macs == {"3x3 bits": convolutions, "8x8 bits": 8 * 8 * 3 * 16 * 9 + 32 * 10}
    assert report.macs == quantization_summary(model, images(5)).macs
    assert f"MACs of one sample: {convolutions:,} at 3x3 bits, " in str(report)
