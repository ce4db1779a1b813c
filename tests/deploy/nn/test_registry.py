"""What all deployed modules share, and the deployed form of a user's own layer."""

import copy
import io
import pickle

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import CONFIGS, cnn, images, quantized, randomize_norms, run, trained
from deploy.nn.layer_networks import HEADS, Attention, E, L, N, UNet, ViT
from deploy.onnx_runs import LEVELS, STAYS_IN_FLOAT
from deploy.onnx_runs import run as run_onnx
from gaqat_optim import (
    DeployLayer,
    QuantConfig,
    QuantizedModule,
    export_onnx,
    load_packed,
    quantize_model,
    register_quantized,
    rounded_biases,
    save_packed,
)
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.linear import DeployLinear
from gaqat_optim.deploy.nn.registry import deployed_class
from gaqat_optim.quant.nn.conv import QuantConv2d
from gaqat_optim.quant.nn.linear import QuantLinear
from gaqat_optim.quant.nn.registry import QUANTIZED

W3A5 = QuantConfig(3, 5, first_last_bits="same")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}"),
    pytest.mark.filterwarnings("ignore:.*cannot be traced symbolically"),
]
# A network of each family with an input, and what its text says of a layer.
NETWORKS = {
    "resnet": (
        lambda: trained("resnet", CONFIGS["W4A4"]),
        lambda: images(16),
        "4-bit weight (32, 16, 3, 3) per channel, int32 bias, BatchNorm folded, sums in float32",
    ),
    "transposed": (
        lambda: quantized(randomize_norms(UNet(groups=3)), torch.rand(8, 3, 9, 8), W3A5),
        lambda: torch.rand(8, 3, 9, 8),
        "(up): DeployConvTranspose(\n    3-bit weight (12, 2, 3, 3) per channel, int32 bias, BatchNorm folded, sums in "
        "float32, stride=(2, 2), padding=(1, 1), groups=3",
    ),
    "attention": (
        lambda: quantized(ViT(), torch.randn(8, 3, 8, 8), W3A5),
        lambda: torch.randn(8, 3, 8, 8),
        "(self_attn): DeployMultiheadAttention(\n          3 heads of 4, batch_first=True\n          (query): "
        "DeployLinear(\n            3-bit weight (12, 12) per channel, int32 bias",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_printed_copied_pickled_loaded_and_exported(name):
    make, sample, text = NETWORKS[name]
    model, x = make(), sample()
    deployed = convert(model)
    expected = run(deployed, x)
    assert text in str(deployed)
    assert "ActivationQuantizer(" in str(deployed)
    assert "LSQ" not in str(deployed)
    assert torch.equal(run(copy.deepcopy(deployed), x), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(deployed)), x), expected)
    file = io.BytesIO()
    torch.save(deployed.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other = convert(other)
    assert not torch.equal(run(other, x), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(other, x), expected)
    last = next(key for key in reversed(deployed.state_dict()) if key.endswith("bias_codes"))
    with pytest.raises(RuntimeError, match=last):
        other.load_state_dict({k: v for k, v in deployed.state_dict().items() if k != last})
    program = torch.export.export(deployed, (x[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (2, 5, len(x)):
        assert torch.equal(program.module()(x[:count]), run(deployed, x[:count]))


def test_the_state_dict_has_the_integers_and_the_scales():
    dtypes = {key.rpartition(".")[2]: v.dtype for key, v in convert(NETWORKS["resnet"][0]()).state_dict().items()}
    float32 = dict.fromkeys(("weight_scale", "scale"), torch.float32)
    assert dtypes == {"codes": torch.int8, "bias_codes": torch.int32, **float32}


LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), (4,)),
    "conv": (lambda: nn.Conv1d(4, 4, 3, padding=1), (4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 4, 3, padding=1, groups=2), (4, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(E, HEADS, 14, batch_first=True), (L, E)),
}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "attention"])
def test_hooks_stay_with_their_layer(name):
    layer, shape = LAYERS[name]
    model = quantized(nn.Sequential(nn.Identity(), layer()), torch.rand(8, *shape))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    deployed = convert(model)
    expected = deployed[1].bias.reshape(-1, *[1] * (len(shape) - 1))
    assert bool((run(deployed, torch.rand(8, *shape)) == expected).all())


