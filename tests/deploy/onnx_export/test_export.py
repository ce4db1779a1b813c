"""``export_onnx``: the file in onnxruntime, against the converted network."""

import copy
import os
import subprocess
import sys

import onnx
import pytest
import torch
from torch import nn

from deploy.deploy_networks import CONFIGS, NETWORKS, cnn, images, randomize_norms, trained
from deploy.onnx_runs import LEVELS, NEEDS_OPSET_23, STAYS_IN_FLOAT, W4A4, predicts_the_same, quantized, run, run_torch
from gaqat_optim import QuantConfig, convert, export_onnx, quantize_model, scale_parameters
from gaqat_optim.deploy.flat_network import tensors
from gaqat_optim.deploy.onnx_export.report import ExportReport
from gaqat_optim.deploy.onnx_export.verification import out_of_range_inputs


def three_convolutions():
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32, 4))


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
@pytest.mark.cover("values")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("config", CONFIGS)
def test_onnxruntime_computes_what_convert_says(network, config, tmp_path):
    """On the data, and on inputs eight times as large, which a runtime without the Clip would not clip to the range.

    Codes may differ where a float32 value lies within rounding of a tie, mostly at 8 bits.
    """
    model = trained(network, CONFIGS[config])
    x = images(200, seed=7)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    print(f"\n{network} {config}: {report}")
    assert predicts_the_same(report)
    assert report.code_flip_rate <= 1e-3
    assert sum(report.integer_kernels.values()) >= 2
    deployed = convert(model)
    assert report.code_flip_rate_unoptimized <= 1e-3
    inputs = [x, 8 * x, 8 * (x.mean() - x)]
    assert all(torch.equal(a, b) for (a,), b in zip(out_of_range_inputs(x), inputs, strict=True))
    # A code that flips moves the output by about a step of the next layer.
    tolerance = 0.1 if report.code_flip_rate or report.code_flip_rate_unoptimized else 1e-5
    expected = run_torch(deployed, torch.cat(inputs))
    for level in LEVELS:
        found = run(tmp_path / "net.onnx", torch.cat(inputs), level)
        assert (expected - found).abs().max() <= tolerance * expected.abs().max()
    saturated = run_torch(deployed, 8 * x)
    assert (saturated - run_torch(deployed, x)).abs().max() > 0.1 * saturated.abs().max()


@pytest.mark.parametrize("output_bits", [None, 5])
def test_ties_are_rounded_the_same_way(output_bits, tmp_path):
    """With scales that are powers of two all arithmetic is exact, and many sums lie halfway between two codes."""
    x = images(64)
    config = QuantConfig(3, 3, output_bits=output_bits, first_last_bits="same", scale_domain="linear")
    model = quantized(three_convolutions(), x, config)
    with torch.no_grad():
        for scale in scale_parameters(model).values():
            scale.copy_(scale.log2().round().exp2())
        for layer in (model[i] for i in (0, 2, 4, 6)):  # Biases that are integers before they are shifted up.
            accumulator_scale = layer.input_quantizer.scale * layer.weight_quantizer.scale
            layer.bias.copy_((layer.bias / accumulator_scale).round() * accumulator_scale)
    deployed = convert(model)
    report = export_onnx(deployed, x, tmp_path / "net.onnx")
    assert report.integer_kernels["QLinearConv"] >= 2
    assert (report.code_flip_rate, report.max_abs_diff) == (0.0, 0.0)
    ties = []

    def count(quantizer, args, codes):
        ties.append(int((args[0] / quantizer.scale % 1 == 0.5).sum()))

    for layer in (deployed[2], deployed[4], deployed[6]):
        layer.input_quantizer.register_forward_hook(count)
    y = run_torch(deployed, x)
    assert sum(ties) > 500
    for level in LEVELS:
        assert torch.equal(run(tmp_path / "net.onnx", x, level), y)


