"""``convert``: against loops over integers, and against the network that was trained."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy import deploy_oracle as oracle
from deploy.deploy_networks import CONFIGS, NETWORKS, ResNet, cnn, images, mlp, randomize_norms, trained
from gaqat_optim import GAQATOptimizer, LSQQuantizer, QuantConfig, quantization_disabled, quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.activation_quantizer import ActivationQuantizer
from gaqat_optim.deploy.nn.base import DeployLayer
from gaqat_optim.deploy.onnx_export.verification import recorded_codes
from gaqat_optim.quant.nn.base import QuantizedModule

SAME = QuantConfig(4, 4, first_last_bits="same")
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def quantized(model, x, config=SAME):
    return quantize_model(model, config, calibration=x).eval()


def run(model, x):
    with torch.no_grad():
        return model(x)


def norms_in(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def close(a, b, layers=1):
    """Whether two outputs differ by no more than the rounding of biases: some percent of their range."""
    return (a - b).abs().max() <= 0.05 * layers * a.abs().max()


# -- the numbers ---------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """A layer and perhaps a BatchNorm, quantized; and an input far beyond the clipping range."""
    spatial = draw(st.integers(0, 3))
    bias, seed = draw(st.booleans()), draw(st.integers(0, 2**16))
    groups = draw(st.sampled_from([1, 2])) if spatial else 1
    outputs = 2 * draw(st.integers(1, 3))
    torch.manual_seed(seed)
    if spatial == 0:
        layer, shape = nn.Linear(5, outputs, bias=bias), (5,)
    else:
        stride, padding, dilation = (draw(st.integers(low, 2)) for low in (1, 0, 1))
        layer = CONVOLUTIONS[spatial](4, outputs, 2, stride, padding, dilation, groups, bias)
        shape = (4, *[draw(st.integers(3, 5)) for _ in range(spatial)])
    parts = [layer]
    if draw(st.booleans()):
        parts.append(NORMS[max(spatial, 1)](outputs, affine=draw(st.booleans())))
    signed = draw(st.booleans())
    config = QuantConfig(
        draw(st.integers(2, 8)),
        draw(st.integers(2, 8)),
        weight_granularity=draw(st.sampled_from(["channel", "tensor"])),
        activation_signed=signed,
        scale_domain=draw(st.sampled_from(["log", "linear"])),
        first_last_bits="same",
    )
    model = randomize_norms(quantized(nn.Sequential(*parts), torch.randn(8, *shape), config), seed)
    return model, 3 * torch.randn(2, *shape)


@settings(max_examples=60)
@given(layers())
def test_a_layer_is_the_integer_computation_to_the_bit(case):
    model, x = case
    layer, norm = model[0], model[1] if len(model) == 2 else None
    deployed = convert(model)
    assert np.array_equal(run(deployed, x).numpy(), oracle.layer_output(layer, norm, x))
    assert np.array_equal(deployed[0].codes.numpy(), oracle.weight_codes(layer) << deployed[0].shift)
    assert norms_in(deployed) == []


@pytest.mark.parametrize("network", NETWORKS)
def test_where_no_bias_has_to_be_rounded_the_networks_are_equal_to_the_bit(network):
    """All scales are powers of two and all biases multiples of the unit: every sum is exact on both sides."""
    torch.manual_seed(0)
    x = images(64)
    config = QuantConfig(4, 3, scale_domain="linear", output_bits=8 if network == "mlp" else None)
    model = quantized(NETWORKS[network](), x, config)
    with torch.no_grad():
        for q in model.modules():
            if isinstance(q, LSQQuantizer):
                q.raw_scale.copy_(q.scale.log2().round().exp2())
        for layer, norm in pairs(model):
            channels = layer.weight.shape[0]
            unit = layer.input_quantizer.scale * layer.weight_quantizer.scale
            if layer.bias is not None:
                layer.bias.copy_(torch.randint(-40, 40, (channels,)) * unit)
            if norm is not None:
                norm.eps = 0.0
                norm.running_var.copy_(4.0 ** torch.randint(-1, 2, (channels,)))
                norm.running_mean.copy_(torch.randint(-40, 40, (channels,)) * unit)
                norm.weight.copy_(
                    2.0 ** torch.randint(-1, 2, (channels,)) * torch.randint(0, 2, (channels,)).sub(0.5).sign()
                )
                norm.weight[0] = 0.0
                gain = norm.weight / norm.running_var.sqrt()
                norm.bias.copy_(torch.randint(-40, 40, (channels,)) * unit * gain)
                norm.bias[0] = 0.75
    deployed = convert(model)
    for inputs in (x, 8 * x, 8 * (x.mean() - x)):
        assert torch.equal(run(deployed, inputs), run(model, inputs))
    assert run(model, x).unique().numel() > 100


def pairs(model):
    """The layers of the networks above with the BatchNorm that follows each in definition order, or ``None``."""
    modules = [m for m in model.modules() if isinstance(m, QuantizedModule | nn.modules.batchnorm._BatchNorm)]
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, QuantizedModule):
            yield module, following if isinstance(following, nn.modules.batchnorm._BatchNorm) else None


def test_a_layer_of_large_sums_adds_up_in_float64():
    model = nn.Linear(4096, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.copy_(torch.tensor([0.001, 0.0]))
    model = quantized(model, torch.rand(4, 4096), QuantConfig(8, 8, scale_domain="linear"))
    model.weight_quantizer.initialize(model.weight, 1 / 127)
    model.input_quantizer.initialize(torch.rand(9), 1 / 255)
    deployed = convert(model)
    assert not deployed.exact_in_float32
    x = torch.ones(1, 4096)
    x[0, ::2] = 254 / 255
    total = 127 * (255 + 254) * 2048  # needs 27 bits
    expected = torch.tensor([total + round(0.001 * 127 * 255), total]).float() * deployed.accumulator_scale
    assert torch.equal(run(deployed, x)[0], expected)
    small = convert(quantized(nn.Linear(64, 2), torch.rand(4, 64)))
    assert small.exact_in_float32


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("config", CONFIGS)
def test_drift_from_the_trained_network(network, config):
    """Biases are rounded to the unit s_a s', half a unit at most, which moves some activations to the next code.

    The wider the codes, the finer the unit. So the outputs differ, by some percent of their range at 2 and 3 bits, and
    a decision between two classes of nearly equal scores can change: these networks have seen 30 batches, and hardly
    separate the classes. At 4 bits and more 98 % of the decisions have to be the same, below 85 %.
    """
    model = trained(network, CONFIGS[config])
    deployed, x = convert(model), images(512, seed=7)
    a, b = run(model, x), run(deployed, x)
    agreement = (a.argmax(1) == b.argmax(1)).double().mean().item()
    print(f"{network} {config}: top-1 {agreement:.4f}, largest difference {(a - b).abs().max() / a.abs().max():.1e}")
    assert norms_in(deployed) == []
    assert agreement >= (0.98 if config in ("W8A8", "W4A4") else 0.85)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("config", ["W8A8", "W2A2"])
def test_the_rounding_of_biases_is_the_only_difference(network, config):
    """With the rounded biases put back into the trained network, all codes are equal but for sums that lie on a tie.

    There, the last bit of a float32 sum decides. Without it, codes differ a hundred times as often.
    """
    model = trained(network, CONFIGS[config])
    deployed, x = convert(model), images(64, seed=7)
    before = flips(model, deployed, x)
    with torch.no_grad():
        for (layer, norm), deploy in zip(pairs(model), deploy_layers(deployed), strict=True):
            if norm is None:
                layer.bias.copy_(deploy.bias)
            else:
                bias = 0 if layer.bias is None else layer.bias
                norm.bias.copy_(
                    deploy.bias - (bias - norm.running_mean) * norm.weight / (norm.running_var + norm.eps).sqrt()
                )
    after = flips(model, deployed, x)
    print(f"{network} {config}: codes that differ, biases as trained {before:.1e}, biases on the grid {after:.1e}")
    assert before > 0
    assert after <= max(1e-4, before / 100)
    assert torch.equal(
        convert(model)[-1].bias_codes if network != "resnet" else convert(model).head.bias_codes,
        deploy_layers(deployed)[-1].bias_codes,
    )


def deploy_layers(model):
    return [m for m in model.modules() if isinstance(m, DeployLayer)]


def flips(model, deployed, x):
    """Fraction of the activation codes that differ between the trained and the converted network."""
    trained_codes = {}

    def record(quantizer, args, output):
        trained_codes[quantizer.name] = (output / quantizer.scale).round().numpy()

    quantizers = [m.input_quantizer for m in model.modules() if isinstance(m, QuantizedModule)]
    hooks = [q.register_forward_hook(record) for q in quantizers]
    with recorded_codes(deployed) as codes:
        run(model, x), run(deployed, x)
    for hook in hooks:
        hook.remove()
    assert codes.keys() == trained_codes.keys()
    different = sum(int((codes[name][0] != trained_codes[name]).sum()) for name in codes)
    return different / sum(codes[name][0].size for name in codes)


# -- BatchNorm -----------------------------------------------------------------------------------------------------


def test_a_negative_gamma_makes_a_negative_scale_and_leaves_the_codes():
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), x))
    deployed = convert(model)
    assert bool((model[1].weight < 0).any())
    assert torch.equal(deployed[0].weight_scale < 0, model[1].weight < 0)
    assert torch.equal(
        deployed[0].weight.sign(),
        (model[0].weight_quantizer(model[0].weight) * model[1].weight.reshape(-1, 1, 1, 1)).sign(),
    )


@pytest.mark.parametrize("kinds", [(4, 4), (4, None), (None, 4)], ids=["W4A4", "W4", "A4"])
def test_a_gamma_of_zero_leaves_the_bias_alone(kinds, recwarn):
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(
        quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x, QuantConfig(*kinds, first_last_bits="same"))
    )
    with torch.no_grad():
        model[1].weight[:2] = 0.0
        model[1].bias[:2] = torch.tensor([0.3, 0.0])
    deployed = convert(model)
    y = run(deployed, x)
    assert torch.allclose(y[:, 0], torch.tensor(0.3), rtol=1e-6)
    assert bool((y[:, 1] == 0).all())
    assert close(run(model, x), y)
    if kinds[0] is not None:
        assert not bool(deployed[0].codes[:2].any())
        assert bool((deployed[0].weight_scale[:2] > 0).all())
    assert len(recwarn) == 0


@pytest.mark.parametrize("gamma", [1e-9, -1e-9])
def test_a_gamma_too_small_for_an_int32_bias_is_a_warning_with_names(gamma):
    x = torch.rand(16, 3, 6, 6)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model = randomize_norms(quantized(model, x))
    with torch.no_grad():
        model[0][1].weight[2], model[0][1].bias[2] = gamma, 1.5
    with pytest.warns(UserWarning, match=r"'0\.0': the bias of 1 channels \(2\) does not fit into int32") as caught:
        deployed = convert(model)
    assert caught[0].filename == __file__
    assert torch.allclose(run(deployed, x)[:, 2], torch.tensor(1.5), rtol=1e-6)
    assert close(run(model, x), run(deployed, x))


def test_a_large_bias_under_one_scale_for_the_tensor_gives_the_channel_a_scale():
    x = torch.rand(16, 8)
    model = quantized(nn.Linear(8, 3), x, QuantConfig(8, 8, weight_granularity="tensor"))
    with torch.no_grad():
        model.bias[1] = 1e9
    with pytest.warns(UserWarning, match=r"'the model': the bias of 1 channels \(1\)"):
        deployed = convert(model)
    assert torch.allclose(run(deployed, x)[:, 1], torch.tensor(1e9), rtol=1e-6)
    assert close(run(model, x)[:, ::2], run(deployed, x)[:, ::2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_without_running_statistics_stays(affine, bias):
    x = torch.rand(16, 3, 6, 6)
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm), x))
    deployed = convert(model)
    assert norms_in(deployed) == ["1"]
    assert close(run(model, x), run(deployed, x))


class Shared(nn.Module):
    """Networks in which a BatchNorm is behind a layer, and still must not be folded into it."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.alias = self.bn
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        if self.way == "output used twice":
            return self.bn(y) + y
        if self.way == "layer used twice":
            return self.bn(self.conv(y))
        if self.way == "norm used twice":
            return self.bn(F.relu(self.bn(y)))
        if self.way == "norm used twice by another name":
            return self.alias(F.relu(self.bn(y)))
        if self.way == "two norms on one output":
            return self.bn(y) + self.other(y)
        if self.way == "something between":
            return self.bn(F.relu(y))
        if self.way == "statistics read":
            return self.bn(y) + self.bn.running_mean.mean()
        if self.way == "weight read":
            return self.bn(y) + self.conv.weight.sum()
        if self.way == "output returned":
            return y, self.bn(y)
        if self.way == "another user in evaluation mode":
            return self.bn(y) if self.training else self.bn(y) + y
        raise AssertionError(self.way)


