"""A weight that layers share is one tensor after the conversion, and in every file."""

import io

import onnx
import pytest
import torch

from gaqat_optim import QuantConfig, convert, export_onnx, load_packed, quantize_model, rounded_biases, save_packed
from gaqat_optim.deploy.nn.base import DeployLayer
from quant.test_tied_weights import Language, tokens, trained


@pytest.mark.cover("values")
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "bits", [8, 3]
)  # 3 bits with a bias, which has spare bits, is one of those that `make test` runs
def test_embedding_and_head(bits, bias, granularity, tmp_path):
    torch.manual_seed(0)
    x, config = tokens(), QuantConfig(bits, 8, first_last_bits="same", weight_granularity=granularity)
    model = trained(quantize_model(Language(bias), config, calibration=x), x)
    deployed = convert(model)
    assert deployed.words.codes is deployed.head.codes
    assert deployed.words.weight_scale is deployed.head.weight_scale
    assert deployed.head.is_integer
    assert (deployed.head.shift > 0) == (bias and bits < 8)  # spare bits for the bias, which the embedding follows
    assert torch.equal(deployed.words(x), model.words(x))
    with rounded_biases(model):
        assert torch.allclose(deployed(x), model(x), atol=1e-5)

    save_packed(model, tmp_path / "net.packed")
    loaded = load_packed(Language(bias), tmp_path / "net.packed")
    assert loaded.words.codes is loaded.head.codes
    assert torch.equal(loaded(x), deployed(x))

    report = export_onnx(model, x, tmp_path / "net.onnx", storage="packed")
    assert (report.top1_agreement, report.code_flip_rate) == (1, 0)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert len([v for v in graph.initializer if v.name.endswith(("words.codes", "head.codes"))]) == 1
    assert not [v for v in graph.initializer if v.data_type == onnx.TensorProto.FLOAT and list(v.dims) == [12, 1]]


def test_a_file_is_smaller_by_one_table(tmp_path):
    class Wide(Language):
        def __init__(self, is_tied):
            super().__init__()
            self.words = torch.nn.Embedding(500, 64)
            self.body, self.head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 500, bias=False)
            if is_tied:
                self.head.weight = self.words.weight

    x, config, table = tokens(), QuantConfig(4, 8, first_last_bits="same"), 500 * 64 // 2
    models = [quantize_model(Wide(is_tied), config, calibration=x) for is_tied in (True, False)]
    sizes = {}
    for kind in ("packed", "onnx", "state dict"):
        write = {
            "packed": lambda model: save_packed(model, tmp_path / "net"),
            "onnx": lambda model: export_onnx(model, x, tmp_path / "net").bytes,
            "state dict": state_dict_size,
        }[kind]
        sizes[kind] = [write(model) for model in models]
    assert sizes["packed"][1] - sizes["packed"][0] > table
    assert sizes["onnx"][1] - sizes["onnx"][0] > table
    assert sizes["state dict"][1] - sizes["state dict"][0] > 2 * table  # int8


def state_dict_size(model):
    buffer = io.BytesIO()
    torch.save(convert(model).state_dict(), buffer)
    return buffer.tell()


def test_inputs_that_leave_other_spare_bits_keep_their_codes():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    x = torch.rand(16, 6)
    for bits, is_shared in ((8, True), (4, False)):
        config = QuantConfig(6, 8, first_last_bits="same", overrides={"b": {"activation_bits": bits}})
        model = trained(quantize_model(Twice(), config, calibration=x), x)
        deployed = convert(model)
        assert all(isinstance(layer, DeployLayer) for layer in deployed.children())
        assert (deployed.a.codes is deployed.b.codes) == is_shared
        assert torch.equal(deployed.a.weight, model.a.quantized_weight())
        assert torch.equal(deployed.b.weight, model.b.quantized_weight())
