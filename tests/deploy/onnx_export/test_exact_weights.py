"""Weights of 8 bits are exact without VNNI, on a model of a processor that saturates in 16 bits."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from torch import nn

from deploy.byte_products import product, with_signed_weights
from deploy.deploy_networks import NETWORKS, images, trained
from deploy.onnx_runs import STAYS_IN_FLOAT, STORAGES, run, run_torch, saturating
from deploy.saturating_runtime import optimized, run_without_vnni
from gaqat_optim import QuantConfig, convert, export_onnx, quantize_model
from gaqat_optim.deploy.onnx_export.exact_weights import make_exact


@pytest.mark.cover("values")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_computes_the_same_where_two_products_saturate_in_16_bits(network, bits, storage, tmp_path):
    """In numpy, since this machine may have better instructions. Files with signed bytes of 8 bits are wrong there."""
    model, x = trained(network, QuantConfig(bits, bits, output_bits=8)), images(16, seed=7)
    report = export_onnx(model, x, tmp_path / "net.onnx", storage=storage)
    assert report.float_kernels == {}
    expected = run_torch(convert(model), x)
    assert torch.allclose(run_without_vnni(report.path, x), expected, atol=1e-5)
    before = with_signed_weights(report.path, tmp_path / "before.onnx")
    assert (run(tmp_path / "before.onnx", x, "as written") - expected).abs().median() < 1e-5
    wrong = run_without_vnni(tmp_path / "before.onnx", x)
    assert (wrong - expected).abs().max() > 0.05 * expected.abs().max()
    count = len(saturating(before))
    assert len(saturating(optimized(tmp_path / "before.onnx"))) == count >= 2
    assert saturating(onnx.load(report.path)) == saturating(optimized(report.path)) == []


class Kinds(nn.Module):
    """All kinds of products, each with an input of 8 bits, signed or not, and odd numbers of channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.pointwise = nn.Conv2d(7, 6, 1)
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.strided = nn.Conv2d(4, 5, 3, stride=2, padding=1, dilation=2)
        self.sequence = nn.Conv1d(5, 6, 3, padding=1)
        self.tokens, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.pointwise(torch.relu(self.stem(x))))
        x = torch.relu(self.depthwise(torch.nn.functional.hardswish(self.grouped(x))))
        x = torch.relu(self.strided(torch.relu(self.up(x))))
        x = torch.nn.functional.hardswish(self.sequence(x.flatten(2)))
        return self.head(torch.relu(self.tokens(x.transpose(1, 2)))).mean(1)


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
@pytest.mark.parametrize("signed", ["auto", *(pytest.param(fixed, marks=pytest.mark.slow) for fixed in (True, False))])
def test_every_kind_of_product_keeps_its_integer_kernel(signed, tmp_path):
    torch.manual_seed(0)
    x = images(32)
    config = QuantConfig(8, 8, output_bits=8, activation_signed=signed)
    model = quantize_model(Kinds(), config, calibration=x).eval()
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.integer_kernels["QLinearConv"] == 6
    assert report.integer_kernels["QGemm"] == 2
    assert [operator.name for operator in report.float_operators] == ["up"]
    assert (report.top1_agreement, report.top1_agreement_unoptimized) == (1.0, 1.0)
    assert saturating(onnx.load(report.path)) == []


