"""Embeddings are deployed as codes, of which rows are looked up and scaled."""

import onnx
import pytest
import torch
from torch import nn

from gaqat_optim import (
    QuantConfig,
    convert,
    export_onnx,
    load_packed,
    quantization_disabled,
    quantization_summary,
    quantize_model,
    save_packed,
)
from gaqat_optim.deploy.nn.embedding import DeployEmbedding, DeployEmbeddingBag

BAGS = [
    {"mode": "sum"},
    {"mode": "mean", "padding_idx": 2},
    {"mode": "max", "include_last_offset": True},
    {"mode": "max", "padding_idx": 0},
]


@pytest.mark.cover("pairs")
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(
    ("kind", "deployed_kind"), [(nn.Embedding, DeployEmbedding), (nn.EmbeddingBag, DeployEmbeddingBag)]
)
def test_rows_of_codes_are_what_was_trained(kind, deployed_kind, bits, granularity):
    model = nn.Sequential(kind(10, 6, padding_idx=1), nn.Linear(6, 4))
    tokens = torch.randint(10, (32, 3))
    config = QuantConfig(bits, 8, first_last_bits="same", weight_granularity=granularity)
    model = quantize_model(model, config, calibration=tokens).eval()
    deployed = convert(model)
    assert type(deployed[0]) is deployed_kind
    assert deployed[0].codes.dtype == torch.int8
    assert deployed[0].codes.unique().numel() <= 2**bits
    assert torch.equal(deployed[0](tokens), model[0](tokens))
    assert torch.equal(deployed[0].weight, model[0].quantized_weight())
    assert not torch.equal(deployed[0].weight, model[0].weight)
    assert (deployed[0].num_embeddings, deployed[0].padding_idx) == (10, 1)
    record, trained = quantization_summary(deployed, tokens)[0], quantization_summary(model, tokens)[0]
    assert (record.weight_bits, record.bytes, record.macs) == (bits, trained.bytes, 0)
    assert quantization_summary(deployed, tokens).never_called == []


@pytest.mark.parametrize("options", BAGS, ids=str)
def test_bags_of_all_kinds(options):
    bag = quantize_model(nn.Sequential(nn.EmbeddingBag(9, 6, **options)), QuantConfig(3, 8))[0].eval()
    deployed = convert(nn.Sequential(bag))[0]
    tokens, offsets = torch.randint(9, (20,)), torch.tensor([0, 0, 7, 12, 20][: 4 + bag.include_last_offset])
    assert torch.equal(deployed(tokens, offsets), bag(tokens, offsets))
    tokens = tokens.reshape(4, 5)
    assert torch.equal(deployed(tokens), bag(tokens))
    if options["mode"] == "sum":
        weights = torch.rand(4, 5)
        assert torch.equal(deployed(tokens, per_sample_weights=weights), bag(tokens, None, per_sample_weights=weights))


def test_rows_have_the_dtype_of_the_weight_and_follow_a_cast(tmp_path):
    net = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 4)).to(torch.bfloat16)
    tokens = torch.randint(9, (8, 3))
    model = quantize_model(net, QuantConfig(4, 8), calibration=tokens).eval()
    deployed = convert(model)
    assert torch.equal(deployed[0](tokens), model[0](tokens))
    assert deployed(tokens).dtype == torch.bfloat16
    save_packed(model, tmp_path / "net")
    assert torch.equal(load_packed(net.float(), tmp_path / "net")(tokens), deployed(tokens))
    assert deployed.float()(tokens).dtype == torch.float32
    with pytest.raises(ValueError, match="'0' was changed after convert"):
        save_packed(convert(model).half(), tmp_path / "net")


def test_it_gets_no_output_quantizer():
    """A lookup is no product, so that codes behind it would make no kernel faster."""
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    tokens = torch.randint(9, (8, 3))
    model = quantize_model(net, QuantConfig(4, 4, output_bits=4), calibration=tokens)
    assert model[0].output_quantizer is None
    assert model[2].output_quantizer is not None
    with quantization_disabled(model):
        assert torch.equal(model.eval()(tokens), net.eval()(tokens))
    assert convert(model)[2].output_quantizer is not None


# A table of 400 rows of 32 numbers, in the bits of its storage, beside at most 4000 bytes for the rest.
SIZES = {(4, "auto"): 4, (3, "packed"): 3, (6, "packed"): 6, (8, "auto"): 8, (3, "int8"): 8}


SLOW = ((6, "packed"), (8, "auto"))


@pytest.mark.parametrize(
    ("bits", "storage"), [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW)) for case in SIZES]
)
def test_a_file_gathers_codes_in_their_bits(bits, storage, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(400, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    tokens = torch.randint(400, (8, 3))
    config = QuantConfig(bits, 8, first_last_bits="same")
    model = quantize_model(net, config, calibration=tokens).eval()
    report = export_onnx(model, tokens, tmp_path / "net.onnx", storage=storage)
    assert (report.top1_agreement, report.code_flip_rate, report.max_abs_diff) == (1, 0, pytest.approx(0, abs=1e-6))
    assert report.bytes < 400 * 32 * SIZES[bits, storage] / 8 + 4 * 400 + 4000
    assert save_packed(model, tmp_path / "net.packed") < 400 * 32 * bits / 8 + 4 * 400 + 2000
    graph = onnx.load(tmp_path / "net.onnx").graph
    rows = [node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input"]
    assert [{p.key: p.value for p in node.metadata_props}["gaqat.weight_bits"] for node in rows] == [str(bits)]
    largest = max(graph.initializer, key=lambda v: len(v.raw_data))
    assert largest.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


@pytest.mark.parametrize("options", BAGS[:2], ids=str)
def test_bags_in_a_file(options, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(9, 16, **options), nn.Linear(16, 4))
    tokens = torch.randint(9, (8, 5))
    model = quantize_model(net, QuantConfig(4, 8, first_last_bits="same"), calibration=tokens).eval()
    report = export_onnx(model, tokens, tmp_path / "net.onnx")
    assert (report.top1_agreement, report.code_flip_rate) == (1, 0)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert all(v.data_type != onnx.TensorProto.FLOAT or v.dims != [9, 16] for v in graph.initializer)