@pytest.mark.parametrize("count", [1, 8])
def test_the_batch_is_free_for_any_batch_of_the_sample(count, tmp_path):
    model = trained("cnn", CONFIGS["W4A4"])
    export_onnx(model, images(count), tmp_path / "net.onnx", check=False)
    for batch in (1, 5, 33):
        x = images(batch, seed=3)
        assert torch.allclose(run(tmp_path / "net.onnx", x), run_torch(convert(model), x), atol=1e-5)


class Twice(nn.Module):
    """One layer called twice, and two with equal scales on one tensor, whose quantizers the exporter merges."""

    def __init__(self):
        super().__init__()
        self.shared, self.left = nn.Linear(16, 16), nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)

    def forward(self, x):
        x = torch.relu(self.shared(torch.relu(self.shared(x) + self.shared(x).exp())))
        return self.left(x) + self.right(x) + self.right(x).exp()


def in_dtype(dtype):
    return randomize_norms(cnn()).to(dtype), images(8).to(dtype), {"QLinearConv": 2, "QGemm": 1}


# What to export, an input, and the integer kernels that have to be found.
CASES = {
    "linear alone": lambda: (nn.Linear(16, 8), torch.rand(8, 16), {"QGemm": 1}),
    "tokens": lambda: (
        nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)),
        torch.randn(8, 5, 16),
        {"QGemm": 2},
    ),
    "used twice": lambda: (Twice(), torch.rand(8, 16), {"QGemm": 4}),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 8)),
        torch.arange(12).reshape(4, 3) % 9,
        {"QGemm": 1},
    ),
    "conv1d": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 8, 3, dilation=2, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3, groups=4),
        ),
        torch.rand(8, 4, 16),
        {"QLinearConv": 1},
    ),
    "conv3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, 2, groups=8)),
        torch.rand(4, 2, 6, 6, 6),
        {"QLinearConv": 1},
    ),
    "paddings": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        ),
        torch.rand(4, 2, 8, 8),
        {"QLinearConv": 1},
    ),
    "float64": lambda: in_dtype(torch.float64),
    "bfloat16": lambda: in_dtype(torch.bfloat16),
}


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
@pytest.mark.parametrize("case", CASES)
def test_other_layers_and_inputs(case, tmp_path):
    model, x, expected = CASES[case]()
    model = quantize_model(model, W4A4, calibration=x)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.integer_kernels == expected
    assert predicts_the_same(report)
    assert report.code_flip_rate <= 1e-3
    assert report.max_abs_diff <= 1e-5
    x = x.float() if x.is_floating_point() else x
    y = run_torch(convert(model).float(), x)
    for level in LEVELS:
        found = run(tmp_path / "net.onnx", x, level)
        assert found.shape == y.shape
        assert torch.allclose(found, y, atol=1e-5)


def test_signed_narrow_codes_do_not_keep_a_convolution_from_the_integers(tmp_path):
    """Its input is unsigned, after a ReLU, and its output signed; onnxruntime wants one type for both."""
    x = images(16)
    net = three_convolutions()
    net[1] = nn.Hardswish()  # which no integer kernel contains
    model = quantized(net, x, QuantConfig(4, 4, output_bits=5))
    assert model[0].output_quantizer.signed
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.integer_kernels == {"QLinearConv": 3, "QGemm": 1}
    assert report.float_kernels == {}
    assert predicts_the_same(report)
    assert report.code_flip_rate <= 1e-3


