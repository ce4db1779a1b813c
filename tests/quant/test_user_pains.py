"""What users of other packages reported, one test each: here it does not happen.

The numbers are those of the list in our research notes; repository and issue stand beside each.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import (
    LSQQuantizer,
    QuantConfig,
    convert,
    lsq_quantize,
    param_groups,
    quantization_summary,
    quantize_model,
)
from networks import TiedWeights, build, cnn, mlp


def scales_of(model):
    return torch.cat([m.scale.detach() for m in model.modules() if isinstance(m, LSQQuantizer)])


@pytest.mark.parametrize("domain", ["log", "linear"])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_pain_01_scales_turn_negative_and_training_collapses(base, domain):
    """ZouJiu1/LSQplus 12, OpenPPL/ppq 518, Xilinx/brevitas 1328: 500 steps at ten times a sensible learning rate."""
    model, x, y = build("cnn")
    model = quantize_model(model, QuantConfig(4, 4, scale_domain=domain), calibration=x)
    kind, sensible = {"adam": (torch.optim.Adam, 1e-3), "sgd": (torch.optim.SGD, 0.05)}[base]
    optimizer = kind(model.parameters(), lr=10 * sensible)
    losses = []
    for _ in range(500):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        scales = scales_of(model)
        assert bool((scales > 0).all() & scales.isfinite().all())
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])


def test_pain_02_nan_from_scratch():
    """zhutmost/lsq-net 1 and 13: an untrained network, not calibrated, in a training loop."""
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
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < 0.8 * losses[0]


def test_pain_03_first_and_last_layer_and_the_learning_rate_of_scales_are_ambiguous():
    """zhutmost/lsq-net 2 and 8: said in the configuration, shown in the summary, and one argument of param_groups."""
    model = quantize_model(mlp(), QuantConfig(3, 3, first_last_bits=8))
    assert [record.weight_bits for record in quantization_summary(model)] == [8, 3, 8]
    assert param_groups(model, scale_lr=1e-4)[1]["lr"] == 1e-4


def test_pain_04_weights_beyond_the_range_must_get_no_gradient():
    """hustzxd/LSQuantization 1: the missing mask cost ten points of accuracy."""
    weight = torch.tensor([-3.0, 0.4, 3.0], requires_grad=True)
    lsq_quantize(weight, torch.tensor([0.25]), -4, 3).sum().backward()
    assert weight.grad.tolist() == [0, 1, 0]


def test_pain_06_missing_or_unexpected_scale_keys_on_load():
    """brevitas 420, 386, 1177; NNCF 214; ao 4921; quanto 354: float into quantized, and before any forward."""
    floating, x, _ = build("cnn")
    never_run, trained = quantize_model(floating), quantize_model(floating, calibration=x)
    missing, unexpected = copy.deepcopy(trained).load_state_dict(floating.state_dict(), strict=False)
    assert not unexpected
    assert all("quantizer.scale_" in key or "quantizer.lsq_" in key for key in missing)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    never_run.load_state_dict(torch.load(file, weights_only=True))  # strict
    assert torch.equal(never_run.eval()(x), trained.eval()(x))


class ControlFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.small(x) if x.abs().mean() < 1 else self.large(x)


def test_pain_13_control_flow_breaks_tracing():
    """MQBench 253, 220, 230: nothing is traced, so a branch on data is no matter."""
    model = quantize_model(ControlFlow(), calibration=[torch.rand(16, 8), 10 * torch.rand(16, 8)])
    assert model.small.input_quantizer.is_initialized
    assert model.large.input_quantizer.is_initialized
    assert model.large.input_quantizer.scale > 5 * model.small.input_quantizer.scale


def test_pain_14_learned_scales_are_dropped_on_conversion_and_depthwise_fails():
    """ao 3022, pytorch 157222: what was learned is what is deployed, depthwise convolutions too."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, bias=False))
    x = torch.rand(8, 3, 8, 8)
    model = quantize_model(model, QuantConfig(4, 4, first_last_bits="same"), calibration=x).eval()
    with torch.no_grad():
        model[2].weight_quantizer.raw_scale.add_(torch.linspace(-0.3, 0.3, 6))  # as if learned
    assert torch.allclose(convert(model)[2].weight, model[2].quantized_weight(), rtol=1e-6)


def test_pain_15_tied_weights_come_apart():
    """Model-Optimizer 2131, vllm 45543: one Parameter before, one after, moved by both gradients."""
    model = quantize_model(TiedWeights(), calibration=torch.randn(16, 8))
    assert model.a.weight is model.b.weight
    weight = model.a.weight
    before = weight.detach().clone()
    assert sum(p is weight for p in model.parameters()) == 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert model.a.weight is model.b.weight is weight
    assert not torch.equal(weight, before)
    assert not torch.equal(model.a.input_quantizer.scale, model.b.input_quantizer.scale)  # each layer its own scales


def test_pain_15_an_lstm_fails_late_or_in_silence():
    """aimet 3937: refused by name, at once, with what to do."""
    model = nn.ModuleDict({"encoder": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"'encoder' cannot be quantized\. LSTM .* nn.Linear; or .*exclude"):
        quantize_model(model)


def test_pain_15_observers_differ_between_replicas_after_a_copy():
    """pytorch 33648 and 38081: a copy has the scales, not references to them."""
    model = quantize_model(cnn(), calibration=torch.randn(8, 3, 8, 8))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight_quantizer.raw_scale.add_(1.0)
    assert not torch.equal(scales_of(model), scales_of(twin))
    assert twin[0].weight_quantizer.raw_scale is not model[0].weight_quantizer.raw_scale