WAYS = [
    "output used twice",
    "layer used twice",
    "norm used twice",
    "norm used twice by another name",
    "two norms on one output",
    "something between",
    "statistics read",
    "weight read",
    "output returned",
    "another user in evaluation mode",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_batchnorm_that_is_not_the_layers_alone_stays(way):
    torch.manual_seed(0)
    x = torch.rand(16, 4, 6, 6)
    model = randomize_norms(quantized(Shared(way), x, QuantConfig(8, 8)))
    deployed = convert(copy.deepcopy(model).train())
    assert "bn" in norms_in(deployed)
    expected, found = run(model, x), run(deployed, x)
    for a, b in zip(*[y if isinstance(y, tuple) else (y,) for y in (expected, found)], strict=True):
        assert close(a, b)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnSyncNorm(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) + 1


class NamedNorm(nn.BatchNorm2d):
    """Another name alone."""


class AnyNorm(nn.modules.batchnorm._BatchNorm):
    """For inputs of any number of axes."""

    def _check_input_dim(self, x):
        pass


def patched(norm):
    """As wrappers do that put a forward of their own on the object."""
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + 1
    return norm


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, AnyNorm])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (5,)),
        (nn.Conv1d(3, 4, 3), (3, 6)),
        (nn.Conv2d(3, 4, 3), (3, 6, 6)),
        (nn.Conv3d(3, 4, 3), (3, 4, 4, 4)),
        (nn.ConvTranspose2d(3, 4, 3), (3, 6, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batchnorm_is_folded_for_what_it_computes(kind, layer, shape):
    torch.manual_seed(0)
    x = torch.rand(16, *shape)
    model = randomize_norms(quantized(nn.Sequential(layer, kind(4), nn.ReLU()), x))
    deployed = convert(model)
    assert norms_in(deployed) == []
    assert deployed[0].folded
    assert close(run(model, x), run(deployed, x))


def test_a_subclass_that_inherits_its_forward_is_folded():
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3), NamedNorm(4)), x))
    deployed = convert(model)
    assert norms_in(deployed) == []
    assert close(run(model, x), run(deployed, x))


