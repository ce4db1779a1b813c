"""A layer whose class has a forward of its own is deployed behind that forward."""

import copy
import pickle

import pytest
import torch
from torch import nn

from deploy.onnx_runs import predicts_the_same
from gaqat_optim import (
    QuantConfig,
    convert,
    export_onnx,
    load_packed,
    quantization_summary,
    quantize_model,
    rounded_biases,
    save_packed,
)
from gaqat_optim.deploy.nn.registry import DeployedModule
from quant.nn.own_forwards import WRAPPING, Causal, Dropped, Helped
from quant.nn.test_own_forward import network


@pytest.mark.parametrize("case", WRAPPING)
def test_it_computes_what_training_does_and_comes_back_from_a_file(case, tmp_path):
    model, quantized, x = network(case)
    deployed = convert(quantized.eval())
    layer = deployed.layer
    assert isinstance(layer, type(model.layer))
    assert isinstance(layer.wrapped_layer, DeployedModule)
    assert not any(p is q for p in deployed.parameters() for q in quantized.parameters())
    with rounded_biases(quantized):
        assert torch.allclose(deployed(x), quantized(x), atol=1e-5)
    assert "layer.wrapped_layer" in [record.name for record in quantization_summary(deployed)]
    assert {"layer.weight", "layer.bias"}.isdisjoint(deployed.state_dict())
    save_packed(quantized, tmp_path / "net.packed")
    loaded = [load_packed(source, tmp_path / "net.packed") for source in (model, quantized)]
    for other in (*loaded, copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert type(other.layer) is type(layer)
        assert torch.equal(other(x), deployed(x))
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_model(deployed)


@pytest.mark.parametrize("wrapped_in_file", [True, False])
def test_a_file_of_another_architecture_is_refused(wrapped_in_file, tmp_path):
    x = torch.rand(8, 2, 4)
    networks = [nn.Sequential(Causal(2, 2, 3)), nn.Sequential(nn.Conv1d(2, 2, 3))]
    in_file, other = networks if wrapped_in_file else networks[::-1]
    save_packed(quantize_model(in_file, calibration=x), tmp_path / "net.packed")
    with pytest.raises(
        ValueError, match=r"'0' is a (Causal|Conv1d|no module) in the network and a ForwardAround|'0' is a Causal"
    ):
        load_packed(other, tmp_path / "net.packed")


def test_hooks_run_once():
    model = nn.Sequential(Causal(2, 2, 3))
    calls = []
    model[0].register_forward_hook(lambda module, args, y: calls.append(tuple(y.shape)))
    x = torch.rand(1, 2, 4)
    deployed = convert(quantize_model(model, calibration=x))
    calls.clear()
    deployed(x)
    assert calls == [(1, 2, 4)]


# -- BatchNorm and output quantizers -------------------------------------------------------------------------------


def causal_network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(Causal(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU()),
        *(Causal(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU()),
        *(nn.Flatten(), Dropped(32, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    )


@pytest.mark.parametrize("output_bits", [None, 8])
def test_a_norm_is_folded_where_the_forward_returns_what_the_layer_computes(output_bits):
    x = torch.randn(32, 2, 8)
    quantized = quantize_model(causal_network(), QuantConfig(4, 4, output_bits=output_bits), calibration=x)
    quantized(x)  # which gives the BatchNorms statistics
    quantized.eval()
    if output_bits is None:
        with pytest.warns(UserWarning, match="\n  8: '7' has a forward of its own, which may change its output"):
            deployed = convert(quantized)
    else:
        deployed = convert(quantized)
    assert [i for i in (1, 4, 8) if isinstance(deployed[i], nn.BatchNorm1d)] == [8]
    assert [deployed[i].wrapped_layer.folded for i in (0, 3, 7)] == [True, True, False]
    with rounded_biases(quantized):
        assert torch.allclose(deployed(x), quantized(x), atol=1e-5)


class Normalized(nn.Conv1d):
    """Has the BatchNorm in its own forward."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm1d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x)).relu()


@pytest.mark.parametrize(("wrap", "name"), [(lambda layer: layer, "norm"), (nn.Sequential, r"0\.norm")])
def test_a_norm_in_the_forward_itself_stays_with_a_reason(wrap, name):
    x = torch.randn(8, 2, 6)
    quantized = quantize_model(wrap(Normalized(2, 3, 3)), calibration=x).eval()
    with pytest.warns(UserWarning, match=rf"1 BatchNorms .*\n  {name}: the forward of its layer calls it"):
        deployed = convert(quantized)
    with rounded_biases(quantized):
        assert torch.allclose(deployed(x), quantized(x), atol=1e-5)


def test_an_output_quantizer_stands_where_a_kernel_can_take_it_in(tmp_path):
    x = torch.randn(32, 2, 8)
    quantized = quantize_model(causal_network(), QuantConfig(4, 4, output_bits=8), calibration=x).eval()
    # The ReLUs' values go through a padding and a cast before the next layer quantizes them.
    assert [name for name, _ in quantized.named_modules() if name.endswith("output_quantizer")] == [
        *("2.output_quantizer", "5.output_quantizer", "7.output_quantizer", "10.output_quantizer"),
    ]
    report = export_onnx(quantized, x, tmp_path / "net.onnx")
    assert report.integer_kernels == {"QLinearConv": 2, "QGemm": 2}
    assert not report.float_operators
    assert predicts_the_same(report)


def test_the_advice_for_a_product_in_floating_point_names_the_quantized_layer(tmp_path):
    x = torch.randn(32, 4, 5, 5)
    model = quantize_model(nn.Sequential(Helped(4, 6, 3), nn.Flatten(), nn.Linear(54, 3)), calibration=x)
    with pytest.warns(UserWarning, match=r"Set output_bits for 0: .*overrides=\{'0': \{'output_bits': 8\}\}"):
        report = export_onnx(model, x, tmp_path / "net.onnx")
    assert [operator.reason.partition(": ")[2] for operator in report.float_operators] == [
        "set output_bits for it (overrides={'0': {'output_bits': 8}})"
    ]


# -- words that an encoder, a decoder and a head share --------------------------------------------------------------


class Shared(nn.Module):
    """As BART: scaled words in two places, positions, and a head with the weight of both."""

    def __init__(self):
        super().__init__()
        words, positions, _ = (WRAPPING[case][0]() for case in ("words of BART", "positions of BART", "bag"))
        self.encoder, self.decoder, self.positions = words, WRAPPING["words of BART"][0](), positions
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.decoder.weight = self.head.weight = self.encoder.weight

    def forward(self, tokens):
        x = self.encoder(tokens) + self.positions(tokens)
        return self.head(self.mix(x).relu() + self.decoder(tokens))


def test_tied_words_are_held_once(tmp_path):
    torch.manual_seed(0)
    model, x = Shared(), torch.randint(9, (8, 5))
    quantized = quantize_model(model, QuantConfig(4, 4, first_last_bits="same"), calibration=x)
    quantizer = quantized.encoder.weight_quantizer
    assert quantized.decoder.weight_quantizer is quantized.head.weight_quantizer is quantizer
    quantized(x).square().mean().backward()
    assert quantized.encoder.padding_idx == 1
    deployed = convert(quantized.eval())
    layers = deployed.encoder.wrapped_layer, deployed.decoder.wrapped_layer, deployed.head
    assert len({id(layer.codes) for layer in layers}) == len({id(layer.weight_scale) for layer in layers}) == 1
    with rounded_biases(quantized):
        assert torch.allclose(deployed(x), quantized(x), atol=1e-5)
    save_packed(quantized, tmp_path / "net.packed")
    loaded = load_packed(Shared(), tmp_path / "net.packed")
    assert torch.equal(loaded(x), deployed(x))
    assert loaded.encoder.wrapped_layer.codes is loaded.head.codes
    report = export_onnx(quantized, x, tmp_path / "net.onnx")
    assert report.max_abs_diff < 1e-5


def test_a_network_in_bfloat16_stays_so():
    model = nn.Sequential(Dropped(4, 6), nn.Linear(6, 3)).to(torch.bfloat16)
    x = torch.rand(8, 4).to(torch.bfloat16)
    deployed = convert(quantize_model(model, calibration=x))
    assert deployed(x).dtype == deployed[0].weight.dtype == torch.bfloat16
