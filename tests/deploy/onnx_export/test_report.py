"""``ExportReport``: how a file compares, what runs in floating point and why, what it costs."""

import copy
import re
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.deploy_networks import CONFIGS, images, trained
from deploy.onnx_runs import STAYS_IN_FLOAT, quantized, run, run_torch
from gaqat_optim import QuantConfig, convert, export_onnx, quantization_summary
from gaqat_optim.deploy.onnx_export import export as export
from gaqat_optim.deploy.onnx_export.disagreement import disagreement
from gaqat_optim.deploy.onnx_export.export import float_values
from gaqat_optim.deploy.onnx_export.verification import Comparison, QuantizerFlips, compare, out_of_range_inputs, top1

NOT_THE_SAME = "onnxruntime does not compute the same as convert"

# -- how the file compares ------------------------------------------------------------------------------------------


def test_the_report(tmp_path):
    x = torch.rand(16, 64)
    model = quantized(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4)), x)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    values = 64 * 32 + 32 + 2 * 32 + 32 * 4 + 4
    assert float_values(convert(model)) == values
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
    assert float_values(convert(model)) == 4 * 3 * 9 + 4


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


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A residual network at W3A3, and its file."""
    model = trained("resnet", QuantConfig(3, 3))
    return model, export_onnx(model, images(8), tmp_path_factory.mktemp("resnet") / "net.onnx", check=False).path


def damaged(proto, damage):
    nodes = proto.graph.node
    if damage == "no clip":
        for node in nodes:
            if node.op_type == "Clip":
                del node.input[1:]
    elif damage == "other scale":
        scale = next(t for t in proto.graph.initializer if t.name == "blocks.0.conv1.input_quantizer.scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.02), scale.name))
    else:
        codes = next(t for t in proto.graph.initializer if t.name == "blocks.0.conv2.codes")
        codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]


@pytest.mark.parametrize("damage", ["no clip", "other scale", "other codes"])
def test_the_comparison_sees_a_wrong_file(resnet, damage):
    model, path = resnet
    proto = onnx.load(path)
    damaged(proto, damage)
    x = out_of_range_inputs(images(64))
    right = compare(convert(model), onnx.load(path), x)
    wrong = compare(convert(model), proto, x)
    assert wrong.codes == right.codes > 100_000
    assert wrong.code_flip_rate > max(1e-3, 10 * right.code_flip_rate)
    assert wrong.max_abs_diff > 1e-3


@pytest.mark.parametrize("damage", ["other scale", "other codes"])
def test_a_wrong_file_is_a_warning_that_names_quantizers_and_figures(resnet, damage, tmp_path, monkeypatch):
    model, right = resnet[0], export.shorten_names

    def damaging(proto):
        right(proto)
        damaged(proto, damage)

    monkeypatch.setattr(export, "shorten_names", damaging)
    report, messages = exported(model, images(64), tmp_path / "net.onnx")
    (text,) = [message for message in messages if NOT_THE_SAME in message]
    assert report.code_flip_rate_unoptimized > 1e-3
    assert f"{report.top1_agreement:.2%} of the predictions agree and {report.code_flip_rate:.2%} of the codes" in text
    assert f"without them {report.top1_agreement_unoptimized:.2%} and {report.code_flip_rate_unoptimized:.2%}" in text
    assert re.search(r"the first ones are blocks\.[\w.]+ \(\d+\.\d\d% of its codes, by up to \d+\), blocks\.", text)
    assert "without optimizations: set" not in text  # It is as wrong there.


def test_a_file_without_the_bounds_of_its_codes_is_not_written(resnet, tmp_path, monkeypatch):
    right = export.shorten_names

    def damaging(proto):
        right(proto)
        damaged(proto, "no clip")

    monkeypatch.setattr(export, "shorten_names", damaging)
    with pytest.raises(RuntimeError, match=r"not exact .* 'blocks\.0\.conv1': inputs up to 255 times two weights"):
        export_onnx(resnet[0], images(64), tmp_path / "net.onnx")


class Requantized(nn.Module):
    """A layer that is used again: the 8 bits of its output are quantized to the 8 bits of its own input."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        for _ in range(3):
            x = torch.relu(self.again(x))
        return self.last(x)