def test_output_bits_bring_the_convolutions_before_an_addition_to_the_integers(tmp_path):
    x = images(32)
    with pytest.warns(UserWarning, match=STAYS_IN_FLOAT):
        plain = export_onnx(trained("resnet", CONFIGS["W4A4"]), x, tmp_path / "plain.onnx")
    output = export_onnx(trained("resnet", QuantConfig(4, 4, output_bits=8)), x, tmp_path / "output.onnx")
    convolutions = 6
    assert sum(plain.float_kernels.values()) == convolutions - plain.integer_kernels["QLinearConv"] > 0
    assert output.float_kernels == {}
    assert output.integer_kernels["QLinearConv"] == convolutions
    assert predicts_the_same(output)


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
@pytest.mark.parametrize("opset", [22, pytest.param(23, marks=[NEEDS_OPSET_23, pytest.mark.slow])])
def test_a_later_opset(opset, tmp_path):
    x = images(8)
    report = export_onnx(trained("cnn", CONFIGS["W4A4"]), x, tmp_path / "net.onnx", opset=opset)
    assert {entry.version for entry in onnx.load(report.path).opset_import} == {opset}
    assert (report.opset, report.integer_kernels["QLinearConv"]) == (opset, 2)
    assert predicts_the_same(report)


def test_the_model_stays_as_it_is_and_may_be_converted_already(tmp_path):
    model = trained("cnn", CONFIGS["W4A4"]).train()
    model[0].eval()
    state = copy.deepcopy(model.state_dict())
    deployed = convert(model).train()
    flags = [m.training for m in [*model.modules(), *deployed.modules()]]
    first = export_onnx(model, images(8), tmp_path / "a.onnx", check=False)
    second = export_onnx(deployed, images(8), str(tmp_path / "b.onnx"), check=False)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert [m.training for m in [*model.modules(), *deployed.modules()]] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in [*model.modules(), *deployed.modules()])


class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.body(x)
        return {"logits": self.head(y.relu()), "rest": (y, [y.sum(1)])}


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
def test_several_outputs(tmp_path):
    x = torch.rand(8, 8)
    model = quantized(ManyOutputs(), x)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert [y.shape for y in tensors(run_torch(convert(model), x))] == [(8, 3), (8, 8), (8,)]
    assert predicts_the_same(report)
    assert report.max_abs_diff <= 1e-5


def refuses(error, message, tmp_path, model=None, sample=None, path="net.onnx", **arguments):
    """The call fails, leaves no file, and the model as it was."""
    model = quantized(nn.Linear(8, 4), torch.rand(8, 8)) if model is None else model
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        export_onnx(model, torch.rand(4, 8) if sample is None else sample, tmp_path / path, **arguments)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    if before is not None:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"storage must be one of 'auto', 'int8', 'packed'; got 'int4'", {"storage": "int4"}),
        (ValueError, r"opset must be an integer of at least 21, .* got 20", {"opset": 20}),
        (ValueError, r"opset must be an integer of at least 21, .* got True", {"opset": True}),
        (ValueError, r"opset 999 is newer than the installed onnx", {"opset": 999}),
        (TypeError, "sample must be a tensor, .* got list", {"sample": [torch.rand(4, 8)]}),
        (ValueError, r"at least one entry on axis 0, got shape \(0, 8\)", {"sample": torch.rand(0, 8)}),
        (ValueError, "sample has values that are not finite", {"sample": torch.full((4, 8), torch.nan)}),
        (TypeError, "got str", {"model": "model"}),
        (ValueError, "Linear has no quantized layers", {"model": nn.Linear(8, 4)}),
        (ValueError, "quantizer 'input_quantizer' has no scale yet", {"model": quantize_model(nn.Linear(8, 4))}),
        (FileNotFoundError, "the folder of .* does not exist", {"path": "nowhere/net.onnx"}),
        (RuntimeError, "shapes cannot be multiplied", {"sample": torch.rand(4, 7)}),
    ],
)
def test_bad_arguments(error, message, arguments, tmp_path):
    refuses(error, message, tmp_path, **arguments)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "net.onnx").mkdir()
    refuses(IsADirectoryError, "is a folder", tmp_path)


