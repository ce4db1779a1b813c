"""Files are exact without VNNI: proven on the graph, and run on a model of a processor that saturates in 16 bits."""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from torch import nn

from deploy.deploy_networks import CONFIGS, images, trained
from deploy.onnx_runs import STAYS_IN_FLOAT, run, run_torch
from deploy.saturating_runtime import optimized, run_without_vnni, saturating_matmul
from gaqat_optim import QuantConfig, convert, export_onnx, quantize_model
from gaqat_optim.deploy.onnx_export import export as exporting
from gaqat_optim.deploy.onnx_export.exact_weights import make_exact
from gaqat_optim.deploy.onnx_export.saturation import saturating_products

STORAGES = ("auto", "int8", "packed")


def constant_of(proto, name):
    """The bytes of a weight, whatever operators make them."""
    from gaqat_optim.deploy.onnx_export.byte_ranges import ByteRanges

    return ByteRanges(proto).constant(name)


def with_signed_weights(path, target):
    """The file with its 8-bit weights as signed bytes that are read as they are: how files were written before."""
    proto = onnx.load(path)
    graph = proto.graph
    stored = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for product in graph.node:
        if product.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        x, weight = (makers[product.input[i]] for i in (0, 1))
        codes = constant_of(proto, weight.input[0])
        if codes.dtype == np.uint8:
            zero = to_array(stored[weight.input[2]])
            stored[weight.input[0]].CopyFrom(from_array((codes ^ 128).view(np.int8), weight.input[0]))
            stored[weight.input[2]].CopyFrom(from_array(np.zeros(zero.shape, np.int8), weight.input[2]))
        elif makers[x.input[0]].op_type in ("Concat", "Gather"):
            name = weight.input[0]
            while name not in stored:
                name = makers[name].input[0]
            weight.input[0] = name
            x.input[0] = makers[x.input[0]].input[0]
    onnx.save(proto, target)
    return proto


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "bits", "storage"),
    [
        ("mlp", (8, 8), "auto"),
        ("cnn", (8, 8), "packed"),
        ("resnet", (8, 8), "int8"),
        ("mlp", (4, 4), "packed"),
        ("cnn", (4, 4), "int8"),
        ("resnet", (4, 4), "auto"),
    ],
)
def test_a_file_computes_the_same_where_two_products_saturate_in_16_bits(network, bits, storage, tmp_path):
    """In numpy, since this machine may have better instructions. Files with signed bytes of 8 bits are wrong there."""
    model, x = trained(network, QuantConfig(*bits, output_bits=8)), images(16, seed=7)
    report = export_onnx(model, x, tmp_path / "net.onnx", storage=storage)
    assert report.float_kernels == {}
    expected = run_torch(convert(model), x)
    assert torch.allclose(run_without_vnni(report.path, x), expected, atol=1e-5)
    before = with_signed_weights(report.path, tmp_path / "before.onnx")
    assert (run(tmp_path / "before.onnx", x, "as written") - expected).abs().median() < 1e-5
    wrong = run_without_vnni(tmp_path / "before.onnx", x)
    assert (wrong - expected).abs().max() > 0.05 * expected.abs().max()
    count = len(saturating_products(before))
    assert len(saturating_products(optimized(tmp_path / "before.onnx"))) == count >= 2
    assert saturating_products(onnx.load(report.path)) == saturating_products(optimized(report.path)) == []


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
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("signed", [True, False, "auto"])
def test_every_kind_of_product_keeps_its_integer_kernel(signed, storage, tmp_path):
    torch.manual_seed(0)
    x = images(32)
    config = QuantConfig(8, 8, output_bits=8, activation_signed=signed)
    model = quantize_model(Kinds(), config, calibration=x).eval()
    report = export_onnx(model, x, tmp_path / "net.onnx", storage=storage)
    assert report.integer_kernels["QLinearConv"] == 6
    assert report.integer_kernels["QGemm"] == 2
    assert [operator.name for operator in report.float_operators] == ["up"]
    assert (report.top1_agreement, report.top1_agreement_unoptimized) == (1.0, 1.0)
    assert saturating_products(onnx.load(report.path)) == []


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_of_8_bits_keep_their_codes_and_their_size(storage, tmp_path):
    x = images(16)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)
    )
    model = quantize_model(net, QuantConfig(8, 8, output_bits=8), calibration=x).eval()
    report = export_onnx(model, x, tmp_path / "net.onnx", storage=storage, check=False)
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
        (8, 7, True, True),
        (8, 4, True, True),
        (7, 8, True, False),
        (7, 8, False, False),
        (6, 8, True, False),
        (4, 4, True, False),
        (2, 8, True, False),
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
    assert saturating_products(onnx.load(path)) == []


