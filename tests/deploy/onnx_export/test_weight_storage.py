"""How weights are stored: with the same results and kernels, in as few bytes as they have bits."""

import warnings
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from deploy.deploy_networks import images, randomize_norms, trained
from deploy.onnx_runs import LEVELS, STORAGES, quantized
from gaqat_optim import QuantConfig, convert, export_onnx, quantize_model
from gaqat_optim.deploy.bit_planes import pack_bits
from gaqat_optim.deploy.nn.base import DeployLayer
from torchvision_import import import_torchvision


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A residual network at W3A3, in every storage: (model, reports by storage)."""
    folder = tmp_path_factory.mktemp("written")
    model = trained("resnet", QuantConfig(3, 3))
    return model, {
        storage: export_onnx(model, images(8), folder / f"{storage}.onnx", storage=storage, check=False)
        for storage in STORAGES
    }


def compiled(path, level="optimized", without_vnni=False):
    """Output on some images, and the operators that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # that the optimized graph belongs to this machine
    options.optimized_model_filepath = str(path) + ".optimized"
    if without_vnni:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = [64, *session.get_inputs()[0].shape[1:]]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(7)).numpy()
    return session.run(None, {"input": x})[0], Counter(
        n.op_type for n in onnx.load(str(path) + ".optimized").graph.node
    )


def all_the_same(paths):
    """The results of all storages are equal to the bit, and an optimizing onnxruntime runs the same operators."""
    for settings in ({"level": "as written"}, {"level": "optimized"}, {"level": "optimized", "without_vnni": True}):
        found = [compiled(path, **settings) for path in paths]
        assert all(np.array_equal(found[0][0], y) for y, _ in found[1:])
        if settings["level"] == "optimized":
            assert all(found[0][1] == operators for _, operators in found[1:])
    return found[0][1]


def test_narrow_storage_is_smaller_and_computes_the_same(written):
    reports = written[1]
    assert reports["auto"].bytes < 0.75 * reports["int8"].bytes
    assert reports["auto"].compression > 1.33 * reports["int8"].compression
    print({storage: (report.bytes, report.compression) for storage, report in reports.items()})
    assert all_the_same([report.path for report in reports.values()])["QLinearConv"] == 2


def test_all_bits_and_odd_counts(tmp_path):
    """45 weights leave bits unused. Codes are not shifted up without a bias."""
    bits_of = {"0": 8, "1": 2, "2": 3, "3": 4, "4": 5, "5": 6, "6": 7, "7": 2, "8": 7, "9": 3}
    layers = [nn.Linear(*((9, 5), (5, 9))[i % 2], bias=i < 7) for i in range(len(bits_of))]
    x = torch.rand(16, 9)
    overrides = {name: {"weight_bits": bits} for name, bits in bits_of.items()}
    model = quantized(nn.Sequential(*layers), x, QuantConfig(4, 4, first_last_bits="same", overrides=overrides))
    deployed = dict(convert(model).named_children())
    assert [layer.weight_bits for layer in deployed.values()] == list(bits_of.values())
    assert [layer.shift > 0 for layer in deployed.values()] == [0 < i < 7 for i in range(len(bits_of))]
    paths = []
    for storage in STORAGES:
        paths.append(tmp_path / f"{storage}.onnx")
        export_onnx(model, x, paths[-1], storage=storage, check=False)
    assert all_the_same(paths)["QGemm"] >= 7
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(paths[-1]).graph.initializer}
    for name, layer in deployed.items():
        codes, bits = layer.codes.numpy(), bits_of[name]
        expected = codes if bits == 8 else pack_bits(codes >> layer.shift, bits)
        assert stored[f"{name}.codes"].dtype == expected.dtype
        assert np.array_equal(stored[f"{name}.codes"], expected)