def test_what_was_trained_with_synchronised_norms_is_deployed_without_norms():
    """They train on a CPU too, where there are no other ranks."""
    torch.manual_seed(0)
    x, y = images(32), torch.randint(10, (32,))
    model = quantized(nn.SyncBatchNorm.convert_sync_batchnorm(ResNet()), x, QuantConfig(4, 4, output_bits=8)).train()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert all(norm.num_batches_tracked == 3 for norm in norms)
    deployed = convert(model.eval())
    assert norms_in(deployed) == []
    plain = quantized(ResNet(), x, QuantConfig(4, 4, output_bits=8))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(deployed, x), run(convert(plain), x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), OwnNorm(6)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), OwnSyncNorm(6)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), patched(nn.BatchNorm2d(6))), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)), (3, 6, 6)),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1)), nn.BatchNorm1d(6)), (4,)),
    ],
    ids=["subclass", "subclass of another", "patched", "other norm", "reshaped"],
)
def test_only_the_batchnorm_itself_is_folded(model, shape):
    x = torch.rand(16, *shape)
    model.append(nn.BatchNorm2d(6) if len(shape) == 3 else nn.BatchNorm1d(6))  # which the tracer looks for
    model = randomize_norms(quantized(model, x))
    deployed = convert(model)
    assert [type(module) for module in deployed[1:]] == [type(module) for module in model[1:]]
    assert close(run(model, x), run(deployed, x))


