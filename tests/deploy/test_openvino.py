"""The exported file in a second runtime, OpenVINO, against ``convert``."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.deploy_networks import CONFIGS, NETWORKS, images, labels, trained
from deploy.parity import in_runtime
from gaqat_optim import QuantConfig, convert, export_onnx, quantize_model
from gaqat_optim.deploy.nn.activation_quantizer import ActivationQuantizer
from gaqat_optim.deploy.onnx_export.verification import recorded_codes, top1
from gaqat_optim.deploy.qdq import QUANTIZER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    openvino = pytest.importorskip("openvino")


def compiled(proto):
    """A function from an input to all outputs of the graph, in float32: some processors would take bfloat16."""
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", options)
    return lambda x: list(model(x.numpy()).values())


def with_codes(proto):
    """The graph with the codes of its activations as further outputs, and the names of their quantizers."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    names = []
    for node in exposed.graph.node:
        for entry in node.metadata_props:
            if entry.key == QUANTIZER:
                names.append(entry.value)
                value = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UINT8, None)
                exposed.graph.output.append(value)
    return exposed, names


@pytest.mark.cover("values")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("config", CONFIGS)
def test_openvino_computes_what_convert_says(network, config, tmp_path):
    """On the data, and on inputs eight times as large, which a runtime without the Clip would not clip to the range.

    OpenVINO adds in another order and multiplies scales before it rounds, so a value within float32's rounding of a tie
    takes the other code: 3e-4 of them at most were seen, at 8 bits behind an addition, and none in most networks. A
    tenth of a percent is allowed, and outputs that differ by one percent of their range. Without the Clip
    it is 19 % of the codes, at W4A4. Of 300 predictions, one may change where two scores are that close.
    """
    model = trained(network, CONFIGS[config])
    export_onnx(model, images(4), tmp_path / "net.onnx", check=False)
    deployed, proto = convert(model), onnx.load(tmp_path / "net.onnx")
    x = images(200, seed=7)
    x = torch.cat([x, 8 * x[:50], 8 * (x.mean() - x[:50])])
    with torch.no_grad(), recorded_codes(deployed) as expected_codes:
        expected = deployed(x).numpy()
    found = compiled(proto)(x)[0]
    agreement = (top1(found) == top1(expected)).mean()
    exposed, names = with_codes(proto)
    offsets = {m.name: m.zero_point for m in deployed.modules() if isinstance(m, ActivationQuantizer)}
    flipped = total = 0
    for name, codes in zip(names, compiled(exposed)(x)[1:], strict=True):
        off = np.abs(codes.astype(np.int64) - offsets[name] - expected_codes[name][0])
        flipped, total = flipped + (off > 0).sum(), total + off.size
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(
        f"\n{network} {config}: top-1 agreement {agreement:.2%}, codes that differ {flipped / total:.1e}, "
        f"outputs by up to {difference:.1e} of their range"
    )
    assert set(names) == set(expected_codes)
    assert agreement >= 1 - 1 / len(x)
    assert flipped / total <= 1e-3
    assert difference <= 0.01


ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish}


@pytest.mark.cover("values")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("output_bits", [None, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_points_between_in_both_runtimes(activation, output_bits, bits, tmp_path):
    """The same predictions as convert, and nearly the same outputs, in onnxruntime and in OpenVINO."""
    torch.manual_seed(0)
    x, function = images(200, seed=7) - 0.5, ACTIVATIONS[activation]
    convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), function(), nn.Conv2d(16, 16, 3, padding=1)]
    net = nn.Sequential(*convolutions, function(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    config = QuantConfig(bits, bits, first_last_bits="same", output_bits=output_bits)
    model = quantize_model(net, config, calibration=x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels(x + 0.5)).backward()
        optimizer.step()
    deployed = convert(model.eval())
    assert 0 < deployed[3].input_quantizer.zero_point < 2 ** (bits - 1) - 1
    with warnings.catch_warnings():  # Of layers in floating point, and of codes at ties, which in_runtime() judges.
        warnings.simplefilter("ignore", UserWarning)
        report = export_onnx(model, x[:4], tmp_path / "net.onnx")
    if output_bits is not None:
        assert report.integer_kernels["QLinearConv"] == 2
    with torch.no_grad():
        expected = deployed(x).numpy()
    proto = onnx.load(report.path)
    for optimized in (False, True):
        assert in_runtime(deployed, proto, x, optimized=optimized).problem is None
    found = compiled(proto)(x)[0]
    assert (top1(found) == top1(expected)).mean() >= 1 - 1 / len(x)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("network", ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp", "resnet"))])
def test_the_storage_changes_nothing(network, tmp_path):
    model, x = trained(network, CONFIGS["W3A3"]), images(33, seed=7)
    found = {}
    for storage in ("int8", "auto", "packed"):
        export_onnx(model, images(4), tmp_path / "net.onnx", storage=storage, check=False)
        found[storage] = compiled(onnx.load(tmp_path / "net.onnx"))(x)[0]
    assert np.array_equal(found["auto"], found["int8"])
    assert np.array_equal(found["packed"], found["int8"])


@pytest.mark.parametrize("groups", [2, 16])
def test_unsigned_weights_of_convolutions_in_groups(groups, tmp_path):
    """Those of 8 bits, which an export stores as unsigned bytes; matrix products of such are not exact in OpenVINO."""
    torch.manual_seed(0)
    x = images(64)
    convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=groups), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 10))
    model = quantize_model(net, QuantConfig(8, 8, output_bits=8), calibration=x).eval()
    path = export_onnx(model, x, tmp_path / "net.onnx", check=False).path
    proto = onnx.load(path)
    assert onnx.TensorProto.UINT8 in {t.data_type for t in proto.graph.initializer if t.name == "2.codes"}
    with torch.no_grad():
        expected = convert(model)(x).numpy()
    assert np.abs(compiled(proto)(x)[0] - expected).max() <= 1e-5 * np.abs(expected).max()
