"""F.linear with the weight of a quantized child is a call of that child; nothing else changes."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gaqat_optim import QuantConfig, quantization_disabled, quantization_summary, quantize_model, recompute_activations
from gaqat_optim.quant.nn.functional_calls import RoutedForward, is_linear, reads_weights
from gaqat_optim.quant.nn.linear import QuantLinear
from quant.nn.window_attention import CASES, Reads, build

pytestmark = [  # what torch warns of in its own code
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]
SAME = QuantConfig(4, 4, first_last_bits="same")


def readers(model):
    return [module for module in model.modules() if "forward" in vars(module)]


def without_calibration(network, config):
    with warnings.catch_warnings():
        # By torch 2.8 some cannot. Which layers are the first and the last, the configuration tells then.
        warnings.filterwarnings("ignore", ".* cannot be traced symbolically")
        return quantize_model(network, config)


@pytest.mark.parametrize("case", CASES)
def test_networks_that_do_it_are_quantized(case):
    network, x = build(case)
    model = quantize_model(network, QuantConfig(4, 4), calibration=x)
    assert readers(model)
    assert not readers(network)
    expected = model(x)
    with quantization_disabled(model):
        assert torch.equal(model(x), network(x))
    assert not torch.equal(expected, network(x))
    assert not quantization_summary(model, x).never_called
    config = QuantConfig.from_dict(model.quant_config.to_dict())
    rebuilt = without_calibration(network, config)
    rebuilt.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), rebuilt.eval()):
        assert torch.equal(other(x), expected)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    uncalibrated = without_calibration(network, config).train()
    uncalibrated(x).square().mean().backward()
    assert all(p.grad is not None for p in uncalibrated.parameters())


class Parts(nn.Module):
    """Reads one layer, with a bias that ``forward`` makes of its own, and calls another; both count their calls."""

    def __init__(self, bias=lambda layer: layer.bias):
        super().__init__()
        self.read, self.called, self.bias = nn.Linear(4, 4), nn.Linear(4, 4), bias
        self.calls = []
        for layer in (self.read, self.called):
            layer.register_forward_hook(lambda layer, args, y: self.calls.append(layer))

    def forward(self, x):
        return self.called(F.linear(x, self.read.weight, self.bias(self.read)))


BIASES = {
    "its own": lambda layer: layer.bias,
    "none": lambda layer: None,
    "another": lambda layer: layer.bias.detach() * 2 + 1,
}


@pytest.mark.parametrize("bits", [(4, 4), (None, 4), (4, None)])
@pytest.mark.parametrize("bias", BIASES)
def test_the_layer_quantizes_and_adds_the_bias_of_the_call(bias, bits):
    x = torch.randn(6, 4)
    model = quantize_model(Parts(BIASES[bias]), QuantConfig(*bits, first_last_bits="same"), calibration=x, inplace=True)
    for context, count in ((quantization_disabled(model), 4), (torch.no_grad(), 6)):
        with context:
            y = x
            for layer, b in ((model.read, BIASES[bias](model.read)), (model.called, model.called.bias)):
                quantizer = layer.input_quantizer
                y = F.linear(y if quantizer is None else quantizer(y), layer.quantized_weight(), b)
            assert torch.equal(model(x), y)
        assert [type(layer).__name__ for layer in model.calls] == ["QuantLinear"] * count  # 2 are of the calibration


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def test_recomputed_activations_give_the_same_gradients():
    network, x = build("own")
    model = quantize_model(network, SAME, calibration=x).train()
    expected = gradients(model, x)
    recompute_activations(model)
    assert all(map(torch.equal, gradients(model, x), expected))


class Twice(nn.Module):
    """Reads a layer and calls it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias.clone()) + self.fc(x)


def test_a_compiled_network_is_the_same():
    torch._dynamo.reset()
    x = torch.randn(6, 4)
    model = quantize_model(nn.Sequential(Twice(), nn.Linear(4, 2)), SAME, calibration=x)
    expected, expected_gradients = model(x), gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    for actual, gradient in zip(gradients(compiled, x), expected_gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)  # sums in another order


def test_excluded_layers_are_read_in_floating_point():
    network, x = build("own")
    model = quantize_model(network, QuantConfig(4, 4, exclude=("1.*",)), calibration=x)
    assert not readers(model)
    model = quantize_model(network, QuantConfig(4, 4, exclude=("1.fc",)), calibration=x)
    assert type(model[1].fc) is nn.Linear
    assert readers(model)[0].forward.names == ("layers.qkv", "proj")
    assert model(x).shape == (4, 3)


def test_a_layer_that_is_replaced_afterwards_is_read_in_floating_point():
    network, x = build("own")
    model = quantize_model(network, SAME, calibration=x)
    model[1].fc = nn.Linear(8, 8)
    assert model(x).shape == (4, 3)


def test_a_network_that_reads_itself_keeps_its_signature():
    model = quantize_model(Reads(), SAME, calibration=torch.randn(4, 5, 8))
    assert isinstance(model.forward, RoutedForward)
    assert inspect.signature(model.forward) == inspect.signature(Reads().forward)
    assert model(x=torch.randn(4, 5, 8)).shape == (4, 8, 5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return F.linear(self.b(x), self.a.weight)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 4, 1), nn.Linear(1, 4)

    def forward(self, x):
        return F.conv1d(F.linear(x[..., None], self.b.weight).mT, self.a.weight)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(self._run, x, use_reentrant=False)

    def _run(self, x):
        return F.linear(x, self.a.weight)


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, F.normalize(self.a.weight, dim=1))


@pytest.mark.parametrize("kind", [Tied, Convolution, Checkpointed, Cosine])
def test_what_cannot_be_routed_is_an_error_that_changes_nothing(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind())
    with pytest.raises(ValueError, match=r"read past them, in floating point:\n  '1\.a'"):
        quantize_model(model, SAME, calibration=torch.randn(3, 4), inplace=True)
    assert not readers(model)
    with pytest.raises(ValueError, match=r"read past them, in floating point:\n  '1\.a'"):
        quantize_model(model, SAME).train()(torch.randn(3, 4))


def test_a_layer_with_a_computation_of_its_own_is_not_called():
    class QuantCosine(QuantLinear):
        def compute(self, x, weight, *bias):
            return F.linear(x, F.normalize(weight, dim=1), *bias)

    layer = quantize_model(nn.Linear(4, 4), SAME)
    assert is_linear(layer)
    layer.__class__ = QuantCosine
    assert not is_linear(layer)


class Indirect(nn.Module):
    """Names F.linear in a helper of a base class, and a weight in a property."""

    def forward(self, x):
        return self._product(x, self._factor)

    @property
    def _factor(self):
        return self.fc.weight

    @staticmethod
    def _product(x, weight):
        def inner():
            return nn.functional.linear(x, weight)

        return inner()


class Inherits(Indirect):
    def forward(self, x):
        return super().forward(x) + 1


class Metadata(nn.Module):
    def forward(self, x):
        return self.linear(x.to(self.linear.weight.dtype))


def test_which_classes_do_it():
    assert [
        kind for kind in (Reads, Indirect, Inherits, Metadata, nn.Linear, nn.Sequential) if reads_weights(kind)
    ] == [
        Reads,
        Indirect,
        Inherits,
    ]