def test_a_hook_on_the_output_keeps_the_batchnorm():
    x = torch.rand(16, 3, 6, 6)
    hooked = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    deployed = convert(hooked)
    assert norms_in(deployed) == ["1"]
    assert close(run(hooked, x), run(deployed, x))


@pytest.mark.parametrize("tail", [[], [nn.ReLU()], [nn.Hardswish()], [nn.ReLU(), nn.AvgPool2d(2)]])
def test_a_batchnorm_with_an_output_quantizer_behind_it_is_folded(tail):
    """Its codes are those of training, wherever the quantizer stands, but for the rounding of the bias."""
    x = torch.rand(16, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *tail)
    model = quantized(net, x, QuantConfig(8, 8, output_bits=8))
    deployed = convert(model)
    assert norms_in(deployed) == []
    expected, found = run(model, x), run(deployed, x)
    site = 2 if tail and isinstance(tail[0], nn.ReLU) else 1
    scale = model[site].output_quantizer.scale.item()
    assert ((expected - found).abs() <= 1.001 * scale).all()  # A bias is rounded, so a code can be the next one.
    assert (expected != found).float().mean() < 0.02


def test_a_network_that_cannot_be_traced_keeps_its_norms_and_says_why():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(Branching(), x))
    with pytest.warns(UserWarning, match="Branching cannot be traced.*TraceError") as caught:
        deployed = convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert norms_in(deployed) == ["bn"]
    assert close(run(model, x), run(deployed, x))