def test_two_quantizers_of_8_bits_in_a_row_stay_two(tmp_path):
    x = torch.rand(64, 32)
    model = quantized(Requantized(), x, QuantConfig(7, 8, output_bits=8, first_last_bits="same"))
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.integer_kernels == {"QGemm": 5}
    assert torch.allclose(run(report.path, x), run_torch(convert(model), x), atol=1e-5)
    assert report.max_abs_diff <= 1e-5


def test_what_reading_the_codes_hides_is_a_warning(tmp_path, monkeypatch):
    """onnxruntime makes one quantizer of the two, but not where their codes are read."""
    monkeypatch.setattr(export, "keep_requantizations", lambda proto: None)
    x = torch.rand(64, 32)
    model = quantized(Requantized(), x, QuantConfig(7, 8, output_bits=8, first_last_bits="same"))
    with pytest.warns(UserWarning, match=NOT_THE_SAME) as seen:
        report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.code_flip_rate == report.code_flip_rate_unoptimized == 0.0
    assert report.max_abs_diff > 0.01
    (text,) = [str(w.message) for w in seen]
    assert "The codes were read in another run than the outputs, which differ between these by " in text
    assert "The file is right without optimizations: set graph_optimization_level of " in text


def comparison(flipped, largest, agreeing=1000):
    """Of 10,000 codes: a twentieth of ``flipped`` at the second quantizer, the rest behind it."""
    first = flipped // 20
    quantizers = {
        "a": QuantizerFlips(2000, 0, 0),
        "b": QuantizerFlips(2500, first, min(largest, 1) if first <= 2 else largest),
        "c": QuantizerFlips(5500, flipped - first, largest),
    }
    return Comparison(0.0, quantizers, 1000, agreeing)


def test_when_a_difference_is_a_warning():
    same = comparison(0, 0)
    assert disagreement(same, same, same) is None
    assert disagreement(comparison(10, 1, 990), comparison(10, 1, 990), comparison(10, 1)) is None
    assert disagreement(comparison(0, 0, 989), same, same) is not None
    assert disagreement(same, comparison(0, 0, 989), same) is not None
    ties = disagreement(comparison(40, 3), same, comparison(40, 3))
    assert "the first ones are b (0.08% of its codes, by up to 1), c (0.69% of its codes, by up to 3)" in ties
    assert "The first difference is as rounding makes it" in ties
    assert "The file is right without optimizations" in ties
    saturated = disagreement(comparison(2000, 40, 600), same, comparison(2000, 40, 600))
    assert "the first ones are b (4.00% of its codes, by up to 40), c (34.55%" in saturated
    assert "Rounding does not explain this" in saturated
    assert "Codes differ at 2 of 3 quantizers" in saturated


def test_infinities_and_nans_in_the_output_are_seen():
    from gaqat_optim.deploy.onnx_export.verification import _largest_difference

    a = np.array([1.0, np.inf, -np.inf, np.nan], dtype=np.float32)
    assert _largest_difference(a, a) == 0.0
    assert _largest_difference(a, np.array([1.5, np.inf, -np.inf, np.nan], dtype=np.float32)) == 0.5
    assert np.isnan(_largest_difference(a, np.array([1, np.inf, -np.inf, 0], dtype=np.float32)))


def test_decisions():
    assert top1(np.array([[1, 3, 2]])).tolist() == [1]
    assert top1(np.zeros((2, 5, 7))).shape == (2, 5)
    assert top1(np.zeros((2, 3, 4, 4))).shape == (2, 4, 4)
    assert top1(np.array([-1.0, 1.0])).tolist() == [False, True]
    assert top1(np.array([[-1.0], [1.0]])).tolist() == [[False], [True]]


def test_both_optimization_levels_are_compared(resnet, tmp_path):
    model, _ = resnet
    x = images(64, seed=5)
    with pytest.warns(UserWarning, match=STAYS_IN_FLOAT):
        report = export_onnx(model, x, tmp_path / "net.onnx")
    proto = onnx.load(report.path)
    for optimized, suffix in ((True, ""), (False, "_unoptimized")):
        alone = compare(convert(model), proto, out_of_range_inputs(x), optimized=optimized)
        fields = (alone.max_abs_diff, alone.code_flip_rate, alone.top1_agreement)
        names = ("max_abs_diff", "code_flip_rate", "top1_agreement")
        assert tuple(getattr(report, name + suffix) for name in names) == fields
    # Where onnxruntime goes from one sum to the next code in one step, it rounds in another order.
    assert report.max_abs_diff_unoptimized != report.max_abs_diff
    assert 0 < report.max_abs_diff_unoptimized < 1e-4
    assert report.max_abs_diff_unoptimized == max(
        float((run(report.path, v, "as written") - run_torch(convert(model), v)).abs().max())
        for v in out_of_range_inputs(x)
    )


