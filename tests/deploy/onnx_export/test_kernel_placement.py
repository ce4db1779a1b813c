"""Which layers onnxruntime runs in floating point, and the reasons."""

import copy

import onnx
import pytest
import torch
from torch import nn

from deploy.deploy_networks import images
from deploy.onnx_runs import LEVELS, STAYS_IN_FLOAT, export_with_warnings, quantized, run, run_torch
from gaqat_optim import QuantConfig, convert


class Mixed(nn.Module):
    """Every way to be in floating point."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.pooled = nn.Conv2d(8, 8, 3)
        self.float_weight = nn.Conv2d(8, 8, 1)
        self.float_input = nn.Conv2d(8, 8, 1)
        self.excluded = nn.Conv2d(8, 8, 1)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.body(x)
        x = torch.nn.functional.avg_pool2d(self.pooled(x), 2)
        x = torch.relu(self.float_weight(x))
        x = torch.relu(self.float_input(x))
        x = torch.relu(self.excluded(x)).mean((2, 3))
        x = torch.tanh(self.twice(x))
        x = torch.tanh(self.twice(x))
        return self.head(x) @ torch.ones(4, 4)


MIXED = {
    "float_weight": {"weight_bits": None},
    "float_input": {"activation_bits": None},
}


def test_what_stays_in_floating_point_is_listed_with_the_reason(tmp_path):
    x = images(32)
    model = quantized(Mixed(), x, QuantConfig(4, 4, overrides=MIXED, exclude=("excluded",)))
    report, warned = export_with_warnings(model, x, tmp_path / "net.onnx")
    found = {operator.name: operator for operator in report.float_operators}
    assert len(found) == len(report.float_operators) == sum(report.float_kernels.values())
    reasons = {
        "stem": "its output is not quantized, and read by Add and QuantizeLinear: "
        "set output_bits for it (overrides={'stem': {'output_bits': 8}})",
        "body": "its output is not quantized, and goes into Add: "
        "set output_bits for it (overrides={'body': {'output_bits': 8}})",
        "pooled": "its output is not quantized, and goes into AveragePool: "
        "set output_bits for it (overrides={'pooled': {'output_bits': 8}})",
        "float_weight": "weight in floating point: set weight_bits for it",
        "float_input": "input in floating point: set activation_bits for it",
        "excluded": "Conv2d is not quantized",
        "matmul": "a product of the network's own code, outside of quantized layers",
    }
    assert {name: operator.reason for name, operator in found.items()} == reasons
    assert {name for name, operator in found.items() if operator.has_integers} == {"stem", "body", "pooled"}
    assert {operator.kernel for operator in found.values()} == set(report.float_kernels)
    assert report.integer_kernels == {"QGemm": 3}
    assert len(warned) == 1
    assert warned[0].startswith(f"{STAYS_IN_FLOAT}: 3 ")
    assert "Set output_bits for stem, body, pooled: " in warned[0]


def test_what_the_warning_says_brings_the_layers_to_the_integers(tmp_path):
    x = images(32)
    output = {name: {"output_bits": 8} for name in ("stem", "body", "pooled")}
    model = quantized(Mixed(), x, QuantConfig(4, 4, overrides=MIXED | output, exclude=("excluded",)))
    report, warned = export_with_warnings(model, x, tmp_path / "net.onnx")
    assert warned == []
    assert {o.name for o in report.float_operators} == {"float_weight", "float_input", "excluded", "matmul"}
    assert report.integer_kernels == {"QLinearConv": 3, "QGemm": 3, "QLinearAdd": 1, "QLinearAveragePool": 1}


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OneNorm(nn.Module):
    """One norm for two layers, which so is no part of either."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.norm(self.last(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), OwnForward(4), nn.Conv2d(4, 4, 3)),
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3)),
            marks=pytest.mark.slow,
        ),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)),
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3)),
            marks=pytest.mark.slow,
        ),
        OneNorm(),
    ],
    ids=["own forward", "batch statistics", "group norm", "synchronised", "shared norm"],
)
def test_what_the_warning_says_helps_before_a_norm(net, tmp_path):
    x = images(32)
    report, warned = export_with_warnings(quantized(copy.deepcopy(net), x), x, tmp_path / "without.onnx")
    layers = [operator.name for operator in report.float_operators if operator.setting == "output_bits"]
    assert f"Set output_bits for {', '.join(layers)}: " in warned[-1]
    assert all("BatchNorms that follow quantized layers" in text for text in warned[:-1])  # of `convert`
    overrides = {name: {"output_bits": 8} for name in layers}
    model = quantized(net, x, QuantConfig(4, 4, first_last_bits="same", overrides=overrides))
    report, warned = export_with_warnings(model, x, tmp_path / "with.onnx")
    assert (report.float_operators, warned) == ((), [])


def test_a_relu_before_a_signed_quantizer_is_no_obstacle(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(32, 8)
    signed = {"activation_signed": True}
    report, warned = export_with_warnings(quantized(net, x, QuantConfig(4, 4, **signed)), x, tmp_path / "a.onnx")
    assert (report.float_operators, report.integer_kernels, warned) == ((), {"QGemm": 2}, [])


def test_a_model_that_is_one_layer(tmp_path):
    x = images(8)
    report, warned = export_with_warnings(quantized(nn.Conv2d(3, 4, 3), x), x, tmp_path / "net.onnx")
    (operator,) = report.float_operators
    assert operator.name == "conv2d"
    assert operator.reason.endswith(
        "one of the network's, and not quantized: set output_bits for it (QuantConfig(output_bits=8))"
    )
    assert len(warned) == 1


class Splits(nn.Module):
    """Parts of a layer's output that go to one layer: exchanged, and one alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.mixing, self.part, self.head = (nn.Conv2d(n, m, 1) for n, m in ((3, 8), (8, 8), (3, 8), (8, 4)))

    def forward(self, x):
        y = torch.relu(self.conv(x))
        y = torch.relu(self.mixing(torch.cat(y.chunk(2, 1)[::-1], 1)))
        part, _ = torch.split(y, [3, 5], 1)
        return self.head(torch.relu(self.part(part)))


def test_a_quantizer_before_a_split_keeps_the_layer_before_it_on_integers(tmp_path):
    x = torch.rand(8, 3, 6, 6)
    model = quantized(Splits(), x, QuantConfig(4, 4, first_last_bits="same", output_bits=8))
    report, warned = export_with_warnings(model, x, tmp_path / "net.onnx")
    assert (report.float_operators, report.integer_kernels, warned) == ((), {"QLinearConv": 4}, [])
    assert [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node].count("Split") == 2
    for level in LEVELS:
        assert torch.allclose(run(tmp_path / "net.onnx", x, level), run_torch(convert(model), x), atol=1e-6)
