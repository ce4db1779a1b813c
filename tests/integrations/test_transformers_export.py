"""Networks of transformers through calibration, ``convert`` and ``export_onnx``, with mappings as they take them."""

import onnx
import onnxruntime
import pytest
import safetensors
import torch

from deploy.onnx_runs import predicts_the_same
from gaqat_optim import (
    QuantConfig,
    benchmark_onnx,
    convert,
    export_onnx,
    load_packed,
    quantization_summary,
    quantize_model,
    save_packed,
)

pytestmark = pytest.mark.usefixtures("one_registry")
CONFIGS = {"W8A8": QuantConfig(8, 8), "W4A4": QuantConfig(4, 4)}


def token_inputs(batch=6):
    ids = torch.randint(3, 50, (batch, 10), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def bert(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config), {}, ["logits"]


def gpt2(transformers):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    return model, {"use_cache": False}, ["logits"]


def t5(transformers):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    more = {"decoder_input_ids": torch.arange(24).reshape(6, 4), "use_cache": False}
    return model, more, ["logits", "encoder_last_hidden_state"]


def distilbert(transformers):
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 50, "max_position_embeddings": 16}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)), {}, ["logits"]


def masked_bert(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    return transformers.BertForMaskedLM(config), {}, ["logits"]


NETWORKS = {"bert": bert, "masked_bert": masked_bert, "distilbert": distilbert, "gpt2": gpt2, "t5": t5}


@pytest.mark.parametrize(
    ("network", "config"),
    [("bert", "W4A4"), ("gpt2", "W4A4"), ("t5", "W8A8"), pytest.param("bert", "W8A8", marks=pytest.mark.slow)],
)
def test_the_file_computes_what_convert_does_and_respects_the_mask(transformers, network, config, tmp_path):
    torch.manual_seed(0)
    model, more, outputs = NETWORKS[network](transformers)
    inputs = {**token_inputs(), **more}
    model = quantize_model(model, CONFIGS[config], calibration=[{**inputs, "labels": None}])
    assert quantization_summary(model, inputs).macs
    report = export_onnx(model, inputs, tmp_path / "net.onnx")
    assert (report.top1_agreement, report.top1_agreement_unoptimized, report.convert_top1_agreement) == (1.0, 1.0, 1.0)
    assert report.code_flip_rate <= 1e-3
    # A table is one tensor, whoever uses it: in GPT-2 the head too, in T5 encoder, decoder and head.
    initializers = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert len([value for value in initializers if list(value.dims) == [50, 32]]) == 1

    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    assert [value.name for value in session.get_inputs()] == list(tensors)
    assert [value.name for value in session.get_outputs()] == outputs

    def logits(tensors):
        return torch.from_numpy(session.run(["logits"], {key: value.numpy() for key, value in tensors.items()})[0])

    half = {key: value[:3] for key, value in tensors.items()}  # another batch than the sample's
    with torch.no_grad():
        expected = convert(model)(**half, **{key: inputs[key] for key in inputs.keys() - half.keys()}).logits
    assert torch.equal(logits(half).argmax(-1), expected.argmax(-1))
    assert torch.allclose(logits(half), expected, atol=1e-4)

    # A causal decoder sees what is masked only from the masked places themselves.
    seen = tensors["attention_mask"].bool() if network == "gpt2" else torch.ones_like(logits(tensors)[..., 0]).bool()
    changed = {**tensors, "input_ids": torch.where(tensors["attention_mask"].bool(), tensors["input_ids"], 7)}
    assert not torch.equal(changed["input_ids"], tensors["input_ids"])
    assert torch.equal(logits(changed)[seen], logits(tensors)[seen])
    result = benchmark_onnx(tmp_path / "net.onnx", tmp_path / "net.onnx", batch_size=2, runs=2)
    assert len(result.b.times) == 2


def test_labels_are_an_input_and_a_keyword_that_the_network_swallows_and_never_reads_is_a_warning(
    transformers, tmp_path
):
    """The loss is then an output. And a mask without a zero in the sample is respected all the same."""
    model, _, _ = bert(transformers)
    inputs = {
        **token_inputs(),
        "attention_mask": torch.ones(6, 10, dtype=torch.long),
        "atention_mask": torch.ones(6, 10),
        "labels": torch.arange(6) % 2,
    }
    model = quantize_model(model, CONFIGS["W4A4"], calibration=[{**token_inputs(), "labels": inputs["labels"]}])
    with pytest.warns(UserWarning, match="does not read 'atention_mask', an input of the file"):
        report = export_onnx(model, inputs, tmp_path / "net.onnx")
    assert predicts_the_same(report)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    assert [value.name for value in session.get_outputs()] == ["loss", "logits"]
    feed = {key: value.numpy() for key, value in {**inputs, **token_inputs()}.items()}
    expected = convert(model)(**token_inputs()).logits
    assert torch.allclose(torch.from_numpy(session.run(["logits"], feed)[0]), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*cannot be traced symbolically:UserWarning")
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in (log|cast):RuntimeWarning")
@pytest.mark.parametrize("network", ["distilbert", "gpt2", "bert", "t5"])
def test_output_quantizers_stand_behind_products_alone(transformers, network):
    torch.manual_seed(0)
    model, more, _ = NETWORKS[network](transformers)
    inputs = {**token_inputs(), **more}
    model = quantize_model(model, QuantConfig(4, 4, output_bits=8), calibration=[inputs])
    outputs = [name for name, _ in model.named_modules() if name.endswith("output_quantizer")]
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    assert len(outputs) >= 4
    assert not {f"{table}.output_quantizer" for table in tables} & set(outputs)
    deployed = dict(convert(model).named_modules())
    assert set(outputs) <= deployed.keys()


@pytest.mark.filterwarnings("ignore:.*cannot be traced symbolically:UserWarning")
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in (log|cast):RuntimeWarning")
@pytest.mark.parametrize(
    "network", ["distilbert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bert", "t5"))]
)
def test_with_output_quantizers_the_file_computes_what_convert_does(transformers, network, tmp_path):
    torch.manual_seed(0)
    model, more, _ = NETWORKS[network](transformers)
    inputs = {**token_inputs(), **more}
    model = quantize_model(model, QuantConfig(4, 4, output_bits=8), calibration=[inputs])
    report = export_onnx(model, inputs, tmp_path / "net.onnx")
    assert (report.top1_agreement, report.convert_top1_agreement) == (1.0, 1.0)
    assert report.code_flip_rate <= 1e-3