def test_convert_is_compared_with_the_network_in_training(tmp_path):
    model, x = trained("mlp", CONFIGS["W2A2"]).train(), images(64, seed=6)
    state = copy.deepcopy(model.state_dict())
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    deployed = convert(model)
    expected = (run_torch(model.eval(), x) - run_torch(deployed, x)).abs().max()
    assert report.convert_max_abs_diff == expected.item() > 0
    assert report.convert_top1_agreement == 1.0
    assert "convert against training: top-1 agreement 100.00%" in str(report)
    again = export_onnx(deployed, x, tmp_path / "again.onnx")
    assert again.convert_max_abs_diff is again.convert_top1_agreement is None
    assert "convert against training" not in str(again)


def test_a_bias_of_the_converted_network_that_is_wrong_is_seen(tmp_path, monkeypatch):
    """As far as the rounding of biases goes: here they are rounded to multiples of a thousand."""
    from gaqat_optim.deploy.onnx_export import export as exporting

    def coarse(model):
        deployed = convert(model)
        deployed[1].bias_codes.div_(100_000, rounding_mode="floor").mul_(100_000)
        return deployed

    model, x = trained("mlp", CONFIGS["W4A4"]), images(64, seed=6)
    monkeypatch.setattr(exporting, "convert", coarse)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.top1_agreement == 1.0 > report.convert_top1_agreement
    assert report.convert_max_abs_diff > 0.1


# -- what runs in floating point, and why ----------------------------------------------------------------------------


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


def exported(model, x, path):
    """The report, and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = export_onnx(model, x, path)
    return report, [str(warning.message) for warning in seen]


def test_what_stays_in_floating_point_is_listed_with_the_reason(tmp_path):
    x = images(32)
    model = quantized(Mixed(), x, QuantConfig(4, 4, overrides=MIXED, exclude=("excluded",)))
    report, warned = exported(model, x, tmp_path / "net.onnx")
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
    report, warned = exported(model, x, tmp_path / "net.onnx")
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
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3)),
        OneNorm(),
    ],
    ids=["own forward", "batch statistics", "group norm", "synchronised", "shared norm"],
)
def test_what_the_warning_says_helps_before_a_norm(net, tmp_path):
    x = images(32)
    report, (warned,) = exported(quantized(copy.deepcopy(net), x), x, tmp_path / "without.onnx")
    layers = [operator.name for operator in report.float_operators if operator.setting == "output_bits"]
    assert f"Set output_bits for {', '.join(layers)}: " in warned
    overrides = {name: {"output_bits": 8} for name in layers}
    model = quantized(net, x, QuantConfig(4, 4, first_last_bits="same", overrides=overrides))
    report, warned = exported(model, x, tmp_path / "with.onnx")
    assert (report.float_operators, warned) == ((), [])


def test_a_relu_before_a_signed_quantizer_is_no_obstacle(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(32, 8)
    signed = {"activation_signed": True}
    report, warned = exported(quantized(net, x, QuantConfig(4, 4, **signed)), x, tmp_path / "a.onnx")
    assert (report.float_operators, report.integer_kernels, warned) == ((), {"QGemm": 2}, [])


def test_a_model_that_is_one_layer(tmp_path):
    x = images(8)
    report, warned = exported(quantized(nn.Conv2d(3, 4, 3), x), x, tmp_path / "net.onnx")
    (operator,) = report.float_operators
    assert operator.name == "conv2d"
    assert operator.reason.endswith(
        "one of the network's, and not quantized: set output_bits for it (QuantConfig(output_bits=8))"
    )
    assert len(warned) == 1


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_the_multiply_accumulates_are_those_of_the_summary(resnet, tmp_path):
    model, _ = resnet
    report = export_onnx(model, images(5), tmp_path / "net.onnx", check=False)
    convolutions = 8 * 8 * 16 * 16 * 9 * 2 + 4 * 4 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
    assert report.macs == {"3x3 bits": convolutions, "8x8 bits": 8 * 8 * 3 * 16 * 9 + 32 * 10}
    assert report.macs == quantization_summary(model, images(5)).macs
    assert f"MACs of one sample: {convolutions:,} at 3x3 bits, " in str(report)