class NeedsTheBatch(nn.Module):
    """Networks that cannot be one graph for every batch size, or for all values."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer = way, nn.Linear(8, 4)

    def forward(self, x):
        y = self.layer(x)
        if self.way == "one batch":
            return y * torch.arange(4.0).reshape(4, 1)
        if self.way == "a branch":
            return y if len(x) == 4 else y + 1
        if self.way == "another rank":
            return y.squeeze(0)
        if self.way == "one value":
            return y if bool(x.max() < 1e6) else y + 1
        return (y > 0).nonzero() if bool((x > 0).all()) else y


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("one batch", "cannot export NeedsTheBatch for any batch size: .* 4 only"),
        ("a branch", "cannot export NeedsTheBatch for any batch size: .* 4 only"),
        ("another rank", "graph of NeedsTheBatch that is not valid: InferenceError"),
        ("one value", "torch cannot export NeedsTheBatch: GuardOnDataDependentSymNode"),
        ("the values", "torch cannot export NeedsTheBatch: GuardOnDataDependentSymNode"),
    ],
)
def test_a_network_that_is_not_one_graph(way, message, tmp_path):
    refuses(RuntimeError, message, tmp_path, model=quantized(NeedsTheBatch(way), torch.rand(4, 8)))


def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    model, x = quantized(nn.Linear(8, 4), torch.rand(8, 8)), torch.rand(4, 8)
    target = tmp_path / "net.onnx"
    target.write_bytes(b"before")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            export_onnx(model, x, target, check=False)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert target.read_bytes() == b"before"
    export_onnx(model, x, target, check=False)
    assert onnx.load(target).producer_name == "gaqat-optim"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir", "onnxscript", "onnxruntime"])
def test_a_missing_extra_names_the_command(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    refuses(ImportError, rf'export_onnx needs {missing}: pip install "gaqat-optim\[onnx\]"', tmp_path)
    if missing == "onnxruntime":
        x = torch.rand(4, 8)
        assert isinstance(
            export_onnx(quantized(nn.Linear(8, 4), x), x, tmp_path / "net.onnx", check=False), ExportReport
        )


def test_importing_and_converting_need_no_extra():
    code = """
import sys
for name in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
    sys.modules[name] = None
import torch
import gaqat_optim.deploy.onnx_export.export
from gaqat_optim import quantize_model
from gaqat_optim.deploy.convert import convert
x = torch.rand(8, 4)
print(convert(quantize_model(torch.nn.Linear(4, 2), calibration=x))(x).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([8, 2])\n"


class TracedByDynamoAlone(nn.Module):
    """As code that torch's non-strict tracing refuses, and Dynamo takes."""

    def forward(self, x):
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            raise ValueError("cannot be traced like this")
        return x


def test_a_network_that_only_dynamo_can_trace_is_no_float_file(tmp_path):
    x = torch.rand(8, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), TracedByDynamoAlone(), nn.Linear(6, 3))
    model = quantize_model(model, QuantConfig(4, 4), calibration=x)
    # torch 2.8 does not try Dynamo, so that its export fails.
    with pytest.raises(
        RuntimeError, match=r"floating point.*strict=False\) says what stops|cannot be traced like this"
    ):
        export_onnx(model, x, tmp_path / "net.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("exclude", [("2", "5"), ("0", "2")])
def test_channels_last_leaves_no_trace_in_the_file(exclude, tmp_path):
    """torch writes Range and Gather (torch 2.8 a Loop) for a flatten of channels-last values in floating point."""

    def exported(layout):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ).to(memory_format=layout)
        x = torch.randn(4, 3, 8, 8).to(memory_format=layout)
        model = quantize_model(net, QuantConfig(4, 4, output_bits=8, exclude=exclude), calibration=x)
        export_onnx(model, x, tmp_path / "net.onnx")
        assert model[2].weight.is_contiguous(memory_format=layout)  # the user's network stays as it is
        return onnx.load(tmp_path / "net.onnx").graph

    plain, last = map(exported, (torch.contiguous_format, torch.channels_last))
    assert [node.op_type for node in last.node] == [node.op_type for node in plain.node]
    assert [tensor.raw_data for tensor in last.initializer] == [tensor.raw_data for tensor in plain.initializer]