def test_control_flow_inside_a_module_without_layers_does_not_matter():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    x = torch.rand(16, 3, 6, 6)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate()), x)
    assert norms_in(convert(model)) == []


def test_an_input_of_other_axes_than_the_batchnorm_was_folded_for_is_refused():
    """Behind a linear layer, a BatchNorm1d of (N, C, L) normalizes axis 1: another map than the one that was folded."""
    model = quantized(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.rand(8, 4))
    with pytest.raises(ValueError, match="inputs of 2 axes only"):
        convert(model)(torch.rand(8, 6, 4))


# -- what is quantized in part, and how layers are called -------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(4, None, None), (None, 4, None), (4, None, 6), (None, 4, 6), (None, None, 6)])
@pytest.mark.parametrize("network", [mlp, cnn])
def test_a_part_in_floating_point_leaves_the_bias_there(network, kinds):
    """Then nothing is rounded that was not before: only the order of float32 operations differs."""
    torch.manual_seed(0)
    weight, activation, output = kinds
    x = images(32)
    config = QuantConfig(weight, activation, output_bits=output, first_last_bits="same")
    model = randomize_norms(quantized(network(), x, config))
    deployed = convert(model)
    assert norms_in(deployed) == []
    assert all(layer.bias_codes is None for layer in deploy_layers(deployed))
    assert torch.allclose(run(deployed, x), run(model, x), atol=1e-5 if output is None else 1e-2)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding(mode, padding):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode), nn.BatchNorm2d(4))
    model = quantized(model, x, QuantConfig(8, 8))
    assert torch.allclose(run(convert(model), x), run(model, x), atol=1e-2)