def test_hooks_stay_with_attention_and_its_projections():
    x = torch.randn(N, L, E)
    model = quantized(Attention("self", batch_first=True), x)
    model.attention.register_forward_hook(lambda module, args, y: (y[0] + 1, y[1]))
    model.attention.out_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    deployed = convert(model)
    assert bool((run(deployed, x)[0] == deployed.attention.out_proj.bias + 1).all())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_used_twice_is_one_deployed_layer(name, tmp_path):
    layer, shape = LAYERS[name]
    layer, x = layer(), torch.rand(8, *shape)
    float_model = nn.Sequential(layer, nn.ReLU(), layer)
    model = quantized(float_model, x, QuantConfig(8, 8))
    deployed = convert(model)
    assert deployed[0] is deployed[2]
    assert (run(model, x) - run(deployed, x)).abs().max() <= 0.1 * run(model, x).abs().max()
    save_packed(model, tmp_path / "net")
    loaded = load_packed(float_model, tmp_path / "net")
    assert loaded[0] is loaded[2]
    assert torch.equal(run(loaded, x), run(deployed, x))
    apart = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer))
    assert torch.equal(run(load_packed(apart, tmp_path / "net"), x), run(deployed, x))
    save_packed(quantized(apart, x, QuantConfig(8, 8)), tmp_path / "net")
    with pytest.raises(ValueError, match="is another layer under another name in the network"):
        load_packed(float_model, tmp_path / "net")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "attention")) for name in LAYERS]
)
def test_a_layer_used_twice_computes_the_same_in_a_file(name, tmp_path):
    layer, shape = LAYERS[name]
    layer, x = layer(), torch.rand(8, *shape)
    model = quantized(nn.Sequential(layer, nn.ReLU(), layer), x, QuantConfig(8, 8))
    assert export_onnx(model, x, tmp_path / "net.onnx").max_abs_diff <= 1e-4