def test_a_weight_that_is_the_first_operand_is_made_exact():
    weight = np.random.default_rng(0).integers(-128, 128, (4, 6)).astype(np.int8)
    proto = product("QDQ", "s", "u")
    proto.graph.initializer.append(from_array(weight, "a"))
    del proto.graph.input[0]
    assert len(saturating_products(proto)) == 1
    b = np.random.default_rng(1).integers(0, 256, (6, 5)).astype(np.uint8)
    expected = ReferenceEvaluator(proto).run(None, {"b": b})[0]
    make_exact(proto)
    assert saturating_products(proto) == []
    assert np.array_equal(ReferenceEvaluator(proto).run(None, {"b": b})[0], expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_of_several_products_is_made_exact_for_all(storage, tmp_path):
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
    report = export_onnx(model, x, tmp_path / "net.onnx", storage=storage)
    assert saturating_products(onnx.load(report.path)) == saturating_products(optimized(report.path)) == []
    assert (report.integer_kernels, report.max_abs_diff) == ({"QGemm": 4}, 0.0)


def test_a_file_that_is_not_exact_is_not_written(tmp_path, monkeypatch):
    """Were the weights left as they are, the error would name the layers."""
    monkeypatch.setattr(exporting, "make_exact", lambda proto: None)
    model, x = trained("cnn", QuantConfig(4, 4)), images(8)
    with pytest.raises(RuntimeError, match=r"x86 without VNNI\). '0': inputs up to 255 times two weights .*; '11': "):
        export_onnx(model, x, tmp_path / "net.onnx", check=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_says_of_itself_is_not_believed(tmp_path):
    model, x = trained("cnn", CONFIGS["W8A8"]), images(8)
    path = export_onnx(model, x, tmp_path / "net.onnx", check=False).path
    wrong = with_signed_weights(path, tmp_path / "wrong.onnx")
    expected = [found.reason for found in saturating_products(wrong)]
    assert len(expected) == 4
    forged = copy.deepcopy(wrong)
    for number, node in enumerate(forged.graph.node):
        node.name = f"exact.{number}"
        for entry in node.metadata_props:
            entry.value = {"gaqat.weight_bits": "2"}.get(entry.key, "none")
    assert [found.reason for found in saturating_products(forged)] == expected
    for node in forged.graph.node:
        del node.metadata_props[:]
    assert [found.reason for found in saturating_products(forged)] == expected
    assert not any(node.metadata_props for node in forged.graph.node)


# -- the proof, on graphs from elsewhere -------------------------------------------------------------------------------

SHAPES = {"u": TensorProto.UINT8, "s": TensorProto.INT8}


def product(kind, first, second, *, clip=None, weight=None):
    """A graph with one product of bytes of the types ``first`` and ``second``, ``"u"`` or ``"s"``.

    The second operand is dynamic without a ``weight``, a constant with one.
    """
    constants, nodes = [], []

    def constant(name, value):
        constants.append(from_array(value, name))
        return name

    inputs = [helper.make_tensor_value_info("a", SHAPES[first], [4, 6])]
    b = "b"
    if weight is None:
        inputs.append(helper.make_tensor_value_info("b", SHAPES[second], [6, 5]))
    else:
        constant("b", weight)
    a = "a"
    types = {"u": np.uint8, "s": np.int8}
    if clip is not None:
        bounds = [constant(f"bound{i}", np.array(v, types[first])) for i, v in enumerate(clip)]
        nodes.append(helper.make_node("Clip", ["a", *bounds], ["clipped"]))
        a = "clipped"
    scale = constant("scale", np.array(0.1, np.float32))
    zeros = [constant(f"zero_{i}", np.array(0, types[t])) for i, t in enumerate((first, second))]
    if kind == "QDQ":
        nodes.append(helper.make_node("DequantizeLinear", [a, scale, zeros[0]], ["af"]))
        nodes.append(helper.make_node("DequantizeLinear", [b, scale, zeros[1]], ["bf"]))
        nodes.append(helper.make_node("MatMul", ["af", "bf"], ["y"], name="p"))
    elif kind == "MatMulInteger":
        nodes.append(helper.make_node("MatMulInteger", [a, b, *zeros], ["y"], name="p"))
    elif kind == "QLinearMatMul":
        operands = [a, scale, zeros[0], b, scale, zeros[1], scale, zeros[0]]
        nodes.append(helper.make_node("QLinearMatMul", operands, ["y"], name="p"))
    else:
        operands = [a, b, scale, scale, *zeros]
        nodes.append(helper.make_node("MatMulIntegerToFloat", operands, ["y"], name="p", domain="com.microsoft"))
    outputs = [onnx.ValueInfoProto(name="y")]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize("kind", ["QDQ", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"])
def test_operands_of_any_type_on_either_side(kind):
    small, large = np.full((6, 5), 64, np.int8), np.full((6, 5), 65, np.int8)
    exact = [
        product(kind, "u", "u"),
        product(kind, "u", "s", weight=small),
        product(kind, "s", "s", weight=small),
        product(kind, "u", "s", clip=(0, 127)),
        product(kind, "u", "s", weight=large, clip=(3, 252)),
        product(kind, "s", "s", weight=large, clip=(-128, 124)),
        product(kind, "u", "u", weight=np.full((6, 5), 255, np.uint8)),
    ]
    inexact = [
        product(kind, "u", "s"),
        product(kind, "s", "s"),
        product(kind, "s", "u"),
        product(kind, "u", "s", weight=large),
        product(kind, "u", "s", weight=-large - 1),
        product(kind, "s", "s", weight=large),
        product(kind, "u", "s", clip=(0, 129)),
        product(kind, "u", "s", weight=large, clip=(3, 253)),
        product(kind, "s", "u", weight=np.full((6, 5), 255, np.uint8)),
    ]
    assert [saturating_products(proto) for proto in exact] == [[]] * len(exact)
    assert [[found.name for found in saturating_products(proto)] for proto in inexact] == [["p"]] * len(inexact)


def test_one_large_weight_in_a_channel_is_exact_and_two_are_not():
    weight = np.zeros((6, 5), np.int8)
    weight[2] = 127
    assert saturating_products(product("QDQ", "u", "s", weight=weight)) == []
    weight[5, 3] = 2
    (found,) = saturating_products(product("QDQ", "u", "s", weight=weight))
    assert found.reason == "inputs up to 255 times two weights that add up to 129 are 32895, beyond 16 bits"
    weight[5, 3] = -128
    assert saturating_products(product("QDQ", "u", "s", weight=weight)) == []  # They cancel each other.


def test_a_float_weight_beside_a_dequantized_input_is_not_exact():
    """onnxruntime makes signed bytes of it, up to 127."""
    proto = product("QDQ", "u", "u", weight=np.zeros((6, 5), np.uint8))
    matmul = proto.graph.node[-1]
    proto.graph.initializer.append(from_array(np.zeros((6, 5), np.float32), "float"))
    matmul.input[1] = "float"
    assert [found.name for found in saturating_products(proto)] == ["p"]
    matmul.input[0] = matmul.input[1]
    assert saturating_products(proto) == []


def test_an_operator_that_is_not_known_is_not_exact():
    proto = product("QDQ", "u", "u", weight=np.zeros((6, 5), np.uint8))
    node = helper.make_node("QAttention", ["a", "b", "scale"], ["z"], name="attention", domain="com.microsoft")
    proto.graph.node.append(node)
    assert [found.name for found in saturating_products(proto)] == ["attention"]
    node = helper.make_node("FusedMatMul", ["af", "bf"], ["z"], name="floats", domain="com.microsoft")
    proto.graph.node.pop()
    proto.graph.node.append(node)
    assert saturating_products(proto) == []


def test_an_input_of_unknown_bytes_is_not_exact():
    proto = product("MatMulInteger", "u", "s", weight=np.full((6, 5), 3, np.int8))
    assert saturating_products(proto) == []
    proto.graph.node.insert(0, helper.make_node("Mystery", ["x"], ["a"], domain="elsewhere"))
    del proto.graph.input[:]
    assert [found.reason for found in saturating_products(proto)] == [
        "the type and the range of an operand are not known"
    ]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(40, 255),
    st.sampled_from([60, 90, 127]),
)
def test_the_proof_holds_where_the_kernel_is_exact_and_only_there(seed, count, channels, high, largest):
    """Of random weights and inputs, in the order of memory that is worst for them."""
    generator = np.random.default_rng(seed)
    weight = generator.integers(-largest - 1, largest + 1, (channels, count)).astype(np.int8)
    proto = product("MatMulInteger", "u", "s", weight=np.ascontiguousarray(weight.T), clip=(0, high))
    proven = saturating_products(proto) == []
    saturates = False
    for channel in range(channels):
        order = np.argsort(weight[channel])
        for worst in (order, order[::-1]):  # The two smallest are neighbours, or the two largest.
            ordered = weight[:, worst]
            a = np.full((1, count), high, np.uint8)
            a[0, 2:] = generator.integers(0, high + 1, max(count - 2, 0))
            exact = a.astype(int) @ ordered.astype(int).T
            saturates |= not np.array_equal(saturating_matmul(a, ordered), exact)
    assert proven == (not saturates)