@pytest.mark.parametrize("network", ["masked_bert", "t5", "gpt2"])
def test_tied_embeddings_are_one_tensor_after_training_packing_and_saving(transformers, network, tmp_path):
    torch.manual_seed(0)
    model, more, _ = NETWORKS[network](transformers)
    inputs = {**token_inputs(), **more}
    quantized = quantize_model(model, QuantConfig(4, 4), calibration=[inputs])
    optimizer = torch.optim.Adam(quantized.train().parameters(), lr=1e-3)
    quantized(**inputs).logits.square().mean().backward()
    optimizer.step()
    deployed = convert(quantized)
    save_packed(quantized, tmp_path / "net.packed")
    loaded = load_packed(model, tmp_path / "net.packed")
    for converted in (deployed, loaded):
        codes = [m.codes for m in converted.modules() if getattr(m, "codes", None) is not None]
        tables = [table for table in codes if tuple(table.shape) == (50, 32)]
        assert len(tables) == {"masked_bert": 2, "gpt2": 2, "t5": 4}[network]
        assert len({id(table) for table in tables}) == 1
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, deployed(**inputs).logits)
    quantized.save_pretrained(tmp_path / "folder")
    keys = safetensors.safe_open(tmp_path / "folder" / "model.safetensors", "pt").keys()
    scales = [key for key in keys if key.endswith("weight_quantizer.lsq_log_scale")]
    assert len(scales) == len({id(q) for q in weight_quantizers(quantized)})


def weight_quantizers(model):
    return [m.weight_quantizer for m in model.modules() if getattr(m, "weight_quantizer", None) is not None]