DTYPES = {
    "cnn": lambda: (randomize_norms(cnn()), images(16)),
    "transposed": lambda: (randomize_norms(UNet(groups=2)), torch.rand(8, 3, 9, 8)),
    "attention": lambda: (Attention("cross", batch_first=True, add_bias_kv=True), torch.randn(N, L, E)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DTYPES)
def test_other_dtypes_and_autocast(name, dtype):
    torch.manual_seed(0)
    net, x = DTYPES[name]()
    model = quantized(net.to(dtype), x.to(dtype))
    deployed = convert(model)
    y, expected = (m[0] if isinstance(m, tuple) else m for m in (run(deployed, x.to(dtype)), run(model, x.to(dtype))))
    assert y.dtype == dtype
    layers = [m for m in deployed.modules() if isinstance(m, DeployLayer)]
    assert {layer.codes.dtype for layer in layers} == {torch.int8}
    assert {layer.weight_scale.dtype for layer in layers} == {torch.float32}
    assert (y.float() - expected.float()).abs().max() <= 0.2 * expected.float().abs().max()
    if dtype != torch.float16:  # which autocast on a CPU does not take
        with torch.autocast("cpu", torch.bfloat16):
            again = run(deployed, x.to(dtype))
        assert torch.equal(again[0] if isinstance(again, tuple) else again, y)


# -- a user's own layers ----------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    """Computes the same as its base."""

    def double(self):
        return 2 * self.weight


class RowLinear(nn.Module):
    """A linear layer whose weight has the shape (inputs, outputs), as GPT-2 has them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Cosine(nn.Linear):
    """Not linear: of unit vectors, times a learned temperature."""

    def __init__(self, *args):
        super().__init__(*args)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.temperature * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1)) + self.bias


class DeployRowLinear(DeployLayer):
    channel_axis = 1

    def operation(self, x, weight, bias):
        y = x @ weight
        return y if bias is None else y + bias


class DeployCosine(DeployLayer):
    is_linear = False

    def copy_hyperparameters(self, source):
        super().copy_hyperparameters(source)
        self.temperature = source.temperature

    def operation(self, x, weight, bias):
        return self.temperature * F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=1)) + bias


class QuantDoubled(QuantLinear, Doubled):
    pass


class QuantRowLinear(QuantizedModule, RowLinear):
    deployed_as = DeployRowLinear

    def compute(self, x, weight):
        return x @ weight + self.bias

    def channels_first(self, weight):
        return weight.t()

    def from_channels_first(self, weight):
        return weight.t()


class QuantCosine(QuantizedModule, Cosine):
    deployed_as = DeployCosine

    def compute(self, x, weight):
        return self.temperature * F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=1)) + self.bias


OWN = {"inherited": (Doubled, QuantDoubled), "linear": (RowLinear, QuantRowLinear), "not linear": (Cosine, QuantCosine)}


@pytest.fixture
def _own_layers():
    before = dict(QUANTIZED)
    for float_class, quantized_class in OWN.values():
        register_quantized(float_class)(quantized_class)
    yield
    QUANTIZED.clear()
    QUANTIZED.update(before)


@pytest.mark.usefixtures("_own_layers")
@pytest.mark.cover("values")
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", OWN)
def test_an_own_layer_is_converted_packed_and_exported(name, bits, tmp_path):
    torch.manual_seed(0)
    layer, quantized_class = OWN[name]
    x = torch.randn(32, 6)
    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer(8, 5))  # noqa: E731
    model = quantized(make(), x, QuantConfig(bits, bits, first_last_bits="same"))
    assert type(model[2]) is quantized_class
    deployed = convert(model)
    expected = {"inherited": DeployLinear, "linear": DeployRowLinear, "not linear": DeployCosine}[name]
    assert type(deployed[2]) is expected
    assert deployed[2].is_integer == (name != "not linear")
    y = run(deployed, x)
    with rounded_biases(model):
        assert torch.allclose(run(model, x), y, atol=1e-5)
    save_packed(model, tmp_path / "net")
    for target in (make(), model):
        loaded = load_packed(target, tmp_path / "net")
        assert str(loaded) == str(deployed)
        assert torch.equal(run(loaded, x), y)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.code_flip_rate == 0
    for level in LEVELS:
        assert torch.allclose(run_onnx(tmp_path / "net.onnx", x, level), y, atol=1e-5)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert stored["2.codes"] == (onnx.TensorProto.INT4 if bits == 3 else onnx.TensorProto.INT8)


class OwnCompute(QuantLinear):
    def compute(self, x, weight):
        return 2 * super().compute(x, weight)


class OwnConvolution(QuantConv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class OwnLayout(QuantLinear):
    def channels_first(self, weight):
        return weight.flip(0)


class OfRowLinear(QuantRowLinear):
    pass


class OtherCompute(QuantRowLinear):
    def compute(self, x, weight):
        return 2 * super().compute(x, weight)


def test_a_subclass_is_deployed_as_its_base_if_it_computes_the_same():
    assert deployed_class(QuantLinear) is deployed_class(QuantDoubled) is DeployLinear
    assert deployed_class(QuantRowLinear) is deployed_class(OfRowLinear) is DeployRowLinear
    for own in (OwnCompute, OwnConvolution, OwnLayout, OtherCompute, QuantizedModule):
        assert deployed_class(own) is None


def test_a_layer_without_a_deployed_form_is_named_with_what_to_do():
    net = nn.Sequential(nn.Linear(2, 2))
    model = quantize_model(net, calibration=torch.rand(8, 2))
    model[0].__class__ = OwnCompute
    message = r"'0': there is no deployed form of OwnCompute.*Set deployed_as.*exclude=\('0',\)"
    with pytest.raises(ValueError, match=message):
        convert(model)
    with rounded_biases(model):
        model(torch.rand(8, 2))
