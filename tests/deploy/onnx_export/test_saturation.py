"""The proof that the integer products of a graph are exact without VNNI."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx.numpy_helper import from_array

from deploy.byte_products import product, with_signed_weights
from deploy.deploy_networks import CONFIGS, images, trained
from deploy.onnx_runs import damage_graph, saturating
from deploy.saturating_runtime import saturating_matmul
from gaqat_optim import QuantConfig, export_onnx
from gaqat_optim.deploy.onnx_export import export as exporting


def test_a_file_without_the_bounds_of_its_codes_is_not_written(resnet, tmp_path, monkeypatch):
    right = exporting.shorten_names

    def damaging(graph):
        right(graph)
        damage_graph(graph, "no clip")

    monkeypatch.setattr(exporting, "shorten_names", damaging)
    with pytest.raises(RuntimeError, match=r"not exact .* 'blocks\.0\.conv1': inputs up to 255 times two weights"):
        export_onnx(resnet[0], images(64), tmp_path / "net.onnx")


def test_a_file_that_is_not_exact_is_not_written(tmp_path, monkeypatch):
    """Were the weights left as they are, the error would name the layers."""
    monkeypatch.setattr(exporting, "make_exact", lambda graph: None)
    model, x = trained("cnn", QuantConfig(4, 4)), images(8)
    with pytest.raises(RuntimeError, match=r"x86 without VNNI\). '0': inputs up to 255 times two weights .*; '11': "):
        export_onnx(model, x, tmp_path / "net.onnx", check=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_says_of_itself_is_not_believed(tmp_path):
    model, x = trained("cnn", CONFIGS["W8A8"]), images(8)
    path = export_onnx(model, x, tmp_path / "net.onnx", check=False).path
    wrong = with_signed_weights(path, tmp_path / "wrong.onnx")
    expected = [found.reason for found in saturating(wrong)]
    assert len(expected) == 4
    forged = copy.deepcopy(wrong)
    for number, node in enumerate(forged.graph.node):
        node.name = f"exact.{number}"
        for entry in node.metadata_props:
            entry.value = {"gaqat.weight_bits": "2"}.get(entry.key, "none")
    assert [found.reason for found in saturating(forged)] == expected
    for node in forged.graph.node:
        del node.metadata_props[:]
    assert [found.reason for found in saturating(forged)] == expected
    assert not any(node.metadata_props for node in forged.graph.node)


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
    assert [saturating(proto) for proto in exact] == [[]] * len(exact)
    assert [[found.name for found in saturating(proto)] for proto in inexact] == [["p"]] * len(inexact)


def test_one_large_weight_in_a_channel_is_exact_and_two_are_not():
    weight = np.zeros((6, 5), np.int8)
    weight[2] = 127
    assert saturating(product("QDQ", "u", "s", weight=weight)) == []
    weight[5, 3] = 2
    (found,) = saturating(product("QDQ", "u", "s", weight=weight))
    assert found.reason == "inputs up to 255 times two weights that add up to 129 are 32895, beyond 16 bits"
    weight[5, 3] = -128
    assert saturating(product("QDQ", "u", "s", weight=weight)) == []  # They cancel each other.


def test_a_float_weight_beside_a_dequantized_input_is_not_exact():
    """onnxruntime makes signed bytes of it, up to 127."""
    proto = product("QDQ", "u", "u", weight=np.zeros((6, 5), np.uint8))
    matmul = proto.graph.node[-1]
    proto.graph.initializer.append(from_array(np.zeros((6, 5), np.float32), "float"))
    matmul.input[1] = "float"
    assert [found.name for found in saturating(proto)] == ["p"]
    matmul.input[0] = matmul.input[1]
    assert saturating(proto) == []


def test_an_operator_that_is_not_known_is_not_exact():
    proto = product("QDQ", "u", "u", weight=np.zeros((6, 5), np.uint8))
    node = helper.make_node("QAttention", ["a", "b", "scale"], ["z"], name="attention", domain="com.microsoft")
    proto.graph.node.append(node)
    assert [found.name for found in saturating(proto)] == ["attention"]
    node = helper.make_node("FusedMatMul", ["af", "bf"], ["z"], name="floats", domain="com.microsoft")
    proto.graph.node.pop()
    proto.graph.node.append(node)
    assert saturating(proto) == []


def test_an_input_of_unknown_bytes_is_not_exact():
    proto = product("MatMulInteger", "u", "s", weight=np.full((6, 5), 3, np.int8))
    assert saturating(proto) == []
    proto.graph.node.insert(0, helper.make_node("Mystery", ["x"], ["a"], domain="elsewhere"))
    del proto.graph.input[:]
    assert [found.reason for found in saturating(proto)] == ["the type and the range of an operand are not known"]


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
    proven = saturating(proto) == []
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
