"""A run that diverges: a loss of NaN and gradients of NaN, as without quantizers, and no exception on the way."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gaqat_optim import (
    GAQATOptimizer,
    LSQQuantizer,
    QuantConfig,
    convert,
    quantization_summary,
    quantize_model,
    recompute_activations,
)
from gaqat_optim.deploy.bias_rounding import rounded_biases
from small_networks import NETWORKS, build

CONFIGS = {
    "log": QuantConfig(4, 4),
    "linear, per tensor, outputs": QuantConfig(
        3, 3, scale_domain="linear", weight_granularity="tensor", output_bits=8, activation_signed=True
    ),
}


def quantized(name, config):
    torch.manual_seed(0)
    model, x, y = build(name)
    return quantize_model(model, config, calibration=x).train(), x, y


@pytest.mark.cover("values")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_scales_that_are_not_finite(name, config, bad, recompute):
    model, x, y = quantized(name, CONFIGS[config])
    if recompute:
        recompute_activations(model)
    for q in [m for m in model.modules() if isinstance(m, LSQQuantizer)]:
        before = q.raw_scale.detach().clone()
        with torch.no_grad():
            q.raw_scale[0] = bad
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if math.isnan(bad):  # An infinite one goes back to its bound.
            # torch's attention makes zeros of scores that are NaN.
            assert math.isnan(loss.item()) or "attn.query" in q.name or "attn.key" in q.name
            assert q.raw_scale.grad.isnan().any()
        else:
            assert math.isfinite(loss.item())
        model.zero_grad()
        with torch.no_grad():
            q.raw_scale.copy_(before)
    assert math.isfinite(F.cross_entropy(model(x), y).item())


@pytest.mark.cover("values")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_an_optimizer_that_makes_everything_nan(name, config, bad):
    """As a gradient of NaN does to every parameter with a momentum."""
    model, x, y = quantized(name, CONFIGS[config])
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-4), model)

    def closure(factor):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * factor
        loss.backward()
        return loss

    for factor in (1.0, bad, 1.0, 1.0):
        loss = optimizer.step(partial(closure, factor))
    assert math.isnan(loss.item())
    assert all(p.isnan().any() for p in model.parameters())
    assert "nan dB" in str(quantization_summary(model))
    with rounded_biases(model):
        assert math.isnan(F.cross_entropy(model(x), y).item())
    with pytest.raises(ValueError, match=r"not finite|no deployed form of QuantEmbedding"):
        convert(model)


@pytest.mark.cover("values")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "embeddings"])  # whose inputs are indices
def test_inputs_that_are_not_finite(name, bad):
    model, x, y = quantized(name, QuantConfig(4, 4))
    x = x.clone()
    x.view(-1)[3] = bad
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert math.isnan(loss.item()) == math.isnan(bad)  # An infinite value is clipped.
    x.view(-1)[3] = bad
    lazy = quantize_model(build(name)[0], QuantConfig(4, 4)).train()
    with pytest.raises(ValueError, match=r"the quantizer '\S+' from values that are not finite: look for them in"):
        lazy(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 0.0])
def test_one_quantizer(dtype, channels, scale):
    """The backward that keeps the output computes with Python's numbers; its result is that of the other one."""
    found = []
    for save_output_for_backward in (True, False):
        torch.manual_seed(0)
        v = torch.randn(3, 40, dtype=dtype, requires_grad=True)
        q = LSQQuantizer(4, signed=True, channels=channels, channel_axis=None if channels is None else 0)
        q.initialize(v.detach())
        q.to(dtype).save_output_for_backward = save_output_for_backward
        with torch.no_grad():
            q.raw_scale[0] = scale
        q(v).square().sum().backward()
        found.append((v.grad, q.raw_scale.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_untrained_network_without_calibration_does_not_diverge():
    model, x, y = build("resnet")
    model = quantize_model(model, QuantConfig(4, 4)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]