def test_inputs_without_a_batch_and_with_more_axes():
    torch.manual_seed(0)
    linear = quantized(nn.Linear(5, 3), torch.rand(8, 5), QuantConfig(8, 8))
    conv = quantized(nn.Conv2d(3, 4, 3), torch.rand(8, 3, 6, 6), QuantConfig(8, 8))
    for model, shape in ((linear, (5,)), (linear, (2, 7, 5)), (linear, (2, 3, 4, 5)), (conv, (3, 6, 6))):
        x = torch.rand(shape)
        assert run(convert(model), x).shape == run(model, x).shape
        assert close(run(model, x), run(convert(model), x))


def test_a_layer_used_twice_and_a_layer_that_is_the_model():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = quantized(nn.Sequential(layer, nn.ReLU(), layer), torch.rand(8, 6), QuantConfig(8, 8))
    deployed, x = convert(model), torch.rand(4, 6)
    assert deployed[0] is deployed[2]
    assert close(run(model, x), run(deployed, x), layers=2)
    alone = quantized(nn.Linear(6, 6), x, QuantConfig(8, 8))
    assert isinstance(convert(alone), DeployLayer)
    assert convert(alone).input_quantizer.name == "input_quantizer"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    x = images(16).to(dtype)
    model = quantized(randomize_norms(cnn()).to(dtype), x)
    deployed = convert(model)
    y = run(deployed, x)
    assert y.dtype == dtype
    assert {m.codes.dtype for m in deploy_layers(deployed)} == {torch.int8}
    assert {m.weight_scale.dtype for m in deploy_layers(deployed)} == {torch.float32}
    assert close(run(model, x).float(), y.float(), layers=2)


def test_autocast_does_not_reach_the_sums():
    model = trained("cnn", CONFIGS["W8A8"])
    deployed, x = convert(model), images(8)
    expected = run(deployed, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(deployed, x), expected)


# -- the module that comes out, and the one that went in --------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    return trained("resnet", CONFIGS["W4A4"])


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    return state, flags, {name: id(p) for name, p in model.named_parameters()}, dict(vars(model))


def same(a, b):
    states_equal = a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    return states_equal and a[1:3] == b[1:3] and a[3].keys() == b[3].keys()


def test_the_original_stays_as_it_is(resnet):
    model = copy.deepcopy(resnet).train()
    model.stem.eval()
    model.head.weight.requires_grad_(False)
    model(images(4)).sum().backward()
    before = snapshot(model)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    deployed = convert(model)
    assert same(snapshot(model), before)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name != "head.weight")
        assert p.grad is gradients[name] is None or torch.equal(p.grad, gradients[name])
    assert not any(m.training for m in deployed.modules())
    assert not any(p.requires_grad for p in deployed.parameters())
    assert type(deployed) is ResNet
    with torch.no_grad():
        for tensor in [*deployed.parameters(), *deployed.buffers()]:
            tensor.zero_()
    assert same(snapshot(model), before)