def test_the_weights_in_the_file_are_the_codes(written):
    model, reports = written
    deployed = {name: m for name, m in convert(model).named_modules() if isinstance(m, DeployLayer)}
    for storage, report in reports.items():
        assert [f for f in report.path.parent.glob(f"{storage}.onnx*") if f.suffix != ".optimized"] == [report.path]
        stored = {tensor.name: tensor for tensor in onnx.load(report.path).graph.initializer}
        for name, layer in deployed.items():
            tensor = stored[f"{name}.codes"]
            codes, kind = layer.codes.numpy(), onnx.TensorProto.INT8
            if name == "stem.0":  # of 8 bits, and in floating point: unsigned bytes
                codes, kind = codes.view(np.uint8) ^ np.uint8(128), onnx.TensorProto.UINT8
            if storage != "int8" and layer.weight_bits < 8:
                codes = codes >> layer.shift  # as they were trained
                kind = onnx.TensorProto.INT4
            if storage == "packed" and layer.weight_bits < 8:
                codes, kind = pack_bits(codes, layer.weight_bits), onnx.TensorProto.UINT8
            assert tensor.data_type == kind
            found = onnx.numpy_helper.to_array(tensor)
            assert np.array_equal(found if kind == onnx.TensorProto.UINT8 else found.astype(np.int8), codes)
            bias = onnx.numpy_helper.to_array(stored[f"{name}.bias_codes"])
            assert bias.dtype == np.int32
            assert np.array_equal(bias, layer.bias_codes.numpy())


@pytest.mark.parametrize("level", LEVELS)
def test_onnxruntime_computes_scales_and_zero_points_of_biases(level, written):
    """Of 32 channels: a float32 product, the same bits on every machine, and zeros. The file has neither."""
    model, reports = written
    proto = onnx.load(reports["auto"].path)
    bias = next(
        node
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] == "blocks.1.conv1.bias_codes"
    )
    names = bias.input[1:]
    assert not {tensor.name for tensor in proto.graph.initializer} & set(names)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    scale, zero_points = session.run(names, {"input": images(1).numpy()})
    assert np.array_equal(scale, convert(model).blocks[1].conv1.accumulator_scale.numpy())
    assert (zero_points.dtype, zero_points.shape, zero_points.any()) == (np.int32, (32,), False)


@pytest.mark.parametrize(
    ("bits", "storage", "ratio"),
    [(4, "auto", 7.4), (2, "packed", 14), pytest.param(3, "packed", 9.7, marks=pytest.mark.slow)],
)
def test_a_file_against_the_fp32_file(bits, storage, ratio, tmp_path):
    """Nearly all weights are in the middle layer, so the ratio is nearly that of the bits."""
    torch.manual_seed(0)
    x = torch.rand(8, 8)
    net = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4))
    model = quantize_model(net, QuantConfig(bits, bits, init="lsq"), calibration=x)
    report = export_onnx(model, x, tmp_path / "net.onnx", storage=storage, check=False)
    assert fp32_bytes(net, x, tmp_path / "fp32.onnx") / report.bytes >= ratio


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "storage", "ratio", "with_1000_classes"),
    [(4, "auto", 7.7, 7.2), (3, "packed", 10.2, 9.1), (2, "packed", 15, 12.3)],
)
def test_resnet50_against_the_fp32_file(bits, storage, ratio, with_1000_classes, resnet50, tmp_path):
    """About 12 seconds each, nearly all of it in torch's exporter.

    The classifier, of 8 bits and 2048 weights for each class, is a ninth of the network with 1,000 classes. Its other
    990 classes cost the fp32 file 4 bytes for each weight and bias, and this one 1 and 4, a scale of 4 and a zero point
    of 1: of the larger network the sizes follow, without another export.
    """
    model, x, fp32_bytes = resnet50
    config = QuantConfig(bits, bits)
    report = export_onnx(
        quantize_model(model, config, calibration=x), x, tmp_path / "net.onnx", storage=storage, check=False
    )
    more = 990
    large = (fp32_bytes + more * 4 * (2048 + 1)) / (report.bytes + more * (2048 + 4 + 4 + 1))
    print(f"W{bits} {storage}: {report.bytes:,} bytes, {fp32_bytes / report.bytes:.2f}x; 1000 classes {large:.2f}x")
    assert fp32_bytes / report.bytes >= ratio
    assert large >= with_1000_classes


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """ResNet-50 with 10 classes and BatchNorms that were used, an input, and the size of its file in float32."""
    import_torchvision()
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model, x = randomize_norms(resnet50(num_classes=10)).eval(), torch.rand(2, 3, 64, 64)
    return model, x, fp32_bytes(model, x, tmp_path_factory.mktemp("fp32") / "net.onnx")


def fp32_bytes(model, x, path):
    """The size of the file that torch makes of a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own, of torch's internals
        torch.onnx.export(
            model.eval(),
            (x,),
            path,
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    return path.stat().st_size
