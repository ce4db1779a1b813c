"""Normalizations in the forward of a module that goes on after them: folded, and what follows is kept."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import convert_and_warn, quantized, randomize_norms, run
from gaqat_optim import QuantConfig, convert, export_onnx, load_packed, rounded_biases, save_packed
from gaqat_optim.deploy.forward_without_norm import ForwardWithoutNorm
from gaqat_optim.deploy.nn.base import DeployLayer
from torchvision_import import import_torchvision


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a subclass with a forward of its own, a dropout and an activation."""

    def __init__(self, channels, act, **settings):
        super().__init__(channels, **settings)
        self.drop = nn.Dropout(0.3)
        self.act = act

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            use_batch,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class SuperAct(nn.BatchNorm2d):
    """Calls torch's forward, which asks for the shape."""

    def forward(self, x):
        return F.silu(super().forward(x)) * x.shape[1] + 1


class Statistics(nn.Module):
    """A norm that is no BatchNorm, with tensors of other names."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)
        self.gamma, self.beta = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return torch.tanh(torch.batch_norm(x, self.gamma, self.beta, self.mean, self.var, False, 0.1, 1e-3, False))


class Arithmetic(Statistics):
    def forward(self, x):
        shape = (1, -1, 1, 1)
        return (x - self.mean.view(shape)) / self.var.sqrt().view(shape) * self.gamma.view(shape) + self.beta.view(
            shape
        )


class Functional(nn.Module):
    """A block that owns the layers and the statistics of two norms."""

    def __init__(self, inputs, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, channels, 3, bias=False), nn.Conv2d(channels, channels, 3)
        for name in ("one", "two"):
            self.register_buffer(f"{name}_mean", torch.randn(channels))
            self.register_buffer(f"{name}_var", torch.rand(channels) + 0.5)
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.randn(channels)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(channels)))

    def norm(self, x, name):
        mean, var, weight, bias = (getattr(self, f"{name}_{part}") for part in ("mean", "var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, training=self.training)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x), "one"))
        return self.norm(self.second(x), "two")


def frozen(channels):
    import_torchvision()
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d(channels)
    for name, values in (("weight", torch.randn(channels)), ("bias", torch.randn(channels))):
        getattr(norm, name).copy_(values)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


NORMS = {
    "ReLU": lambda: NormAct(8, nn.ReLU(inplace=True)),
    "SiLU": lambda: NormAct(8, nn.SiLU()),
    "no bias": lambda: NormAct(8, nn.SiLU(), affine=False),
    "no activation": lambda: NormAct(8, nn.Identity()),
    "super": lambda: SuperAct(8),
    "torch.batch_norm": lambda: Statistics(8),
    "arithmetic": lambda: Arithmetic(8),
    "FrozenBatchNorm2d": lambda: frozen(8),
    "one child": lambda: nn.Sequential(frozen(8), nn.ReLU()),
}


def network(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "functional":
        return nn.Sequential(Functional(3, 8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return randomize_norms(nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[kind](), nn.Conv2d(8, 4, 3)))


def calls_of_batch_norm(model, x):
    graph = torch.export.export(model, (x,)).graph
    return [node for node in graph.nodes if "batch_norm" in str(node.target)]


X = torch.rand(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))
KINDS = [*NORMS, "functional"]


@pytest.mark.cover("values")
@pytest.mark.parametrize("output_bits", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_folded_and_what_follows_is_kept(kind, output_bits):
    model = quantized(network(kind), X, QuantConfig(8, 8, output_bits=output_bits))
    plain = run(model, X)
    deployed = convert(model)
    layers = [m for m in deployed.modules() if isinstance(m, DeployLayer)]
    assert [layer.folded for layer in layers] == [True] * (len(layers) - 1) + [False]
    assert not calls_of_batch_norm(deployed, X)
    with rounded_biases(model):
        expected = run(model, X)
        assert torch.equal(run(convert(model), X), run(deployed, X))
    assert output_bits or not torch.equal(expected, plain)
    largest = expected.abs().max()
    # All but single codes, which float32 rounds to the one or the other side.
    assert ((expected - run(deployed, X)).abs() <= 1e-5 * largest).float().mean() > 0.95
    assert (expected - run(deployed, X)).abs().max() <= 0.03 * largest
    assert torch.equal(run(model, X), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_its_layer_computes_what_it_did_in_training_to_the_last_bits(kind):
    """Without codes of an input, no code can flip."""
    model = quantized(network(kind), X, QuantConfig(4, None, first_last_bits="same"))
    expected, actual = run(model, X), run(convert(model), X)
    assert (expected - actual).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_goes_before_what_follows(kind):
    model = quantized(network(kind)[:2], X, QuantConfig(2, 2, first_last_bits="same"))
    deployed, plain = run(convert(model), X), run(model, X)
    with rounded_biases(model):
        rounded = run(model, X)

    def share(y):  # of values that agree, all but single codes of the second layer
        return ((y - deployed).abs() <= 1e-5 * deployed.abs().max()).float().mean()

    assert share(rounded) > 0.99
    assert share(plain) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_block_it_trains(kind):
    """With the statistics of the batch, the rounding would be gone if it were added before the norm."""
    model = quantized(network(kind), X).train()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    with rounded_biases(model):
        y = model(X)
        y.square().mean().backward()
    torch.manual_seed(1)
    z = plain(X)
    z.square().mean().backward()
    assert not torch.equal(y, z)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    biases = [p.grad for name, p in model.named_parameters() if "bias" in name]
    assert all(gradient is not None for gradient in biases)
    assert torch.allclose(y, z, atol=0.1 * z.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_copied_pickled_and_packed(kind, tmp_path):
    model = quantized(network(kind), X, QuantConfig(4, 4, first_last_bits="same", output_bits=8))
    deployed = convert(model)
    expected = run(deployed, X)
    assert torch.equal(run(copy.deepcopy(deployed), X), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(deployed)), X), expected)
    save_packed(model, tmp_path / "net.packed")
    for target in (network(kind), model):
        loaded = load_packed(target, tmp_path / "net.packed")
        assert torch.equal(run(loaded, X), expected)
        assert list(loaded.state_dict()) == list(deployed.state_dict())


class SideBySide(nn.ModuleList):
    """Networks of one input, with an output each: one file for all."""

    def forward(self, x):
        return tuple(network(x) for network in self)


def test_the_file_has_integer_kernels(tmp_path):
    # The exporter would merge layers with the same weights.
    networks = [network(kind, seed) for seed, kind in enumerate(KINDS)]
    model = quantized(SideBySide(networks), X, QuantConfig(8, 8, output_bits=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = export_onnx(model, X, tmp_path / "net.onnx")
    import onnx

    operators = [node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node]
    assert "BatchNormalization" not in operators
    assert report.integer_kernels == {"QLinearConv": 19}
    in_code = [f"{KINDS.index(kind)}.0" for kind in ("super", "torch.batch_norm")]  # their activations: no module
    assert sorted(operator.name for operator in report.float_operators) == in_code
    assert report.max_abs_diff <= 0.05 * min(y.abs().max() for y in run(model, X))


def test_the_rest_has_the_children_and_attributes_of_the_module():
    norm = NormAct(8, nn.ReLU())
    norm.stride = 2
    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3)), X)
    rest = convert(model)[1]
    assert isinstance(rest, ForwardWithoutNorm)
    assert rest.stride == 2
    assert [name for name, _ in rest.named_children()] == ["drop", "act"]
    assert not rest.state_dict()
    assert "the forward of NormAct" in repr(rest)


def test_codes_of_a_relu_behind_the_norm_are_quantized_once():
    model = quantized(network("ReLU"), X, QuantConfig(8, 8, output_bits=8))
    assert model[0].output_quantizer is None
    assert not hasattr(model[1], "output_quantizer")  # The next layer quantizes the same values.


def test_before_another_activation_the_output_quantizer_stands_behind_the_norm():
    model = quantized(network("SiLU"), X, QuantConfig(8, 8, output_bits=8))
    assert model[0].output_quantizer is None
    assert hasattr(model[1].drop, "output_quantizer")


def test_a_block_that_is_called_twice_keeps_its_norms():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Functional(8, 8)

        def forward(self, x):
            return self.block(self.block(x))

    x = torch.rand(4, 8, 12, 12)
    model = quantized(Twice(), x, QuantConfig(8, None))
    deployed = convert_and_warn(model)
    assert not any(m.folded for m in deployed.modules() if isinstance(m, DeployLayer))
    expected = run(model, x)
    assert (run(deployed, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
