"""In ``rounded_biases``, the network in training is the one that is deployed."""

import copy

import pytest
import torch
from torch import nn

from deploy.deploy_networks import CONFIGS, NETWORKS, images, labels, run, trained
from gaqat_optim import QuantConfig, convert, quantization_disabled, quantize_model
from gaqat_optim.deploy.bias_rounding import rounded_biases
from gaqat_optim.quant.lsq.quantizer import LSQQuantizer


@pytest.mark.cover("values")
@pytest.mark.parametrize("output_bits", [None, 8])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_it_computes_is_what_convert_computes(network, config, output_bits):
    """But for values between two codes, which the order of float32 operations decides: few images, and by little."""
    from dataclasses import replace

    model, x = trained(network, replace(CONFIGS[config], output_bits=output_bits)), images(500, seed=7)
    x = torch.cat([x, 3 * (0.5 - x)])
    plain = run(model, x)
    deployed = convert(model)
    expected = run(deployed, x)
    with rounded_biases(model):
        actual = run(model, x)
        inside = run(convert(model), x)
    assert torch.equal(inside, expected)
    assert (actual.argmax(1) == expected.argmax(1)).float().mean() >= 0.998
    same = (actual - expected).abs().amax(1) <= 1e-4 * expected.abs().max()
    assert same.float().mean() >= (0.998 if config in ("W3A3", "W2A2") else 0.97)
    assert torch.equal(run(model, x), plain)


def test_it_matters():
    model, x = trained("cnn", CONFIGS["W2A2"]), images(500, seed=7)
    with rounded_biases(model):
        actual = run(model, x)
    assert not torch.allclose(actual, run(model, x), atol=1e-4)


def test_the_rounding_is_added_and_its_gradient_is_zero():
    """One layer of one weight: y = 3 * 0.5 * w_hat + b, with everything on powers of two."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(0.25)
        layer.bias.fill_(0.30)
    model = quantize_model(layer, QuantConfig(8, 8, first_last_bits="same"))
    model.weight_quantizer.initialize(layer.weight, 0.25)
    model.input_quantizer.initialize(torch.ones(1), 0.5)
    x = torch.tensor([[1.5]])
    assert model(x).item() == pytest.approx(1.5 * 0.25 + 0.30)
    with rounded_biases(model):
        y = model(x)
        assert y.item() == 1.5 * 0.25 + 0.25  # 0.30 in steps of 0.5 * 0.25
        y.sum().backward()
    assert model.bias.grad.item() == 1.0
    assert model(x).item() == pytest.approx(1.5 * 0.25 + 0.30)


@pytest.mark.parametrize("network", NETWORKS)
def test_training_in_the_block_trains_the_same_parameters_and_leaves_no_trace(network):
    torch.manual_seed(0)
    model = quantize_model(NETWORKS[network](), QuantConfig(3, 3), calibration=images(64))
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = images(32)
    losses = []
    with rounded_biases(model):
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels(x))
            loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_a_failure_in_the_block_leaves_no_trace():
    model = quantize_model(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), calibration=torch.rand(8, 4)
    )
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises(RuntimeError), rounded_biases(model):
        model(torch.rand(3, 5))
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model[2].bias, nn.Parameter)


def test_copies_made_in_the_block_follow_their_own_values():
    model, x = trained("mlp", CONFIGS["W3A3"]), images(64, seed=3)
    with rounded_biases(model):
        other = copy.deepcopy(model)
        expected = run(model, x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        assert torch.equal(run(other, x), expected)


def test_nothing_is_added_where_nothing_is_rounded():
    torch.manual_seed(0)
    x = torch.rand(16, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    for config in (QuantConfig(4, None), QuantConfig(None, 4)):
        model = quantize_model(net, config, calibration=x).eval()
        with rounded_biases(model):
            actual = run(model, x)
        assert torch.equal(actual, run(model, x))
    model = quantize_model(net, calibration=x)
    with rounded_biases(model), quantization_disabled(model):
        assert torch.equal(run(model, x), run(net, x))
    model = quantize_model(net)
    with rounded_biases(model):
        model.train()(x)  # sets the scales
        model.eval()
        expected = run(convert(model), x)
        assert torch.allclose(run(model, x), expected, atol=1e-5)
    assert all(q.is_initialized for q in model.modules() if isinstance(q, LSQQuantizer))


def test_a_network_without_quantized_layers_is_refused():
    with (
        pytest.raises(ValueError, match="Linear has no quantized layers whose biases could be rounded"),
        rounded_biases(nn.Linear(2, 2)),
    ):
        pass


def test_attention_and_transposed_convolutions_are_rounded_too():
    torch.manual_seed(0)
    x = torch.randn(64, 5, 16)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    transposed = nn.Sequential(nn.ConvTranspose1d(5, 6, 3, groups=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten())
    for net in (encoder, transposed):
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_var.uniform_(0.5, 2)
        model = quantize_model(net, QuantConfig(3, 4, first_last_bits="same"), calibration=x).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1 and len(parameter) in (6, 16, 32, 48):
                    parameter.normal_()  # biases, which start at zero
        expected, plain = run(convert(model), x), run(model, x)
        with rounded_biases(model):
            actual = run(model, x)
        near = ((actual - expected).abs() <= 1e-4).float().mean()
        assert near >= 0.98
        assert ((plain - expected).abs() <= 1e-4).float().mean() < near - 0.2