def test_it_is_printed_copied_pickled_and_loaded(resnet):
    deployed, x = convert(resnet), images(8)
    expected = run(deployed, x)
    text = str(deployed)
    assert "4-bit weight (32, 16, 3, 3) per channel, int32 bias, BatchNorm folded, sums in float32" in text
    assert "ActivationQuantizer(4 bits, unsigned, scale 0." in text
    assert "LSQ" not in text
    assert torch.equal(run(copy.deepcopy(deployed), x), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(deployed)), x), expected)
    file = io.BytesIO()
    torch.save(deployed.state_dict(), file)
    file.seek(0)
    other = convert(trained("resnet", CONFIGS["W4A4"], steps=3))
    assert not torch.equal(run(other, x), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(other, x), expected)
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in deployed.state_dict().items()}
    assert kinds == {
        "codes": torch.int8,
        "weight_scale": torch.float32,
        "bias_codes": torch.int32,
        "scale": torch.float32,
    }


def test_loading_larger_biases_changes_the_precision_of_the_sum():
    deployed = convert(quantized(nn.Linear(4, 2), torch.rand(8, 4)))
    assert deployed.exact_in_float32
    deployed.load_state_dict(deployed.state_dict() | {"bias_codes": torch.tensor([2**24, 0], dtype=torch.int32)})
    assert not deployed.exact_in_float32