def test_weights_of_8_bits_keep_their_codes_and_their_size(tmp_path):
    """In every storage, which so makes the same file."""
    x = images(16)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)
    )
    model = quantize_model(net, QuantConfig(8, 8, output_bits=8), calibration=x).eval()
    reports = [export_onnx(model, x, tmp_path / f"{name}.onnx", storage=name, check=False) for name in STORAGES]
    assert len({report.path.read_bytes() for report in reports}) == 1
    report = reports[0]
    stored = {t.name: to_array(t) for t in onnx.load(report.path).graph.initializer}
    codes = {name: layer.codes.numpy() for name, layer in convert(model).named_children() if hasattr(layer, "codes")}
    assert np.array_equal(stored["0.codes"], codes["0"])
    assert np.array_equal(stored["5.codes"], codes["5"])
    assert stored["2.codes"].dtype == np.uint8
    assert np.array_equal(stored["2.codes"].astype(int) - 128, codes["2"])
    weights = sum(v.size for v in codes.values())
    assert report.bytes < 1.15 * weights


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "signed", "rewritten"),
    [
        (8, 8, False, True),
        (8, 8, True, True),
        (8, 7, False, False),
        (7, 8, True, False),
        *(
            pytest.param(*case, False, marks=pytest.mark.slow)
            for case in ((8, 7, True), (8, 4, True), (7, 8, False), (6, 8, True), (4, 4, True), (2, 8, True))
        ),
    ],
)
def test_only_weights_that_can_saturate_are_rewritten(weight_bits, activation_bits, signed, rewritten, tmp_path):
    """Others keep signed bytes, whose kernels are the faster ones."""
    x = torch.rand(64, 32) - 0.5 * signed
    config = QuantConfig(weight_bits, activation_bits, activation_signed=signed, first_last_bits="same")
    model = quantize_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), config, calibration=x)
    proto = onnx.load(export_onnx(model.eval(), x, tmp_path / "net.onnx", storage="int8").path)
    gemm = next(node for node in proto.graph.node if node.op_type == "Gemm")
    weight = next(node for node in proto.graph.node if node.output[0] == gemm.input[1])
    stored = {t.name: t.data_type for t in proto.graph.initializer}
    assert stored["0.codes"] == TensorProto.INT8
    assert (weight.input[0] == "0.codes") == (not rewritten)


class NotQuantizedInput(nn.Module):
    """A layer whose input is in floating point by its settings, and of 8 bits by the layer before."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.relu(self.second(self.first(x))).mean((2, 3)))


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
def test_an_input_that_another_layer_quantized_counts(tmp_path):
    x = images(32)
    overrides = {"second": {"activation_bits": None, "weight_bits": 8}}
    config = QuantConfig(4, 4, output_bits=8, first_last_bits="same", overrides=overrides)
    model = quantize_model(NotQuantizedInput(), config, calibration=x).eval()
    assert model.second.input_quantizer is None
    path = export_onnx(model, x, tmp_path / "net.onnx").path
    assert saturating(onnx.load(path)) == []


def test_a_weight_that_is_the_first_operand_is_made_exact():
    weight = np.random.default_rng(0).integers(-128, 128, (4, 6)).astype(np.int8)
    proto = product("QDQ", "s", "u")
    proto.graph.initializer.append(from_array(weight, "a"))
    del proto.graph.input[0]
    assert len(saturating(proto)) == 1
    b = np.random.default_rng(1).integers(0, 256, (6, 5)).astype(np.uint8)
    expected = ReferenceEvaluator(proto).run(None, {"b": b})[0]
    model = ir.from_proto(proto)
    make_exact(model.graph)
    exact = ir.to_proto(model)
    assert saturating(exact) == []
    assert np.array_equal(ReferenceEvaluator(exact).run(None, {"b": b})[0], expected)


def test_a_weight_of_several_products_is_made_exact_for_all(tmp_path):
    """For one of them it is exact as it is: its input has 4 bits."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.tied = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
            self.tied.load_state_dict(self.shared.state_dict())

        def forward(self, x):
            return self.tied(torch.relu(self.shared(torch.relu(self.shared(torch.relu(self.first(x)))))))

    x = torch.rand(64, 12)
    config = QuantConfig(8, 8, first_last_bits="same", overrides={"tied": {"activation_bits": 4}})
    model = quantize_model(Shared(), config, calibration=x).eval()
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert saturating(onnx.load(report.path)) == saturating(optimized(report.path)) == []
    assert (report.integer_kernels, report.max_abs_diff) == ({"QGemm": 4}, 0.0)