def test_it_can_be_exported_with_any_batch(resnet):
    deployed = convert(resnet)
    program = torch.export.export(deployed, (images(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (2, 5, 33):
        assert torch.equal(program.module()(images(count)), run(deployed, images(count)))


def test_hooks_stay_with_their_layer():
    x = torch.rand(8, 4)
    model = quantized(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), x)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert bool((run(convert(model), x) == convert(model)[1].bias).all())


# -- what is refused ----------------------------------------------------------------------------------------------


def broken(change):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = quantize_model(model, SAME, calibration=torch.rand(8, 3, 6, 6))
    with torch.no_grad():
        change(model)
    return model


REFUSED = {
    "Linear has no quantized layers: call quantize_model first": lambda: nn.Linear(2, 2),
    "quantizer '0.input_quantizer' has no scale yet": lambda: quantize_model(nn.Sequential(nn.Linear(2, 2))),
    "'0.input_quantizer' has a scale that is": lambda: broken(lambda m: m[0].input_quantizer.raw_scale.fill_(np.nan)),
    "'0.weight_quantizer' has a scale that is": lambda: broken(lambda m: m[0].weight_quantizer.raw_scale.fill_(np.nan)),
    "'0' has a weight that is not finite": lambda: broken(lambda m: m[0].weight.fill_(np.inf)),
    "'0' has a bias that is not finite": lambda: broken(lambda m: m[0].bias.fill_(np.nan)),
    "BatchNorm behind '0' has values that are not": lambda: broken(lambda m: m[1].running_var.fill_(-1.0)),
    "BatchNorm behind '0' has values": lambda: broken(lambda m: m[1].bias.fill_(np.inf)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_converted_is_named(message):
    model = REFUSED[message]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model)
    after = snapshot(model)
    assert after[1:3] == before[1:3]
    assert all(torch.equal(after[0][k], before[0][k]) or bool(after[0][k].isnan().any()) for k in before[0])


def test_a_nonpositive_scale_is_refused(monkeypatch):
    """The quantizer's own scale is always positive; this is the last guard before a file is written."""
    model = broken(lambda m: None)
    monkeypatch.setattr(LSQQuantizer, "scale", property(lambda self: -self.raw_scale.exp()))
    with pytest.raises(ValueError, match=r"'0\.weight_quantizer' has a scale that is not finite and positive"):
        convert(model)


def test_a_model_that_is_converted_or_switched_off_or_none_is_refused():
    model = broken(lambda m: None)
    with pytest.raises(ValueError, match="converted already"):
        convert(convert(model))
    with quantization_disabled(model), pytest.raises(ValueError, match=r"'0\.weight_quantizer' is switched off"):
        convert(model)
    with pytest.raises(TypeError, match="got str"):
        convert("model")


def test_a_quantized_layer_of_another_kind_is_named():
    class Other(QuantizedModule, nn.Linear):
        pass

    model = nn.Sequential(Other(2, 2))
    with pytest.raises(ValueError, match="'0': there is no deployed form of Other"):
        convert(model)


def test_nothing_is_said_where_all_is_well(resnet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(resnet)


def test_activation_codes_of_any_float_dtype():
    codes = ActivationQuantizer(torch.tensor(0.25), bits=3, signed=True)
    x = torch.tensor([-9.0, -0.125, 0.125, 0.375, 9.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert codes(x.to(dtype)).tolist() == [-4.0, 0.0, 0.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "signed", "shift"),
    [
        (8, 8, False, 0),
        (4, 4, False, 4),
        (3, 3, False, 5),
        (2, 2, False, 6),
        (4, 8, False, 3),
        (3, 8, False, 4),
        (8, 4, False, 0),
        (6, 8, False, 1),
        (7, 8, False, 0),
        (8, 4, True, 0),
        (4, 4, True, 3),
        (2, 2, True, 5),
        (4, 8, True, 3),
    ],
)
def test_narrow_weights_use_the_room_of_their_container_but_not_more(weight_bits, activation_bits, signed, shift):
    config = QuantConfig(weight_bits, activation_bits, first_last_bits="same", activation_signed=signed)
    layer = convert(quantize_model(nn.Linear(6, 4), config, calibration=torch.rand(32, 6)))
    assert layer.shift == shift
    codes = layer.codes.to(torch.int64)
    assert bool((codes % 2**shift == 0).all())
    # Two products in 16 bits, as on processors without an instruction for four in 32: only 8-bit weights may overflow.
    # In uint8, signed codes lie around 128.
    activation = 127 + 2 ** (activation_bits - 1) if signed else 2**activation_bits - 1
    largest = 2 * activation * 2 ** (weight_bits - 1 + shift)
    assert largest < 2**15 or shift == 0


def test_the_finer_unit_of_biases_keeps_the_codes_of_training():
    """At three bits, the biases' rounding flips a tenth of the codes that it would in units of the sum, or fewer."""
    x = torch.rand(256, 16)
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())]
    model = quantize_model(nn.Sequential(*layers, nn.Linear(16, 4)), QuantConfig(3, 3), calibration=x).eval()
    flips = {}
    for coarse in (False, True):
        deployed = convert(model)
        for layer in deployed:
            if isinstance(layer, DeployLayer) and coarse:
                step = 2**layer.shift
                layer.bias_codes.copy_((layer.bias_codes / step).round() * step)
        with recorded_codes(deployed) as codes:
            run(deployed, x)
        flips[coarse] = 0
        hidden = x
        for name, (layer, original) in enumerate(zip(deployed, model, strict=True)):
            if isinstance(layer, DeployLayer):
                q = original.input_quantizer
                expected = (hidden / q.scale).clamp(q.qmin, q.qmax).round()
                flips[coarse] += int((torch.from_numpy(codes[f"{name}.input_quantizer"][0]) != expected).sum())
            hidden = original(hidden)
    print(f"codes that differ from training: {flips[False]} with the finer unit, {flips[True]} without")
    assert flips[True] > 50
    assert flips[False] <= flips[True] / 10


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_become_tables_of_the_quantized_values(kind):
    model = nn.Sequential(kind(10, 6), nn.Linear(6, 4))
    tokens = torch.randint(10, (32, 3))
    model = quantize_model(model, QuantConfig(3, 8, first_last_bits="same"), calibration=tokens).eval()
    deployed = convert(model)
    assert type(deployed[0]) is kind
    assert torch.equal(deployed[0](tokens), model[0](tokens))
    assert not torch.equal(deployed[0].weight, model[0].weight)


def test_what_has_no_deployed_form_is_named_with_what_to_do():
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model = quantize_model(net, QuantConfig(4, 4, output_bits=4))
    with pytest.raises(ValueError, match=r"'0': there is no deployed form of QuantEmbedding yet.*exclude=\('0',\)"):
        convert(model)
